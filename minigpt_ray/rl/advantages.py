"""Advantage estimators. Column t speaks about token t; tokens outside the mask are stepped over as if they were not there.

Each takes EstimatorInputs, reads what it can use, and gives advantages that are 0 outside the mask. `gae` alone needs a critic.
The others judge a response by its rewards: a row outside the mask (dropped, or without a score) enters no baseline.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

STD_FLOOR = 1e-6
"""Added to the standard deviation of a group, so that rewards which differ by rounding alone are not blown up."""


@dataclass(frozen=True)
class EstimatorInputs:
    """What an estimator can use."""

    rewards: Float[Tensor, "B T"]
    """Of tokens: the score after the last one, and what each token costs."""
    values: Float[Tensor, "B T+1"]
    """The critic's, 0 without one; `values[b, lengths[b]]` is the estimate after the last token."""
    mask: Bool[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    bootstrapped: Bool[Tensor, "B"]
    """Rows whose last value stands for what would have come."""
    groups: Int[Tensor, "B"]
    """Rows with the same number answer the same prompt."""
    discount: float
    gae_lambda: float
    divide_by_group_std: bool


def gae(x: EstimatorInputs) -> Float[Tensor, "B T"]:
    """Generalized advantage estimation (arXiv:1506.02438).

    A_t = delta_t + discount * gae_lambda * A_next(t),  delta_t = r_t + discount * V_next(t) - V_t

    next(t) is the next token under the mask. After the last one, V is `values[b, lengths[b]]` for a bootstrapped response,
    since it would have gone on, and 0 for a finished one.
    """
    bootstrap = torch.where(x.bootstrapped, x.values.gather(1, x.lengths[:, None].long()).squeeze(1), 0)
    values = torch.where(x.mask, x.values[:, :-1], 0)
    delta = torch.where(x.mask, x.rewards + x.discount * _next_values(values, x.mask, bootstrap) - values, 0)
    # Outside the mask A_t = A_next(t): a factor of 1 and nothing added.
    factor = torch.where(x.mask, x.discount * x.gae_lambda, 1.0)
    return torch.where(x.mask, reverse_linear_recurrence(factor, delta), 0)


def rloo(x: EstimatorInputs) -> Float[Tensor, "B T"]:
    """REINFORCE leave-one-out (arXiv:2402.14740): the response's reward minus the mean of the others of its group.

    A_b = R_b - mean of R over the other counted rows of the group, R_b the sum of the row's token rewards, undiscounted; the
    same for each of its tokens, and 0 in a group with one counted row.
    """
    rewards, size = response_rewards(x), group_sizes(x)
    others = (size - 1).clamp(min=1)
    return _on_tokens((rewards - group_means(rewards, x)) * size / others, x.mask)


def grpo(x: EstimatorInputs) -> Float[Tensor, "B T"]:
    """Group-relative advantages (arXiv:2402.03300): the response's reward minus its group's mean, over its standard deviation.

    A_b = (R_b - mean) / (std + 1e-6), R_b the sum of the row's token rewards, undiscounted; the same for each of its tokens,
    and 0 in a group with one counted row. The variance is the sum of squares over (rows - 1). Without the division, which favours
    prompts that are nearly always or nearly never solved, these are the advantages of arXiv:2503.20783.
    """
    rewards, size = response_rewards(x), group_sizes(x)
    centered = rewards - group_means(rewards, x)
    if x.divide_by_group_std:
        variance = group_means(centered.square(), x) * size / (size - 1).clamp(min=1)
        centered = centered / (variance.sqrt() + STD_FLOOR)
    return _on_tokens(centered, x.mask)


def reinforce_plus_plus(x: EstimatorInputs) -> Float[Tensor, "B T"]:
    """Rewards to come (arXiv:2501.03262): A_t = r_t + discount * A_next(t). Whitening over the batch is the baseline."""
    returns = reverse_linear_recurrence(torch.where(x.mask, x.discount, 1.0), torch.where(x.mask, x.rewards, 0))
    return torch.where(x.mask, returns, 0)


ESTIMATORS: dict[str, Callable[[EstimatorInputs], Float[Tensor, "B T"]]] = {
    "gae": gae,
    "rloo": rloo,
    "grpo": grpo,
    "reinforce++": reinforce_plus_plus,
}


def response_rewards(x: EstimatorInputs) -> Float[Tensor, "B"]:
    """The sum of a row's token rewards, in float64."""
    return torch.where(x.mask, x.rewards, 0).double().sum(1)


def group_sizes(x: EstimatorInputs) -> Float[Tensor, "B"]:
    """How many rows of a row's group count."""
    return _group_sums(x.mask.any(1).double(), x)


def group_means(per_row: Float[Tensor, "B"], x: EstimatorInputs) -> Float[Tensor, "B"]:
    """The mean over the counted rows of a row's group, 0 where there is none."""
    return _group_sums(torch.where(x.mask.any(1), per_row, 0), x) / group_sizes(x).clamp(min=1)


def _group_sums(per_row: Float[Tensor, "B"], x: EstimatorInputs) -> Float[Tensor, "B"]:
    names, group = x.groups.unique(return_inverse=True)
    return per_row.new_zeros(len(names)).index_add(0, group, per_row)[group]


def _on_tokens(per_row: Float[Tensor, "B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return torch.where(mask, per_row[:, None].float(), 0)


def reverse_linear_recurrence(factor: Float[Tensor, "B T"], addend: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """x_t = addend_t + factor_t * x_{t+1}, x_T = 0, in log2(T) steps (Hillis and Steele, 1986).

    After the step with a given stride, (factor_t, addend_t) is the composition of 2 * stride maps from t on.
    """
    width = addend.shape[1]
    stride = 1
    while stride < width:
        head = slice(None, width - stride)
        addend = torch.cat([addend[:, head] + factor[:, head] * addend[:, stride:], addend[:, width - stride :]], dim=1)
        factor = torch.cat([factor[:, head] * factor[:, stride:], factor[:, width - stride :]], dim=1)
        stride *= 2
    return addend


def whiten(x: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Mean 0 and standard deviation 1 over the mask, 0 outside it."""
    x = torch.where(mask, x, 0)
    count = mask.sum().clamp(min=1)
    centered = torch.where(mask, x - x.sum() / count, 0)
    return centered / ((centered.square().sum() / count).sqrt() + 1e-8)


def _next_values(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], bootstrap: Float[Tensor, "B"]) -> Float[Tensor, "B T"]:
    """V of the next token under the mask, the bootstrap where there is none."""
    size, width = mask.shape
    position = torch.where(mask, torch.arange(width, device=mask.device), width)
    position = torch.cat([position[:, 1:], position.new_full((size, 1), width)], dim=1)
    following = position.flip(1).cummin(1).values.flip(1)
    return torch.cat([values, bootstrap[:, None]], dim=1).gather(1, following)
