import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt_ray.rl.experience import Experience, Prompt, RewardScores, Rollout, RolloutBatch, Scores
from minigpt_ray.rl.metrics import explained_variance, rollout_metrics, score_metrics, value_metrics


def rollout(serial: int, source: str, versions: list[int], finish_reason: str = "stop", valid: bool = True, tool_tokens: int = 0) -> Rollout:
    """A prompt of two tokens and a response of len(versions) + tool_tokens, each model token with logprob -1."""
    size = len(versions) + tool_tokens
    prompt = Prompt(serial, ({"role": "user", "content": "?"},), np.array([1, 2], np.int32), source, None)
    return Rollout(
        prompt=prompt,
        sample=0,
        token_ids=np.arange(size, dtype=np.int32),
        model_mask=np.arange(size) >= tool_tokens,
        logprobs=np.full(size, -1, np.float32),
        weight_versions=np.array([0] * tool_tokens + versions, np.int32),
        text="",
        finish_reason=finish_reason,
        valid=valid,
    )


ROLLOUTS = [
    rollout(0, "sums", [7, 7, 6]),
    rollout(1, "sums", [7], "length"),
    rollout(2, "words", [7, 7], tool_tokens=3),
    rollout(3, "words", [0, 0, 0, 0], "length", valid=False),
]
BATCH = RolloutBatch.of(ROLLOUTS)
POLICY = BATCH.generator_logprobs + torch.tensor([[0.1], [-0.2], [0.0], [9.0]])
REFERENCE = POLICY - torch.tensor([[0.3], [-0.3], [0.6], [9.0]])
TOTAL = torch.tensor([1.0, 0.0, 0.5, 9.0])
NONE_FAILED = torch.zeros(4, dtype=torch.bool)
SCORES = Scores(POLICY, REFERENCE, torch.zeros(4, 8), RewardScores(TOTAL, {"verifier": 2 * TOTAL}, NONE_FAILED))


def experience(mask: torch.Tensor) -> Experience:
    """Column t has value t and return 2 t, wherever."""
    column = torch.arange(7).expand(4, 7).float()
    logprobs, reference = torch.where(mask, POLICY, 0), torch.where(mask, REFERENCE, 0)
    values = {"values": column, "advantages": column - 4, "returns": 2 * column}
    return Experience(BATCH.token_ids, BATCH.lengths, mask, logprobs, reference, **values, kl_coef=0.05, step=0)


EXPERIENCE = experience(BATCH.response_mask)


def test_response_lengths_are_those_of_valid_rollouts_in_tokens_that_the_model_wrote() -> None:
    """Lengths 3, 1, 2; the tool's three tokens and the dropped rollout's four do not count."""
    metrics = rollout_metrics(ROLLOUTS, version=7)
    assert metrics["train/avg_response_len"] == 2.0
    assert metrics["response/length_p50"] == 2.0
    assert metrics["response/length_p95"] == pytest.approx(2.9)
    assert metrics["response/length_max"] == 3.0
    assert metrics["response/truncated_fraction"] == pytest.approx(1 / 3)
    assert (metrics["rollouts/valid"], metrics["rollouts/dropped"]) == (3.0, 1.0)


def test_staleness_is_publications_behind_the_newest_per_response_token() -> None:
    metrics = rollout_metrics(ROLLOUTS, version=8)
    assert metrics["staleness/mean"] == pytest.approx((5 * 1 + 2) / 6)
    assert metrics["staleness/max"] == 2.0


def test_reward_is_the_mean_total_of_counted_rollouts_before_the_kl_penalty() -> None:
    metrics = score_metrics(ROLLOUTS, BATCH, SCORES, EXPERIENCE)
    assert metrics["train/reward"] == 0.5
    assert metrics["reward/std"] == pytest.approx(math.sqrt(0.5 / 3))
    assert metrics["reward/verifier"] == 1.0
    assert metrics["reward_by_source/sums"] == 0.5
    assert metrics["reward_by_source/words"] == 0.5
    assert metrics["reward/failed"] == 0.0


def test_a_rollout_without_a_score_leaves_every_mean() -> None:
    failed = torch.tensor([True, False, False, False])
    scores = replace(SCORES, rewards=RewardScores(TOTAL, {"verifier": torch.where(failed, float("nan"), TOTAL)}, failed))
    metrics = score_metrics(ROLLOUTS, BATCH, scores, experience(BATCH.response_mask & ~failed[:, None]))
    assert (metrics["train/reward"], metrics["reward/verifier"], metrics["reward/failed"]) == (0.25, 0.25, 1.0)
    assert metrics["reward_by_source/sums"] == 0.0
    assert metrics["train/kl_ref"] == pytest.approx((-0.3 + 2 * 0.6) / 3, abs=1e-6)


def test_kl_to_the_reference_is_a_mean_over_tokens_and_not_of_means() -> None:
    metrics = score_metrics(ROLLOUTS, BATCH, SCORES, EXPERIENCE)
    assert metrics["train/kl_ref"] == pytest.approx((3 * 0.3 - 0.3 + 2 * 0.6) / 6, abs=1e-6)


def test_logprob_gap_is_the_absolute_difference_of_generator_and_learner() -> None:
    metrics = score_metrics(ROLLOUTS, BATCH, SCORES, EXPERIENCE)
    assert metrics["generator/logprob_gap_mean"] == pytest.approx((3 * 0.1 + 0.2) / 6, abs=1e-6)
    assert metrics["generator/logprob_gap_max"] == pytest.approx(0.2, abs=1e-6)


def test_advantages_returns_and_values_are_summarised_over_response_tokens() -> None:
    """Response columns 2, 3, 4 of row 0, column 2 of row 1, columns 5, 6 of row 2."""
    metrics = score_metrics(ROLLOUTS, BATCH, SCORES, EXPERIENCE) | value_metrics(EXPERIENCE)
    columns = np.array([2, 3, 4, 2, 5, 6])
    assert metrics["critic/values_mean"] == pytest.approx(columns.mean())
    assert metrics["critic/returns_mean"] == pytest.approx(2 * columns.mean())
    assert metrics["advantages/mean"] == pytest.approx(columns.mean() - 4)
    assert metrics["advantages/std"] == pytest.approx(columns.std())
    assert metrics["critic/explained_variance"] == pytest.approx(0.75)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 5.0), returns) == pytest.approx(0.0)
    assert explained_variance(-returns, returns) == pytest.approx(-3.0)
    assert math.isnan(explained_variance(returns, torch.ones(3)))


def test_a_step_without_a_counted_rollout_has_nan_where_there_is_nothing_to_count() -> None:
    dropped = [replace(r, valid=False) for r in ROLLOUTS]
    metrics = rollout_metrics(dropped, version=7) | score_metrics(dropped, BATCH, SCORES, experience(torch.zeros_like(BATCH.response_mask)))
    assert metrics["rollouts/dropped"] == 4.0
    assert all(math.isnan(metrics[name]) for name in ("train/avg_response_len", "train/reward", "train/kl_ref", "staleness/max", "generator/logprob_gap_max"))


def test_every_metric_of_a_step_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    names = {*rollout_metrics(ROLLOUTS, version=7), *score_metrics(ROLLOUTS, BATCH, SCORES, EXPERIENCE), *value_metrics(EXPERIENCE)}
    names -= {"reward/verifier", "reward_by_source/sums", "reward_by_source/words"}  # `reward/<name>`, `reward_by_source/<source>`
    assert not [name for name in names if f"| `{name}` |" not in text]
