import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_ray.losses import Loss, clipped_policy_loss, clipped_value_loss, language_model_loss, token_values

NAN, INF = float("nan"), float("inf")


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float32)


def mask(*bits: int) -> Tensor:
    return torch.tensor([bits], dtype=torch.bool)


# ------------------------------------------------------------------------------------------------------ the shift


def test_value_before_a_token_is_the_head_output_one_position_before() -> None:
    assert torch.equal(token_values(row(5.0, 6.0, 7.0)), row(0.0, 5.0, 6.0, 7.0))


# ----------------------------------------------------------------------------------------------------- the losses


def test_language_model_loss_is_the_mean_negative_logprob_of_the_counted_tokens() -> None:
    assert language_model_loss(row(-9.0, -1.0, -3.0), mask(0, 1, 1), 2).item() == 2.0


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, counted: Tensor, num_tokens: int, entropy_coef: float = 0.0) -> Loss:
    entropy = torch.where(counted, torch.full_like(logprobs, 0.5), NAN)
    return clipped_policy_loss(logprobs, old, advantages, counted, num_tokens, clip=0.2, entropy=entropy, entropy_coef=entropy_coef)


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5 and 0.5 with advantages of both signs: the surrogate takes the smaller of the two products."""
    ratio = row(1.5, 1.5, 0.5, 0.5, 1.1)
    advantages = row(2.0, -2.0, 2.0, -2.0, 1.0)
    loss = policy_loss(ratio.log(), torch.zeros(1, 5), advantages, mask(1, 1, 1, 1, 1), 5)
    assert loss.loss.item() == pytest.approx(-(1.2 * 2 - 1.5 * 2 + 0.5 * 2 - 0.8 * 2 + 1.1) / 5)
    assert loss.stats["actor_loss"] == loss.loss
    assert loss.stats["ratio_mean"].item() == pytest.approx(1.02)
    assert loss.stats["clip_fraction_high"].item() == pytest.approx(0.2)
    assert loss.stats["clip_fraction_low"].item() == pytest.approx(0.2)
    kl = sum(r - 1 - math.log(r) for r in ratio[0].tolist()) / 5
    assert loss.stats["kl"].item() == pytest.approx(kl, abs=1e-6)


def test_a_token_counts_as_clipped_exactly_where_its_gradient_is_zero() -> None:
    torch.manual_seed(1)
    logprobs = torch.randn(4, 9, requires_grad=True)
    counted = torch.ones(4, 9, dtype=torch.bool)
    loss = policy_loss(logprobs, torch.zeros(4, 9), torch.randn(4, 9), counted, 36)
    loss.loss.backward()
    share = (logprobs.grad == 0).float().mean()
    assert loss.stats["clip_fraction_low"] + loss.stats["clip_fraction_high"] == pytest.approx(share.item())


def test_policy_gradient_before_the_first_update_is_that_of_advantage_times_logprob() -> None:
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    policy_loss(logprobs, logprobs.detach(), row(1.0, -2.0, 4.0), mask(1, 1, 0), 2).loss.backward()
    assert torch.equal(logprobs.grad, row(-0.5, 1.0, 0.0))


def test_entropy_bonus_lowers_the_loss_by_coefficient_times_entropy() -> None:
    arguments = (row(-1.0, -2.0), row(-1.0, -2.0), row(0.0, 0.0), mask(0, 1), 1)
    loss = policy_loss(*arguments, entropy_coef=0.1)
    assert loss.loss.item() == pytest.approx(-0.05)
    assert loss.stats["entropy"].item() == 0.5


def test_kl_statistic_is_unbiased() -> None:
    """Exact expectation over what the old policy draws: sum of p * k3 = KL(old || new)."""
    old, new = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    per_token = [policy_loss(new[:, i : i + 1].log(), old[:, i : i + 1].log(), row(0.0), mask(1), 1).stats["kl"] for i in range(3)]
    expected = (old * (old / new).log()).sum()
    assert sum(p * k for p, k in zip(old[0], per_token, strict=True)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_value_loss_by_hand() -> None:
    """Old value 0, clip 0.2: an error grows inside the clip, and beyond it counts at the edge where that is the worse one."""
    values, returns = row(0.1, 0.5, 0.5, -0.5), row(1.0, 1.0, 0.0, 1.0)
    loss = clipped_value_loss(values, torch.zeros(1, 4), returns, mask(1, 1, 1, 1), 4, value_clip=0.2)
    assert loss.loss.item() == pytest.approx((0.9**2 + 0.8**2 + 0.5**2 + 1.5**2) / 8)
    assert loss.stats["value_clip_fraction"].item() == 0.25
    unclipped = clipped_value_loss(values, torch.zeros(1, 4), returns, mask(1, 1, 1, 1), 4, value_clip=None)
    assert unclipped.loss.item() == pytest.approx(F.mse_loss(values, returns).item() / 2)
    assert unclipped.stats["value_clip_fraction"] == 0


# -------------------------------------------------------------------------------------------------- what they share


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_masked_positions_changes_neither_value_nor_gradient(garbage: float) -> None:
    counted = mask(0, 1, 1, 0)
    for filler in (0.0, garbage):
        x = [torch.where(counted, row(0.0, -1.0, -0.5, 0.0), filler).requires_grad_() for _ in range(3)]
        y = [torch.where(counted, row(0.0, value, -value, 0.0), filler) for value in (1.0, 0.3, 0.4)]
        language = language_model_loss(x[0], counted, 2)
        policy = clipped_policy_loss(x[1], y[0], y[1], counted, 2, 0.2, torch.where(counted, x[1].detach(), filler), 0.01)
        value = clipped_value_loss(x[2], y[1], y[2], counted, 2, 0.2)
        (language + policy.loss + value.loss).backward()
        result = torch.stack([language, *policy.stats.values(), *value.stats.values()]), torch.stack([z.grad for z in x])
        if filler == 0.0:
            expected = result
    for ours, clean in zip(result, expected, strict=True):
        assert torch.isfinite(ours).all() and torch.equal(ours, clean)


def test_micro_batches_of_unequal_token_counts_add_up_to_the_large_batch() -> None:
    torch.manual_seed(2)
    a, b, c = (torch.randn(6, 8) for _ in range(3))
    counted = torch.rand(6, 8) < torch.tensor([0.1, 0.9, 0.5, 0.2, 0.0, 0.7])[:, None]
    num_tokens = int(counted.sum())

    def losses(rows: slice) -> list[Tensor]:
        m = counted[rows]
        policy = clipped_policy_loss(a[rows], b[rows], c[rows], m, num_tokens, 0.2, c[rows], 0.01)
        value = clipped_value_loss(a[rows], b[rows], c[rows], m, num_tokens, 0.2)
        return [language_model_loss(a[rows], m, num_tokens), policy.loss, *policy.stats.values(), value.loss, *value.stats.values()]

    whole = torch.stack(losses(slice(0, 6)))
    parts = sum(torch.stack(losses(rows)) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_an_optimizer_step_without_tokens_has_loss_zero() -> None:
    nothing = row(1.0, 2.0)
    assert policy_loss(nothing, nothing, nothing, mask(0, 0), 0).loss == 0
    assert clipped_value_loss(nothing, nothing, nothing, mask(0, 0), 0, 0.2).loss == 0
