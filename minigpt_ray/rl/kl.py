"""Per-token estimators of KL(p || q) from the logprobs of tokens that p drew (J. Schulman, "Approximating KL divergence", 2020)."""

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
