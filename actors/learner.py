"""What the policy and the critic learner share: PPO epochs and mini-batches."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.engine import Engine, Stats
from actors.group import Rank
from minigpt_ray.checkpoint import batch_path, save_batch
from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.batching import micro_batches, mini_batches
from minigpt_ray.rl.experience import Experience

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Learnt:
    """What the PPO epochs of one step came to."""

    stats: dict[str, float]
    """Token means over the mini-batches of the last epoch; nan when all of them were refused."""
    grad_norm: float
    """Mean over those mini-batches, before clipping."""
    lr: float
    """Of the last optimizer step."""
    skipped: int
    """Updates refused because a loss or gradient was not finite."""


def learn(
    engine: Engine,
    rank: Rank,
    experience: Experience,
    algorithm: AlgorithmConfig,
    budget: int,
    seed: int,
    refused: Path,
    loss: Callable[[nn.Module, Experience, int], tuple[Tensor, Stats]],
) -> Learnt:
    """PPO epochs and mini-batches. Mini-batches are chosen globally; only then are their rows dealt out to ranks.

    Raises FloatingPointError when an update is refused and `non_finite` is `stop`; nothing has been changed by it. The
    first mini-batch of a step that is refused is saved in the directory `refused`.
    """
    sums: dict[str, float] = {}
    tokens = skipped = 0
    grad_norms: list[float] = []
    lr = 0.0
    for epoch in range(algorithm.ppo_epochs):
        for rows in mini_batches(len(experience), algorithm.mini_batch_size, seed, experience.step, epoch):
            index = torch.from_numpy(rows)
            num_tokens = max(1, int(experience.response_mask[index].sum()))
            plan = micro_batches(experience.lengths[index].tolist(), budget, rank.world)[rank.index]
            parts = [_part(experience, index, positions, engine.device) for positions in plan]
            update = engine.update(parts, lambda model, part: loss(model, part, num_tokens))  # noqa: B023
            lr = update.lr
            if not update.applied:
                skipped += 1
                what = f"step {experience.step}, PPO epoch {epoch}: a loss or gradient is not finite and no update was applied"
                saved = f"the mini-batch is in {batch_path(refused, experience.step)}"
                if skipped == 1:
                    _save(refused, rank, experience, index, {"step": str(experience.step), "ppo_epoch": str(epoch)})
                if algorithm.non_finite == "stop":
                    raise FloatingPointError(f"{what}; {saved}; lower the learning rate, or set algorithm.non_finite=skip to go on")
                if skipped == 1 and rank.index == 0:
                    logger.warning("%s; %s", what, saved)
            counts = update.applied and epoch == algorithm.ppo_epochs - 1
            if counts:
                grad_norms.append(update.grad_norm)
                tokens += num_tokens
            for name, value in update.stats.items():
                sums[name] = sums.get(name, 0.0) + (value * num_tokens if counts else 0.0)
    if not grad_norms:
        return Learnt(dict.fromkeys(sums, math.nan), math.nan, lr, skipped)
    return Learnt({name: value / tokens for name, value in sums.items()}, sum(grad_norms) / len(grad_norms), lr, skipped)


def _save(refused: Path, rank: Rank, experience: Experience, index: Tensor, about: dict[str, str]) -> None:
    """Rank 0 saves the rows of a mini-batch; the others wait, since the first error that reaches the driver ends all of them."""
    if rank.index == 0:
        rows = experience.rows(index)
        tensors = {f.name: getattr(rows, f.name) for f in fields(rows) if isinstance(getattr(rows, f.name), Tensor)}
        save_batch(refused, experience.step, {name: tensor.numpy() for name, tensor in {**tensors, "rows": index}.items()}, about)
    if rank.world > 1:
        dist.barrier()


def _part(experience: Experience, index: Tensor, positions: list[int], device: torch.device) -> Experience:
    """The rows of a micro-batch on the device; without rows, one row that counts for nothing."""
    part = experience.rows(index[torch.tensor(positions or [0])])
    tensors: dict[str, Any] = {f.name: getattr(part, f.name) for f in fields(part) if isinstance(getattr(part, f.name), Tensor)}
    part = replace(part, **{name: tensor.to(device) for name, tensor in tensors.items()})
    return part if positions else replace(part, response_mask=torch.zeros_like(part.response_mask))
