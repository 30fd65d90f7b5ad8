from dataclasses import replace
from typing import Literal

import pytest
import torch

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.experience import RewardScores, RolloutBatch, Scores, TrainingState
from minigpt_ray.rl.step import make_experience

NAN = float("nan")
STATE = TrainingState(step=4, prompts_drawn=20, epoch=1, num_tokens_generated=100, kl_coef=0.1, skipped_updates=0)
PLAIN = AlgorithmConfig(gae_lambda=1.0, whiten_advantages=False)

# Four rollouts with a prompt of one token: finished, truncated, without a score, dropped.
MASK = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
BATCH = RolloutBatch(
    token_ids=torch.arange(16, dtype=torch.int32).reshape(4, 4),
    prompt_lengths=torch.ones(4, dtype=torch.int32),
    lengths=torch.tensor([3, 4, 2, 4], dtype=torch.int32),
    response_mask=MASK,
    truncated=torch.tensor([False, True, False, False]),
    groups=torch.tensor([0, 0, 1, 1], dtype=torch.int32),
    generator_logprobs=torch.zeros(4, 4),
    weight_versions=torch.zeros(4, 4, dtype=torch.int32),
)
POLICY = torch.where(MASK, -1.0, NAN)
REFERENCE = torch.where(MASK, -3.0, NAN)
VALUES = torch.tensor([[NAN, 0.5, 1.0, NAN, NAN], [NAN, 0.0, 0.5, 1.0, 2.0], [NAN, 9.0, NAN, NAN, NAN], [NAN] * 5])
FAILED = torch.tensor([False, False, True, False])
SCORES = Scores(POLICY, REFERENCE, VALUES, RewardScores(torch.tensor([1.0, -1.0, NAN, NAN]), {}, FAILED))


@pytest.mark.parametrize(("truncated", "end"), [("score", -1.0), ("bootstrap", 2.0)])
def test_experience_by_hand(truncated: Literal["score", "bootstrap"], end: float) -> None:
    """Each token costs 0.1 * (3 - 1) = 0.2; the truncated response ends with its score -1, or with the value 2, never with both."""
    experience, _ = make_experience(BATCH, SCORES, PLAIN.model_copy(update={"truncated": truncated}), STATE)
    returns = torch.tensor([[0.0, 0.6, 0.8, 0.0], [0.0, end - 0.6, end - 0.4, end - 0.2], [0.0] * 4, [0.0] * 4])
    values = torch.tensor([[0.0, 0.5, 1.0, 0.0], [0.0, 0.0, 0.5, 1.0], [0.0] * 4, [0.0] * 4])
    assert torch.allclose(experience.returns, returns)
    assert torch.equal(experience.values, values)
    assert torch.allclose(experience.advantages, returns - values)
    assert torch.equal(experience.logprobs, torch.where(experience.response_mask, -1.0, 0.0))
    assert experience.token_ids is BATCH.token_ids and experience.lengths is BATCH.lengths


def test_a_rollout_without_a_score_does_not_count() -> None:
    experience, _ = make_experience(BATCH, SCORES, PLAIN, STATE)
    assert experience.response_mask.sum(1).tolist() == [2, 3, 0, 0]


def test_whitening_counts_only_tokens_that_are_learnt_from() -> None:
    plain, _ = make_experience(BATCH, SCORES, PLAIN, STATE)
    white, _ = make_experience(BATCH, SCORES, PLAIN.model_copy(update={"whiten_advantages": True}), STATE)
    counted = plain.advantages[plain.response_mask]
    assert torch.allclose(white.advantages[white.response_mask], (counted - counted.mean()) / counted.std(correction=0))
    assert torch.equal(white.returns, plain.returns)


def test_without_a_penalty_the_reference_changes_nothing() -> None:
    free = replace(STATE, kl_coef=0.0)
    ours, _ = make_experience(BATCH, SCORES, PLAIN, free)
    other, _ = make_experience(BATCH, replace(SCORES, reference_logprobs=REFERENCE * 2), PLAIN, free)
    assert torch.equal(ours.advantages, other.advantages)


@pytest.mark.parametrize(("estimator", "penalty"), [("k1", 2.0), ("k2", 2.0), ("k3", 1 + torch.exp(torch.tensor(-2.0)).item())])
def test_the_penalty_is_the_configured_estimator(estimator: str, penalty: float) -> None:
    experience, _ = make_experience(BATCH, SCORES, PLAIN.model_copy(update={"kl_estimator": estimator}), STATE)
    assert experience.returns[0, 2].item() == pytest.approx(1 - 0.1 * penalty)


def test_the_state_counts_the_step_and_every_generated_token_and_keeps_the_rest() -> None:
    experience, state = make_experience(BATCH, SCORES, PLAIN, STATE)
    assert state == replace(STATE, step=5, num_tokens_generated=106)
    assert experience.step == 4
