"""What the policy and the critic learner share: PPO epochs and mini-batches."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.engine import Engine, Stats, Update, never
from actors.rank_host import Rank
from minigpt_ray.checkpoint import batch_path, save_batch
from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.batching import micro_batches, mini_batches
from minigpt_ray.rl.experience import Experience

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learnt:
    """What the PPO epochs of one step came to."""

    stats: dict[str, float]
    """Token means over the updates of the last epoch in which there was one; nan without any."""
    grad_norm: float
    """Mean over those updates, before clipping."""
    lr: float
    """Of the last optimizer step."""
    updates: int
    """Updates that were applied."""
    skipped: int
    """Updates refused because a loss or gradient was not finite."""
    stopped: bool
    """Whether `stop` ended the step before its last mini-batch was learnt from."""


@dataclass(frozen=True)
class Learner:
    """How one rank goes through the PPO epochs and mini-batches of a step."""

    engine: Engine
    rank: Rank
    algorithm: AlgorithmConfig
    budget: int
    """Most tokens of a micro-batch, padding included."""
    seed: int
    refused: Path
    """Where mini-batches are kept whose update was not finite."""

    def learn(
        self, experience: Experience, loss: Callable[[nn.Module, Experience, int], tuple[Tensor, Stats]], stop: Callable[[dict[str, float]], bool] = never
    ) -> Learnt:
        """Mini-batches are chosen globally; only then are their rows dealt out to ranks.

        `stop` sees the token means of a mini-batch over all ranks; when it says so, that update and those after it are not made.
        Raises FloatingPointError when an update is refused and `non_finite` is `stop`; nothing has been changed by it. The
        first mini-batch of a step that is refused is saved.
        """
        applied: list[tuple[int, int, Update]] = []  # epoch, tokens, what was done
        skipped, update = 0, None
        chosen = partial(mini_batches, len(experience), self.algorithm.mini_batch_size, self.seed, experience.step)
        for epoch, rows in [(i, rows) for i in range(self.algorithm.ppo_epochs) for rows in chosen(i)]:
            index = torch.from_numpy(rows)
            num_tokens = max(1, int(experience.response_mask[index].sum()))
            plan = micro_batches(experience.lengths[index].tolist(), self.budget, self.rank.world)[self.rank.index]
            parts = [_part(experience, index, positions, self.engine.device) for positions in plan]
            update = self.engine.update(parts, lambda model, part: loss(model, part, num_tokens), stop)  # noqa: B023
            if update.stopped:
                break
            if update.applied:
                applied.append((epoch, num_tokens, update))
            else:
                skipped += 1
                self._refuse(experience, index, epoch, first=skipped == 1)
        assert update is not None
        last = [(count, made) for epoch, count, made in applied if epoch == applied[-1][0]]
        tokens = sum(count for count, _ in last)
        return Learnt(
            stats={name: sum(made.stats[name] * count for count, made in last) / tokens if last else math.nan for name in update.stats},
            grad_norm=sum(made.grad_norm for _, made in last) / len(last) if last else math.nan,
            lr=(applied[-1][2] if applied else update).lr,
            updates=len(applied),
            skipped=skipped,
            stopped=update.stopped,
        )

    def _refuse(self, experience: Experience, index: Tensor, epoch: int, first: bool) -> None:
        """Rank 0 saves the rows of the mini-batch; the others wait, since the first error that reaches the driver ends all of them."""
        what = f"step {experience.step}, PPO epoch {epoch}: a loss or gradient is not finite and no update was applied"
        saved = f"the mini-batch is in {batch_path(self.refused, experience.step)}"
        if first:
            if self.rank.index == 0:
                rows = experience.rows(index)
                tensors = {f.name: getattr(rows, f.name) for f in fields(rows) if isinstance(getattr(rows, f.name), Tensor)}
                about = {"step": str(experience.step), "ppo_epoch": str(epoch)}
                save_batch(self.refused, experience.step, {name: tensor.numpy() for name, tensor in {**tensors, "rows": index}.items()}, about)
            if self.rank.world > 1:
                dist.barrier()
        if self.algorithm.non_finite == "stop":
            raise FloatingPointError(f"{what}; {saved}; set algorithm.non_finite=skip to go on, or begin again with a lower learning rate and another run=")
        if first and self.rank.index == 0:
            logger.warning("%s; %s", what, saved)


def _part(experience: Experience, index: Tensor, positions: list[int], device: torch.device) -> Experience:
    """The rows of a micro-batch on the device; without rows, one row that counts for nothing."""
    part = experience.rows(index[torch.tensor(positions or [0])])
    tensors: dict[str, Any] = {f.name: getattr(part, f.name) for f in fields(part) if isinstance(getattr(part, f.name), Tensor)}
    part = replace(part, **{name: tensor.to(device) for name, tensor in tensors.items()})
    return part if positions else replace(part, response_mask=torch.zeros_like(part.response_mask))
