"""Which groups of rollouts an estimator can learn from."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def with_signal(rewards: Float[Tensor, "B"], failed: Bool[Tensor, "B"], groups: Int[Tensor, "B"]) -> Bool[Tensor, "B"]:
    """True for the rollouts of groups in which two rewards differ (arXiv:2503.14476, section 3.2); rollouts without a score do not count.

    In the other groups every advantage that is measured against the group's own mean is 0.
    """
    _, member_of = groups.unique(return_inverse=True)
    size = int(member_of.max()) + 1
    highest = torch.full((size,), -torch.inf).scatter_reduce(0, member_of, torch.where(failed, -torch.inf, rewards), "amax")
    lowest = torch.full((size,), torch.inf).scatter_reduce(0, member_of, torch.where(failed, torch.inf, rewards), "amin")
    return (highest > lowest)[member_of]
