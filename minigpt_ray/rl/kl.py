"""Per-token estimators of KL(p || q) from the logprobs of tokens that p drew (J. Schulman, "Approximating KL divergence", 2020).

As a reward, an estimator is a number. As a loss it is differentiated in log p, and then its mean over what p draws has another
gradient than its value suggests (arXiv:2506.09477): that of KL(p || q) for k2, that of KL(q || p) for k3, none for k1.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "B T"], other: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """log p - log q: unbiased, of either sign, of high variance."""
    return logprobs - other


def k2(logprobs: Float[Tensor, "B T"], other: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """(log p - log q)^2 / 2: never negative, of low variance; biased, by little where p and q are close."""
    return (logprobs - other).square() / 2


def k3(logprobs: Float[Tensor, "B T"], other: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """q / p - 1 - log(q / p): unbiased, never negative, of low variance where p and q are close."""
    difference = other - logprobs
    return torch.expm1(difference) - difference


KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


def next_kl_coef(kl_coef: float, kl: float, target: float, horizon: float) -> float:
    """The adaptive coefficient of arXiv:1909.08593: kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) / horizon).

    The paper's gain of 0.1 is a horizon of 10 steps. Without a token to measure it on, kl is nan and the coefficient stays.
    """
    return kl_coef if math.isnan(kl) else kl_coef * (1 + max(-0.2, min(0.2, kl / target - 1)) / horizon)
