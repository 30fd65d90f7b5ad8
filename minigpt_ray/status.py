"""What a job is doing now: a small file that its driver keeps up to date, and the table that is read from it.

status.json is replaced as a whole when the driver enters another phase, and touched every few seconds while the driver
lives: its time is the last sign of life, which a driver that was killed cannot give any more. It is never a reason for a
job to fail, except that another driver may not write the same stage.
"""

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

logger = logging.getLogger(__name__)

BEAT_SECONDS = 5.0
"""Between two signs of life."""
SILENT_SECONDS = 30.0
"""Without one for so long, a driver counts as gone: a busy disk delays a few."""
LOOK_SECONDS = 0.5
"""Between two looks for a sign of life."""
TAIL_BYTES = 1 << 16
"""Of metrics.jsonl, in which its last rows are looked for."""


@dataclass(frozen=True)
class State:
    """What status.json holds."""

    stage: str
    step: int
    """Steps that are complete."""
    steps: int
    began: float
    """When this process began, in seconds since the epoch."""
    phase: str = "starting"
    since: float = 0.0
    """When the phase began."""
    end: str = ""
    """How the job ended; empty while it runs."""
    host: str = ""
    """Of the driver, as its number."""
    pid: int = 0
    born: int = 0
    """When the kernel started it, in clock ticks since the machine's boot: a number is given again."""
    kernel: str = ""
    """The boot and the namespace in which the number is its; empty when that is not known, as in a file of an earlier version."""


class Status:
    """The file, as the driver writes it. A context manager: signs of life are given within."""

    def __init__(self, directory: Path, stage: str, step: int, steps: int) -> None:
        self.path = directory / "status.json"
        now = time.time()
        pid = os.getpid()
        self.state = State(stage, step, steps, began=now, since=now, host=socket.gethostname(), pid=pid, born=_born(pid), kernel=_kernel())
        self._said = False
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="status", daemon=True)

    def __enter__(self) -> "Status":
        self._write()
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        self._pulse.join()
        stopped = isinstance(error, SystemExit) and error.code != 2  # what one_sentence refuses
        self._become(end="finished" if kind is None else "stopped" if stopped else f"failed ({kind.__name__})")

    def phase(self, name: str) -> None:
        """The driver does something else now."""
        self._become(phase=name, since=time.time())

    def progress(self, step: int) -> None:
        """So many steps are complete."""
        if step == self.state.step:
            return
        if self.state.phase == "starting":  # a supervised stage has one phase
            self.phase("training")
        self._become(step=step)

    def _become(self, **changes: Any) -> None:
        self.state = replace(self.state, **changes)
        self._write()

    def _write(self) -> None:
        """Replace the file. It need not survive the machine, so nothing waits for the disk."""
        with self._whatever_the_disk_says(), self._writing:
            part = self.path.with_name(".status.json.partial")
            part.write_text(json.dumps(asdict(self.state)), encoding="utf-8")
            os.replace(part, self.path)

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            with self._whatever_the_disk_says():
                try:
                    os.utime(self.path)
                except FileNotFoundError:  # it could not be written before
                    self._write()

    @contextmanager
    def _whatever_the_disk_says(self) -> Iterator[None]:
        """An error of writing is said, the first time, and nothing else comes of it."""
        try:
            yield
        except OSError as error:
            if not self._said:
                logger.warning("%s cannot be kept up to date (%s); the job goes on, but may look as if it were gone", self.path, error.strerror)
            self._said = True


# -------------------------------------------------------------------------------------------------- another driver


class InUse(ValueError):
    """Another driver writes a stage: one sentence with who that is and the remedy."""


def refuse_another(directory: Path) -> None:
    """Raise InUse when a driver that lives, other than this process, writes the stage in `directory`.

    Of a process of this machine that is known at once. One of another machine is given the time that is left until it would
    count as gone. Clocks of several machines count as equal.
    """
    path = directory / "status.json"
    if not path.exists():
        return
    state, last = _sign_of_life(path)
    kernel, age = _kernel(), time.time() - last
    here = state.kernel == kernel != ""
    if state.end or (here and (state.pid == os.getpid() or _born(state.pid) != state.born)):
        return
    who = f"process {state.pid} on {state.host}" if state.pid else "a process that is not named"
    left = SILENT_SECONDS - max(0.0, age)
    if not here and left > 0:
        logger.warning("%s: %s gave a sign of life %s ago; waiting up to %.0f s for another, without which it counts as gone", directory, who, _span(age), left)
    deadline = time.monotonic() + left
    while not here:
        if time.monotonic() > deadline:
            return
        time.sleep(LOOK_SECONDS)
        state, newer = _sign_of_life(path)
        if state.end:
            return
        if newer != last:
            last = newer
            break
    raise InUse(f"{directory} is written by {who}, which gave a sign of life {_span(time.time() - last)} ago; stop it, or choose another run=")


def _sign_of_life(path: Path) -> tuple[State, float]:
    """Who gave the last one, nobody by name where the machine went down with the file half written, and when."""
    text = path.read_bytes()  # opened, and so asked for anew of a file system of several machines
    try:
        state = State(**json.loads(text))
    except (ValueError, TypeError):
        state = State("", 0, 0, began=0.0)
    return state, path.stat().st_mtime


def _kernel() -> str:
    """Of this process; empty where the system does not say it."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> int:
    """When the kernel started a process, 0 when none of that number lives."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if state in (b"Z", b"X") else int(fields[18])


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class Seen:
    """A stage as somebody else finds it."""

    state: State
    age: float
    """Seconds since the last sign of life."""
    row: Mapping[str, float]
    """The last training row of metrics.jsonl; empty before the first."""
    processes: Mapping[str, Any]
    """processes.json: which process of which host is which rank of which role; empty where a stage has none."""

    @property
    def is_alive(self) -> bool:
        return not self.state.end and self.age < SILENT_SECONDS

    def sentence(self) -> str:
        """Where the job is, on a line."""
        state = self.state
        place = f"{state.stage}: step {state.step} of {state.steps}"
        if state.end:
            return f"{place}, {state.end} {_span(self.age)} ago"
        if not self.is_alive:
            return f"{place}, last sign of life {_span(self.age)} ago, in {state.phase}: its driver or its machine is gone; the same command with checkpoint.resume=auto goes on"
        speed = f", {self.row['train/tokens_per_second']:,.0f} tokens/s, {_span(60 * self.row['train/eta_minutes'])} left" if self.row else ""
        return f"{place}, {state.phase} for {_span(time.time() - state.since)}{speed}; sign of life {_span(self.age)} ago"


def look(run_dir: Path) -> Seen:
    """The stage of a run that gave the last sign of life; raises FileNotFoundError when none has."""
    found = sorted(run_dir.glob("*/status.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{run_dir}: no stage of a run has a status.json; give the directory of a run, as in outputs/debug")
    return look_at(found[-1])


def look_at(path: Path) -> Seen:
    """The stage whose status.json this is."""
    state = State(**json.loads(path.read_text(encoding="utf-8")))
    processes = path.with_name("processes.json")
    roles = json.loads(processes.read_text(encoding="utf-8")) if processes.exists() else {}
    return Seen(state, time.time() - path.stat().st_mtime, _last_row(path.with_name("metrics.jsonl")), roles)


def status_table(seen: Seen) -> Table:
    """A line for each process of each role; what is measured of a role as a whole stands in its first."""
    table = Table(title=seen.sentence(), title_justify="left", caption=_pool(seen.row), caption_justify="left")
    for name, justify in (("role", "left"), ("rank", "right"), ("host", "left"), ("pid", "right"), ("device", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for name in ("GiB", "tokens/s", "idle", "restarts"):
        table.add_column(name, justify="right")
    for role, ranks in seen.processes.get("roles", {}).items():
        for place, rank in enumerate(ranks):
            measured = _measured(role, seen.row) if place == 0 else ("", "", "", "")
            table.add_row(role if place == 0 else "", *(str(rank[name]) for name in ("rank", "host", "pid", "device")), *measured)
    return table


def _measured(role: str, row: Mapping[str, float]) -> tuple[str, str, str, str]:
    """Memory of all processes of a role, response tokens per second in which it computes, idle share, restarts; of a supervised stage's workers the last alone."""
    if f"time/idle_share/{role}" not in row:
        return "", "", "", f"{row[f'restarts/{role}']:.0f}" if f"restarts/{role}" in row else ""
    idle = row[f"time/idle_share/{role}"]
    speed = f"{row['train/tokens_per_second'] / (1 - idle):,.0f}" if idle < 1 else ""
    return f"{row[f'memory/{role}_gib']:.2f}", speed, f"{idle:.0%}", f"{row[f'restarts/{role}']:.0f}"


def _pool(row: Mapping[str, float]) -> str:
    if "pool/generator/workers" not in row:
        return ""
    names = ("workers", "joined", "left", "queue_depth")
    workers, joined, left, depth = (row[f"pool/generator/{name}"] for name in names)
    return f"generator: {workers:.0f} workers ({joined:.0f} joined, {left:.0f} left), idle {row['pool/generator/idle_share']:.0%}, {depth:.1f} prompts waited"


def _last_row(path: Path) -> dict[str, float]:
    """The last complete training row, without reading a long file."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        tail = file.read()
    return next((row for row in _rows_from_the_end(tail) if "train/epoch" in row), {})


def _rows_from_the_end(tail: bytes) -> Iterator[dict[str, float]]:
    """Rows in reverse order; the first line may have been cut, and what follows the last newline is being written."""
    lines = tail.split(b"\n")[:-1]
    for line in reversed(lines):
        if line.startswith(b'{"step"'):
            yield {name: float("nan") if value is None else float(value) for name, value in json.loads(line).items()}


def _span(seconds: float) -> str:
    """`12 s`, `3 min`, `2.5 h`."""
    return f"{max(0.0, seconds):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
