import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt_ray.config import AlgorithmConfig
from minigpt_ray.losses import Loss, clipped_value_loss, language_model_loss, policy_loss, token_values
from minigpt_ray.rl.experience import Experience

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


def experience(old: Tensor, advantages: Tensor, counted: Tensor, reference: Tensor | None = None) -> Experience:
    size, width = counted.shape
    reference = torch.where(counted, old, 0) if reference is None else reference
    lengths = torch.full((size,), width, dtype=torch.int32)
    return Experience(counted.int(), lengths, counted, old, reference, old, advantages, advantages, kl_coef=0.1, step=0)


def minimised(logprobs: Tensor, old: Tensor, advantages: Tensor, counted: Tensor, num_tokens: int, reference: Tensor | None = None, **options: Any) -> Loss:
    """The policy's loss where every token has entropy 0.5."""
    entropy = torch.where(counted, torch.full_like(logprobs, 0.5), NAN)
    return policy_loss(logprobs, entropy, experience(old, advantages, counted, reference), num_tokens, AlgorithmConfig(**options))


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5 and 0.5 with advantages of both signs: the surrogate takes the smaller of the two products."""
    ratio = row(1.5, 1.5, 0.5, 0.5, 1.1)
    advantages = row(2.0, -2.0, 2.0, -2.0, 1.0)
    loss = minimised(ratio.log(), torch.zeros(1, 5), advantages, mask(1, 1, 1, 1, 1), 5)
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
    loss = minimised(logprobs, torch.zeros(4, 9), torch.randn(4, 9), counted, 36)
    loss.loss.backward()
    share = (logprobs.grad == 0).float().mean()
    assert loss.stats["clip_fraction_low"] + loss.stats["clip_fraction_high"] == pytest.approx(share.item())


def test_policy_gradient_before_the_first_update_is_that_of_advantage_times_logprob() -> None:
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    minimised(logprobs, logprobs.detach(), row(1.0, -2.0, 4.0), mask(1, 1, 0), 2).loss.backward()
    assert torch.equal(logprobs.grad, row(-0.5, 1.0, 0.0))


def test_entropy_bonus_lowers_the_loss_by_coefficient_times_entropy() -> None:
    arguments = (row(-1.0, -2.0), row(-1.0, -2.0), row(0.0, 0.0), mask(0, 1), 1)
    loss = minimised(*arguments, entropy_coef=0.1)
    assert loss.loss.item() == pytest.approx(-0.05)
    assert loss.stats["entropy"].item() == 0.5


def test_kl_statistic_is_unbiased() -> None:
    """Exact expectation over what the old policy draws: sum of p * k3 = KL(old || new)."""
    old, new = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.5, 0.3]])
    per_token = [minimised(new[:, i : i + 1].log(), old[:, i : i + 1].log(), row(0.0), mask(1), 1).stats["kl"] for i in range(3)]
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


# ----------------------------------------------------------------------------------------- options of the policy's


def test_each_clip_bound_is_its_own() -> None:
    """Ratios 1.5 and 0.5: up to 1.28 for the one, down to 0.9 for the other."""
    ratio, advantages = row(1.5, 1.25, 0.5, 0.95), row(1.0, 1.0, -1.0, -1.0)
    loss = minimised(ratio.log(), torch.zeros(1, 4), advantages, mask(1, 1, 1, 1), 4, clip_low=0.1, clip_high=0.28)
    assert loss.loss.item() == pytest.approx(-(1.28 + 1.25 - 0.9 - 0.95) / 4)
    assert loss.stats["clip_fraction_high"] == loss.stats["clip_fraction_low"] == 0.25


def test_dual_clip_by_hand() -> None:
    """Ratio 5 with A = -1 costs 3 and has no gradient, ratio 2 costs 2; the other clips and signs are as they were."""
    logprobs = row(5.0, 2.0, 0.5, 5.0).log().requires_grad_()
    loss = minimised(logprobs, torch.zeros(1, 4), row(-1.0, -1.0, -1.0, 1.0), mask(1, 1, 1, 1), 4, dual_clip=3.0)
    assert loss.loss.item() == pytest.approx((3 + 2 + 0.8 - 1.2) / 4)
    assert loss.stats["clip_fraction_dual"] == 0.25
    loss.loss.backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [[0.0, 0.5, 0.0, 0.0]]


def test_dual_clip_is_the_plain_clip_for_positive_advantages_and_ratios_below_it() -> None:
    torch.manual_seed(3)
    logprobs, advantages, counted = torch.randn(4, 9), torch.randn(4, 9), torch.ones(4, 9, dtype=torch.bool)
    for case in ((logprobs, advantages.abs()), (logprobs.clamp(max=1.0), advantages)):
        plain, dual = (minimised(case[0], torch.zeros(4, 9), case[1], counted, 36, **options) for options in ({}, {"dual_clip": 3.0}))
        assert plain.loss == dual.loss and dual.stats["clip_fraction_dual"] == 0
    assert "clip_fraction_dual" not in plain.stats


@pytest.mark.parametrize(("estimator", "kl", "slope"), [("k2", 2.0, 2.0), ("k3", 1 + math.exp(-2), 1 - math.exp(-2))])
def test_kl_in_the_loss_by_hand(estimator: str, kl: float, slope: float) -> None:
    """log p - log q = 2 on the one token that counts, advantage 0, coefficient 0.1."""
    logprobs = row(-1.0, -1.0).requires_grad_()
    arguments = (logprobs, logprobs.detach(), row(0.0, 0.0), mask(0, 1), 1, row(NAN, -3.0))
    loss = minimised(*arguments, kl_in="loss", kl_estimator=estimator)
    loss.loss.backward()
    assert loss.loss.item() == loss.stats["actor_loss"].item() == pytest.approx(0.1 * kl)
    assert loss.stats["kl_loss"].item() == pytest.approx(kl)
    assert logprobs.grad is not None and logprobs.grad[0].tolist() == pytest.approx([0.0, 0.1 * slope])


def test_kl_in_the_reward_leaves_the_loss_alone() -> None:
    logprobs = row(-1.0, -1.0)
    losses = [minimised(logprobs, logprobs, row(1.0, 2.0), mask(1, 1), 2, reference) for reference in (row(-3.0, -3.0), row(-9.0, NAN))]
    assert losses[0].loss == losses[1].loss == -1.5 and "kl_loss" not in losses[0].stats


# -------------------------------------------------------------------------------------------------- what they share

EVERYTHING = AlgorithmConfig(clip_high=0.3, dual_clip=1.5, entropy_coef=0.01, kl_in="loss", kl_estimator="k3")


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_garbage_in_masked_positions_changes_neither_value_nor_gradient(garbage: float) -> None:
    counted = mask(0, 1, 1, 0)
    for filler in (0.0, garbage):
        x = [torch.where(counted, row(0.0, -1.0, -0.5, 0.0), filler).requires_grad_() for _ in range(3)]
        y = [torch.where(counted, row(0.0, value, -value, 0.0), filler) for value in (1.0, 0.3, 0.4)]
        language = language_model_loss(x[0], counted, 2)
        taken = experience(y[0], y[1], counted, reference=y[2])
        policy = policy_loss(x[1], torch.where(counted, x[1].detach(), filler), taken, 2, EVERYTHING)
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
        policy = policy_loss(a[rows], c[rows], experience(b[rows], c[rows], m, reference=c[rows]), num_tokens, EVERYTHING)
        value = clipped_value_loss(a[rows], b[rows], c[rows], m, num_tokens, 0.2)
        return [language_model_loss(a[rows], m, num_tokens), policy.loss, *policy.stats.values(), value.loss, *value.stats.values()]

    whole = torch.stack(losses(slice(0, 6)))
    parts = sum(torch.stack(losses(rows)) for rows in (slice(0, 1), slice(1, 4), slice(4, 6)))
    assert torch.allclose(whole, parts, atol=1e-6)


def test_an_optimizer_step_without_tokens_has_loss_zero() -> None:
    nothing = row(1.0, 2.0)
    assert minimised(nothing, nothing, nothing, mask(0, 0), 0).loss == 0
    assert clipped_value_loss(nothing, nothing, nothing, mask(0, 0), 0, 0.2).loss == 0
