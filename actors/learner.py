"""What the policy and the critic learner share: PPO epochs and mini-batches."""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from actors.engine import Engine, Stats, Update, never
from actors.group import Rank
from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.batching import micro_batches, mini_batches
from minigpt_ray.rl.experience import Experience


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


def learn(
    engine: Engine,
    rank: Rank,
    experience: Experience,
    algorithm: AlgorithmConfig,
    budget: int,
    seed: int,
    loss: Callable[[nn.Module, Experience, int], tuple[Tensor, Stats]],
    stop: Callable[[dict[str, float]], bool] = never,
) -> Learnt:
    """PPO epochs and mini-batches. Mini-batches are chosen globally; only then are their rows dealt out to ranks.

    `stop` sees the token means of a mini-batch over all ranks; when it says so, that update and those after it are not made.
    Raises FloatingPointError when an update is refused and `non_finite` is `stop`; nothing has been changed by it.
    """
    applied: list[tuple[int, int, Update]] = []  # epoch, tokens, what was done
    skipped, update = 0, None
    chosen = partial(mini_batches, len(experience), algorithm.mini_batch_size, seed, experience.step)
    for epoch, rows in [(i, rows) for i in range(algorithm.ppo_epochs) for rows in chosen(i)]:
        index = torch.from_numpy(rows)
        num_tokens = max(1, int(experience.response_mask[index].sum()))
        plan = micro_batches(experience.lengths[index].tolist(), budget, rank.world)[rank.index]
        parts = [_part(experience, index, positions, engine.device) for positions in plan]
        update = engine.update(parts, lambda model, part: loss(model, part, num_tokens), stop)  # noqa: B023
        if update.stopped:
            break
        if update.applied:
            applied.append((epoch, num_tokens, update))
        else:
            skipped += 1
            if algorithm.non_finite == "stop":
                raise FloatingPointError(
                    f"step {experience.step}, PPO epoch {epoch}: a loss or gradient is not finite and no update was applied; lower the learning rate, or set algorithm.non_finite=skip to go on"
                )
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


def _part(experience: Experience, index: Tensor, positions: list[int], device: torch.device) -> Experience:
    """The rows of a micro-batch on the device; without rows, one row that counts for nothing."""
    part = experience.rows(index[torch.tensor(positions or [0])])
    tensors: dict[str, Any] = {f.name: getattr(part, f.name) for f in fields(part) if isinstance(getattr(part, f.name), Tensor)}
    part = replace(part, **{name: tensor.to(device) for name, tensor in tensors.items()})
    return part if positions else replace(part, response_mask=torch.zeros_like(part.response_mask))
