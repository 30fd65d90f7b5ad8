"""How many generator workers a running job has: what is asked for from outside, and what autoscaling asks for.

A request is a file in the stage's directory, so it can be made on any machine that sees the run; the job takes it away.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from minigpt_ray.checkpoint import write_json_atomic
from minigpt_ray.config import GeneratorPlacement

logger = logging.getLogger(__name__)

BUSY, IDLE = 0.2, 0.5
"""Idle shares of the pool: below the first it has enough to do, above the second too little."""
PATIENCE = 3
"""Steps in a row with too little to do before a worker leaves: one that is missed costs more than one that waits."""


class _Request(BaseModel, strict=True):
    """What scale.json holds."""

    generator: int


@dataclass(frozen=True)
class Requests:
    """Requests to one running job."""

    directory: Path
    """Of the stage."""

    @property
    def path(self) -> Path:
        return self.directory / "scale.json"

    def ask(self, workers: int) -> None:
        """Ask for so many workers; a request that was not taken yet is replaced."""
        write_json_atomic(self.path, _Request(generator=workers).model_dump())

    @property
    def taken_path(self) -> Path:
        """The last request that was taken, for a driver that follows a dead one."""
        return self.directory / ".scale.json.taken"

    @property
    def is_taken(self) -> bool:
        return not self.path.exists()

    def take(self) -> int | None:
        """What was asked for since the last time, None for nothing. What cannot be read is said and ignored: the job goes on as it is."""
        try:
            self.path.replace(self.taken_path)  # first, so that a request that is made from now on is another one
            return self.taken()
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else 'it is not {"generator": N}'
            logger.warning("%s is ignored: %s; ask with python -m jobs.scale", self.path, reason)
            return None

    def taken(self) -> int:
        """What was taken last; raises OSError or ValueError where that cannot be read."""
        return _Request.model_validate_json(self.taken_path.read_bytes()).generator

    def take_again(self) -> int | None:
        """What was asked for last, also of a driver that has died since."""
        asked = self.take()
        if asked is None and self.taken_path.exists():
            with suppress(OSError, ValueError):
                return self.taken()
        return asked

    def forget(self) -> None:
        """Whatever was asked before was asked of another job."""
        self.path.unlink(missing_ok=True)
        self.taken_path.unlink(missing_ok=True)


def refusal(workers: int, placement: GeneratorPlacement) -> str:
    """One sentence when so many workers are not allowed, else empty."""
    most = placement.max_workers
    if workers < placement.min_workers or (most is not None and workers > most):
        return f"generator={workers} is outside placement.generator.min_workers={placement.min_workers} and max_workers={most}; ask for a number between them"
    return ""


class Autoscaler:
    """A worker more or less after a step, within the bounds of the configuration."""

    def __init__(self, placement: GeneratorPlacement) -> None:
        self.placement = placement
        self._idle_steps = 0

    def wanted(self, workers: int, queue_depth: float, idle_share: float) -> int:
        """How many workers there should be, by the last step: mean prompts that waited, and the pool's idle share, while it was asked for answers."""
        self._idle_steps = self._idle_steps + 1 if idle_share > IDLE and queue_depth < 1 else 0
        if queue_depth >= 1 and idle_share < BUSY:
            workers += 1
        elif self._idle_steps == PATIENCE:
            self._idle_steps = 0
            workers -= 1
        return max(self.placement.min_workers, min(workers, self.placement.room))
