import json
from dataclasses import asdict, replace
from typing import Any, Literal

import pytest
import torch

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.experience import RewardScores, RolloutBatch, Scores, TrainingState
from minigpt_ray.rl.step import make_experience

NAN = float("nan")
STATE = TrainingState(step=4, prompts_drawn=20, epoch=1, num_tokens_generated=100, kl_coef=0.1)
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


# ------------------------------------------------------------------------------------------------------ estimators

FREE = replace(STATE, kl_coef=0.0)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_group_is_judged_by_its_members_that_count(estimator: Literal["rloo", "grpo"]) -> None:
    """Rewards 1 and -1 in the first group; of the second none counts. The truncated response counts with its score."""
    experience, _ = make_experience(BATCH, SCORES, AlgorithmConfig(estimator=estimator, divide_by_group_std=False), FREE)
    size = {"rloo": 2.0, "grpo": 1.0}[estimator]
    assert experience.advantages.tolist() == [[0, size, size, 0], [0, -size, -size, -size], [0] * 4, [0] * 4]


def test_the_penalty_is_part_of_what_a_group_compares() -> None:
    """Two tokens cost 0.2 each, three as well: 1 - 0.4 against -1 - 0.6."""
    experience, _ = make_experience(BATCH, SCORES, AlgorithmConfig(estimator="rloo"), STATE)
    assert experience.advantages[0, 1].item() == pytest.approx(0.6 + 1.6)


def test_reinforce_plus_plus_is_whitened_and_groups_are_not_unless_asked() -> None:
    def advantages(**options: Any) -> torch.Tensor:
        experience, _ = make_experience(BATCH, SCORES, AlgorithmConfig(**options), FREE)
        return experience.advantages[experience.response_mask]

    assert advantages(estimator="reinforce++").tolist() == pytest.approx([1.5**0.5] * 2 + [-((2 / 3) ** 0.5)] * 3)
    assert advantages(estimator="reinforce++", whiten_advantages=False).tolist() == [1.0] * 2 + [-1.0] * 3
    assert advantages(estimator="rloo").tolist() == [2.0] * 2 + [-2.0] * 3
    assert advantages(estimator="rloo", whiten_advantages=True).mean().item() == pytest.approx(0, abs=1e-6)


# ------------------------------------------------------------------------------------------------- shaping rewards


def returns(state: TrainingState = FREE, **options: Any) -> tuple[list[float], TrainingState]:
    """What the first tokens of the two counted rollouts are worth: their rewards, 3 and -1 before they are shaped."""
    rewards = RewardScores(torch.tensor([3.0, -1.0, NAN, NAN]), {}, FAILED)
    experience, after = make_experience(BATCH, replace(SCORES, rewards=rewards), PLAIN.model_copy(update=options), state)
    return experience.returns[:2, 1].tolist(), after


def test_a_reward_is_clipped() -> None:
    assert returns()[0] == [3.0, -1.0]
    assert returns(reward_clip=2.0)[0] == [2.0, -1.0]
    assert returns(reward_clip=0.5)[0] == [0.5, -0.5]


def test_rewards_are_normalised_by_all_that_the_run_has_seen_and_clipped_after_it() -> None:
    """First 3 and -1: mean 1, deviation 2; with 3 and -1 again the same. After four zeros: mean 1/3, squared deviations 10 - 6/9."""
    first, state = returns(normalize_rewards=True)
    assert first == pytest.approx([1.0, -1.0])
    assert (state.reward_count, state.reward_mean, state.reward_m2) == (2, 1.0, 8.0)
    second, state = returns(state, normalize_rewards=True)
    assert second == pytest.approx([1.0, -1.0]) and state.reward_count == 4
    zeros = replace(FREE, reward_count=4)
    third, state = returns(zeros, normalize_rewards=True)
    assert state.reward_mean == pytest.approx(1 / 3) and state.reward_m2 == pytest.approx(10 - 6 / 9)
    assert third == pytest.approx([(3 - 1 / 3) / ((10 - 6 / 9) / 6) ** 0.5, (-1 - 1 / 3) / ((10 - 6 / 9) / 6) ** 0.5])
    assert returns(zeros, normalize_rewards=True, reward_clip=1.5)[0] == pytest.approx([1.5, third[1]])


def test_a_restored_state_normalises_and_adapts_as_if_there_had_been_no_stop() -> None:
    options = {"normalize_rewards": True, "kl_target": 0.5, "kl_horizon": 3.0}
    _, state = returns(STATE, **options)
    restored = TrainingState(**json.loads(json.dumps(asdict(state))))
    assert restored == state != STATE
    assert returns(restored, **options) == returns(state, **options)


def test_length_costs_after_normalisation_and_clip() -> None:
    """The responses have two and three tokens; the first is free."""
    assert returns(length_penalty=0.25, length_free=1)[0] == [2.75, -1.5]
    assert returns(length_penalty=0.25, length_free=1, reward_clip=0.5)[0] == [0.25, -1.0]


# ---------------------------------------------------------------------------------------------------------- the KL


def test_in_the_loss_the_penalty_leaves_the_rewards_and_goes_with_the_experience() -> None:
    loss, _ = make_experience(BATCH, SCORES, AlgorithmConfig(gae_lambda=1.0, kl_in="loss", kl_estimator="k2"), STATE)
    free, _ = make_experience(BATCH, SCORES, AlgorithmConfig(gae_lambda=1.0), FREE)
    assert torch.equal(loss.advantages, free.advantages)
    assert torch.equal(loss.reference_logprobs, torch.where(loss.response_mask, -3.0, 0.0)) and loss.kl_coef == STATE.kl_coef


def test_the_coefficient_is_adapted_after_the_step_to_the_k1_of_counted_tokens() -> None:
    """The KL is 2 on every counted token."""
    for target, factor in ((4.0, 0.98), (2.0, 1.0), (1.9, 1 + 0.1 * (2 / 1.9 - 1)), (0.5, 1.02)):
        experience, state = make_experience(BATCH, SCORES, PLAIN.model_copy(update={"kl_target": target}), STATE)
        assert experience.kl_coef == STATE.kl_coef and state.kl_coef == pytest.approx(STATE.kl_coef * factor)


def test_in_the_critics_warm_up_the_coefficient_stays() -> None:
    warming = PLAIN.model_copy(update={"kl_target": 4.0, "critic_warmup_steps": 5})
    assert make_experience(BATCH, SCORES, warming, STATE)[1].kl_coef == STATE.kl_coef
    assert make_experience(BATCH, SCORES, warming, replace(STATE, step=5))[1].kl_coef < STATE.kl_coef
