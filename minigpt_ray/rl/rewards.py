"""Rewards: several sources become one score of a response, and that, with the KL penalty, becomes rewards of tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minigpt_ray.rl.experience import RewardScores


def combine(by_source: dict[str, Float[Tensor, "B"]], weights: dict[str, float], failed: Bool[Tensor, "B"]) -> RewardScores:
    """total = sum of weight * score over the sources, 0 for a rollout that a source gave no score."""
    total = torch.stack([weights[name] * scores.float() for name, scores in by_source.items()]).sum(0)
    return RewardScores(torch.where(failed, 0, total), by_source, failed)


def token_rewards(scores: Float[Tensor, "B"], kl: Float[Tensor, "B T"], kl_coef: float, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-kl_coef * kl on every token under the mask, and the row's score on the last of them; 0 elsewhere."""
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, -kl_coef * kl, 0) + torch.where(is_last, scores[:, None], 0)
