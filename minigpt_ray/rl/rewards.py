"""Rewards: several sources become one score of a response; that, normalised, clipped, and with what tokens cost, becomes rewards of tokens."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from minigpt_ray.rl.experience import RewardScores


def combine(by_source: dict[str, Float[Tensor, "B"]], weights: dict[str, float], failed: Bool[Tensor, "B"]) -> RewardScores:
    """total = sum of weight * score over the sources, 0 for a rollout that a source gave no score."""
    total = torch.stack([weights[name] * scores.float() for name, scores in by_source.items()]).sum(0)
    return RewardScores(torch.where(failed, 0, total), by_source, failed)


def merge_moments(count: int, mean: float, m2: float, x: Float[Tensor, "N"]) -> tuple[int, float, float]:
    """Count, mean and sum of squared deviations after N more numbers (Chan, Golub and LeVeque, 1979): of all as of one set."""
    if not len(x):
        return count, mean, m2
    x = x.double()
    total, delta = count + len(x), float(x.mean()) - mean
    return total, mean + delta * len(x) / total, m2 + float((x - x.mean()).square().sum()) + delta**2 * count * len(x) / total


def normalize(x: Float[Tensor, "B"], count: int, mean: float, m2: float) -> Float[Tensor, "B"]:
    """(x - mean) / standard deviation, from the moments of `merge_moments`."""
    return (x - mean) / (math.sqrt(m2 / max(count, 1)) + 1e-8)


def length_penalties(mask: Bool[Tensor, "B T"], length_free: int, length_penalty: float) -> Float[Tensor, "B T"]:
    """length_penalty on every token under the mask after the first length_free of its row.

    With length_free = longest - buffer and length_penalty = 1 / buffer a row pays the soft overlong punishment of arXiv:2503.14476, eq. 13.
    """
    return torch.where(mask & (mask.cumsum(1) > length_free), length_penalty, 0.0)


def token_rewards(scores: Float[Tensor, "B"], kl: Float[Tensor, "B T"], kl_coef: float, mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """-kl_coef * kl on every token under the mask, and the row's score on the last of them; 0 elsewhere."""
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, -kl_coef * kl, 0) + torch.where(is_last, scores[:, None], 0)
