"""The arithmetic between scoring and learning: rewards, KL, advantages."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.advantages import ESTIMATORS, EstimatorInputs, whiten
from minigpt_ray.rl.experience import Experience, RewardScores, RolloutBatch, Scores, TrainingState
from minigpt_ray.rl.kl import KL_ESTIMATORS, k1, next_kl_coef
from minigpt_ray.rl.rewards import length_penalties, merge_moments, normalize, token_rewards


def make_experience(batch: RolloutBatch, scores: Scores, algorithm: AlgorithmConfig, state: TrainingState) -> tuple[Experience, TrainingState]:
    """What the learners train on, and the state after this step (its prompt cursor is the prompt stream's to move).

    A rollout without a score leaves the response mask: nothing is learnt from it, and no mean counts it.
    """
    mask = batch.response_mask & ~scores.rewards.failed[:, None]
    bootstrapped = batch.truncated & (algorithm.truncated == "bootstrap")
    state = see_rewards(state, scores.rewards, mask) if algorithm.normalize_rewards else state
    earned = torch.where(bootstrapped, 0, shaped(scores.rewards, algorithm, state))
    kl = KL_ESTIMATORS[algorithm.kl_estimator](scores.policy_logprobs, scores.reference_logprobs)
    rewards = token_rewards(earned, kl, state.kl_coef if algorithm.kl_in == "reward" else 0.0, mask)
    inputs = EstimatorInputs(
        rewards=rewards - length_penalties(mask, algorithm.length_free, algorithm.length_penalty),
        values=scores.values,
        mask=mask,
        lengths=batch.lengths,
        bootstrapped=bootstrapped,
        groups=batch.groups,
        discount=algorithm.discount,
        gae_lambda=algorithm.gae_lambda,
        divide_by_group_std=algorithm.divide_by_group_std,
    )
    advantages = ESTIMATORS[algorithm.estimator](inputs)
    values = torch.where(mask, scores.values[:, :-1], 0)
    experience = Experience(
        token_ids=batch.token_ids,
        lengths=batch.lengths,
        response_mask=mask,
        logprobs=torch.where(mask, scores.policy_logprobs, 0),
        reference_logprobs=torch.where(mask, scores.reference_logprobs, 0),
        values=values,
        advantages=whiten(advantages, mask) if algorithm.whitens else advantages,
        returns=advantages + values,
        kl_coef=state.kl_coef,
        step=state.step,
    )
    return experience, replace(
        state,
        step=state.step + 1,
        num_tokens_generated=state.num_tokens_generated + int(batch.response_mask.sum()),
        kl_coef=kl_coef_after(scores, mask, algorithm, state),
    )


def see_rewards(state: TrainingState, rewards: RewardScores, mask: Bool[Tensor, "B T"]) -> TrainingState:
    """The state after the running normalisation has seen the weighted sums of the rollouts that count."""
    count, mean, m2 = merge_moments(state.reward_count, state.reward_mean, state.reward_m2, rewards.total[mask.any(1)])
    return replace(state, reward_count=count, reward_mean=mean, reward_m2=m2)


def shaped(rewards: RewardScores, algorithm: AlgorithmConfig, state: TrainingState) -> Float[Tensor, "B"]:
    """The weighted sum, normalised, then clipped, as far as configured (arXiv:2307.04964)."""
    total = rewards.total
    if algorithm.normalize_rewards:
        total = normalize(total, state.reward_count, state.reward_mean, state.reward_m2)
    if algorithm.reward_clip is not None:
        total = total.clamp(-algorithm.reward_clip, algorithm.reward_clip)
    return total


def kl_coef_after(scores: Scores, mask: Bool[Tensor, "B T"], algorithm: AlgorithmConfig, state: TrainingState) -> float:
    """The coefficient of the next step: adapted to the mean k1 of this one, but not while only the critic learns."""
    if algorithm.kl_target is None or state.step < algorithm.critic_warmup_steps:
        return state.kl_coef
    kl = float(k1(scores.policy_logprobs, scores.reference_logprobs)[mask].double().mean())
    return next_kl_coef(state.kl_coef, kl, algorithm.kl_target, algorithm.kl_horizon)
