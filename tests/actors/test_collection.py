"""A step's rollouts come with their scores whatever the timing, and groups without signal are replaced, in bounds."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.collection import Collected, collect
from actors.generator import Generator
from actors.group import Pending
from actors.placement import Cluster
from minigpt_ray.config import GeneratorConfig, GeneratorPlacement, PlacementConfig, PPOConfig
from minigpt_ray.data.prompts import PromptStream
from minigpt_ray.rl.experience import Prompt, RewardScores, Rollout, RolloutBatch, Scores
from minigpt_ray.tracking import Timer

pytestmark = pytest.mark.ray

PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), np.arange(5, 8 + i % 4, dtype=np.int32), "source", None) for i in range(40)]


@pytest.fixture(scope="module")
def generator(ray_cluster: None, nano: Path) -> Iterator[Generator]:
    """Two workers."""
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2))
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        generator = Generator(cluster, str(nano), GeneratorConfig(backend="transformers", max_num_seqs=8), 64, 1, seed=3)
        generator.ready()
        generator.use_checkpoint()
        yield generator


def config(score_chunk: int, replacement_rounds: int = 0) -> PPOConfig:
    return PPOConfig.model_validate(
        {
            "prompts_per_step": 10,
            "score_chunk": score_chunk,
            "sampling": {"n": 2, "max_tokens": 6},
            "algorithm": {"mini_batch_size": 10, "replacement_rounds": replacement_rounds},
        }
    )


def score(rollouts: Sequence[Rollout]) -> Pending[Scores]:
    """The reward is 1 when the first token of the answer is even; logprobs are the generator's own."""
    batch = RolloutBatch.of(rollouts)
    rewards = torch.tensor([float(r.token_ids[0] % 2 == 0) for r in rollouts])
    values = torch.zeros(len(rollouts), batch.token_ids.shape[1] + 1)
    return Pending.done(Scores(batch.generator_logprobs, batch.generator_logprobs, values, RewardScores(rewards, {"even": rewards}, rewards < 0)))


def collected(generator: Generator, score_chunk: int, replacement_rounds: int = 0) -> tuple[Collected, PromptStream]:
    stream = PromptStream(PROMPTS, seed=1)
    return collect(stream, generator, score, config(score_chunk, replacement_rounds), Timer()), stream


@pytest.mark.parametrize("score_chunk", [1, 3, 64])
def test_rollouts_and_scores_are_in_the_order_of_prompts_however_they_are_cut(generator: Generator, score_chunk: int) -> None:
    (rollouts, batch, scores, metrics), stream = collected(generator, score_chunk)
    assert [(r.group, r.sample) for r in rollouts] == [(serial, sample) for serial in range(10) for sample in range(2)]
    assert torch.allclose(scores.policy_logprobs, batch.generator_logprobs, atol=1e-5)
    assert scores.rewards.total.tolist() == [float(r.token_ids[0] % 2 == 0) for r in rollouts]
    assert scores.values.shape == (20, batch.token_ids.shape[1] + 1)
    assert metrics["groups/drawn"] == stream.drawn == 10


def differs(rollouts: Sequence[Rollout]) -> list[bool]:
    even = [r.token_ids[0] % 2 == 0 for r in rollouts]
    return [a != b for a, b in zip(even[::2], even[1::2], strict=True)]


def test_groups_without_signal_are_replaced_by_the_next_prompts(generator: Generator) -> None:
    (before, _, _, metrics), _ = collected(generator, 4)
    assert 0 < sum(differs(before)) == metrics["groups/with_signal"] < 10
    (rollouts, batch, scores, metrics), stream = collected(generator, 4, replacement_rounds=20)
    assert all(differs(rollouts)) and len(batch) == 20
    assert metrics["groups/drawn"] == stream.drawn > 10
    groups = [r.group for r in rollouts[::2]]
    assert groups == sorted(set(groups)) and groups[: sum(differs(before))] == [r.group for r, d in zip(before[::2], differs(before), strict=True) if d]
    assert scores.rewards.total.tolist() == [float(r.token_ids[0] % 2 == 0) for r in rollouts]
    assert torch.allclose(scores.policy_logprobs, batch.generator_logprobs, atol=1e-5)


def test_when_rounds_are_used_up_the_earliest_groups_without_signal_fill_the_step(generator: Generator) -> None:
    (rollouts, batch, _, metrics), _ = collected(generator, 64, replacement_rounds=1)
    assert len(rollouts) == len(batch) == 20
    assert sum(differs(rollouts)) == min(10, metrics["groups/with_signal"])
