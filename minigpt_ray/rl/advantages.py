"""Advantage estimators. Column t speaks about token t; tokens outside the mask are stepped over as if they were not there."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T+1"],
    mask: Bool[Tensor, "B T"],
    lengths: Int[Tensor, "B"],
    truncated: Bool[Tensor, "B"],
    discount: float,
    gae_lambda: float,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Generalized advantage estimation (arXiv:1506.02438): advantages, and returns = advantages + values; both 0 outside the mask.

    A_t = delta_t + discount * gae_lambda * A_next(t),  delta_t = r_t + discount * V_next(t) - V_t

    next(t) is the next token under the mask. After the last one, V is `values[b, lengths[b]]` for a truncated response,
    since it would have gone on, and 0 for a finished one.
    """
    bootstrap = torch.where(truncated, values.gather(1, lengths[:, None].long()).squeeze(1), 0)
    values = torch.where(mask, values[:, :-1], 0)
    delta = torch.where(mask, rewards + discount * _next_values(values, mask, bootstrap) - values, 0)
    # Outside the mask A_t = A_next(t): a factor of 1 and nothing added.
    factor = torch.where(mask, discount * gae_lambda, 1.0)
    advantages = torch.where(mask, reverse_linear_recurrence(factor, delta), 0)
    return advantages, advantages + values


ESTIMATORS = {"gae": gae}


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
