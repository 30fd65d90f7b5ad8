"""The arithmetic between scoring and learning: rewards, KL penalty, advantages."""

from dataclasses import replace

import torch

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.rl.advantages import ESTIMATORS, whiten
from minigpt_ray.rl.experience import Experience, RolloutBatch, Scores, TrainingState
from minigpt_ray.rl.kl import KL_ESTIMATORS
from minigpt_ray.rl.rewards import token_rewards


def make_experience(batch: RolloutBatch, scores: Scores, algorithm: AlgorithmConfig, state: TrainingState) -> tuple[Experience, TrainingState]:
    """What the learners train on, and the state after this step (its prompt cursor is the prompt stream's to move).

    A rollout without a score leaves the response mask: nothing is learnt from it, and no mean counts it.
    """
    mask = batch.response_mask & ~scores.rewards.failed[:, None]
    kl = KL_ESTIMATORS[algorithm.kl_estimator](scores.policy_logprobs, scores.reference_logprobs)
    bootstrapped = batch.truncated & (algorithm.truncated == "bootstrap")
    rewards = token_rewards(torch.where(bootstrapped, 0, scores.rewards.total), kl, state.kl_coef, mask)
    estimate = ESTIMATORS[algorithm.estimator]
    advantages, returns = estimate(rewards, scores.values, mask, batch.lengths, bootstrapped, algorithm.discount, algorithm.gae_lambda)
    experience = Experience(
        token_ids=batch.token_ids,
        lengths=batch.lengths,
        response_mask=mask,
        logprobs=torch.where(mask, scores.policy_logprobs, 0),
        values=torch.where(mask, scores.values[:, :-1], 0),
        advantages=whiten(advantages, mask) if algorithm.whiten_advantages else advantages,
        returns=returns,
        step=state.step,
    )
    num_tokens = state.num_tokens_generated + int(batch.response_mask.sum())
    return experience, replace(state, step=state.step + 1, num_tokens_generated=num_tokens)
