"""What a step learns from: rollouts, scored in chunks while the rest still generates."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from actors.generator import Generator
from actors.group import Pending
from minigpt_ray.config import PPOConfig
from minigpt_ray.data.prompts import PromptStream
from minigpt_ray.rl.experience import Rollout, RolloutBatch, Scores
from minigpt_ray.rl.filtering import with_signal
from minigpt_ray.tracking import Timer


class Collected(NamedTuple):
    """The rollouts of one step, as values and as tensors, their scores, and what it took to get them."""

    rollouts: list[Rollout]
    batch: RolloutBatch
    scores: Scores
    metrics: dict[str, float]


def collect(prompts: PromptStream, generator: Generator, score: Callable[[list[Rollout]], Pending[Scores]], config: PPOConfig, timer: Timer) -> Collected:
    """The scored rollouts of `prompts_per_step` prompts, ordered by prompt and sample.

    A chunk of `score_chunk` prompts is scored as soon as it is whole: when something is computed depends on timing, what
    is computed does not. Groups without signal are replaced by the next prompts' for up to algorithm.replacement_rounds
    rounds; after these the earliest of them fill the places that are left.
    """
    chunks: list[tuple[list[Rollout], Scores]] = []
    drawn, missing = 0, config.prompts_per_step
    for _ in range(1 + config.algorithm.replacement_rounds):
        with timer("rollout"):
            pending = [(chunk, score(chunk)) for chunk in generator.stream(prompts.next(missing), config.sampling, config.score_chunk)]
        with timer("score"):
            chunks += [(chunk, scores.result()) for chunk, scores in sorted(pending, key=lambda scored: scored[0][0].group)]
        drawn += missing
        rollouts, scores = [rollout for chunk, _ in chunks for rollout in chunk], Scores.join([part for _, part in chunks])
        signal = with_signal(scores.rewards.total, scores.rewards.failed, torch.tensor([r.group for r in rollouts]))[:: config.sampling.n]
        missing = config.prompts_per_step - int(signal.sum())
        if missing <= 0:
            break
    kept = (~signal).int().argsort(stable=True)[: config.prompts_per_step].sort().values
    index = (kept[:, None] * config.sampling.n + torch.arange(config.sampling.n)).flatten()
    rollouts = [rollouts[row] for row in index.tolist()]
    batch = RolloutBatch.of(rollouts)
    return Collected(rollouts, batch, scores.rows(index, batch.token_ids.shape[1]), {"groups/drawn": drawn, "groups/with_signal": int(signal.sum())})
