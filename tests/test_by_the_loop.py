"""Losses, advantages and whitening against their definitions, one token after the other in plain Python, on masks with gaps."""

import math

import pytest
import torch
from torch import Tensor

from minigpt_ray.losses import Loss, clipped_policy_loss, clipped_value_loss
from minigpt_ray.rl.advantages import EstimatorInputs, gae, whiten

SEEDS = range(5)


def numbers(seed: int, count: int, size: int = 6, width: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, size, width, generator=generator))


def mask_with_gaps(seed: int, size: int = 6, width: int = 11) -> Tensor:
    """Tokens of prompt, tool and padding between those that count; the last row has none."""
    mask = torch.rand(size, width, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask[:, 0] = mask[-1] = False
    return mask


def policy_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, num_tokens: int, clip: float) -> Loss:
    found = clipped_policy_loss(logprobs, old, advantages, mask, num_tokens, clip, clip, None)
    return Loss(found.loss, {"actor_loss": found.loss.detach(), **found.stats})


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("discount", "gae_lambda"), [(1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (1.0, 1.0)])
def test_gae_on_random_masks(seed: int, discount: float, gae_lambda: float) -> None:
    rewards, values = numbers(seed, 2)
    values = torch.cat([values, torch.full((6, 1), 3.0)], dim=1)
    mask = mask_with_gaps(seed)
    truncated = torch.arange(6) % 2 == 0
    lengths = torch.tensor([max(mask[b].nonzero().flatten().tolist(), default=0) + 1 for b in range(6)])
    advantages = gae(EstimatorInputs(rewards, values, mask, lengths, truncated, torch.arange(6), discount, gae_lambda, True))
    returns = advantages + torch.where(mask, values[:, :-1], 0)
    for b in range(6):
        after = values[b, lengths[b]].item() if truncated[b] else 0.0
        advantage = 0.0
        for t in reversed(range(11)):
            if not mask[b, t]:
                assert advantages[b, t] == returns[b, t] == 0
                continue
            value = values[b, t].item()
            advantage = rewards[b, t].item() + discount * after - value + discount * gae_lambda * advantage
            after = value
            assert advantages[b, t].item() == pytest.approx(advantage, abs=1e-5)
            assert returns[b, t].item() == pytest.approx(advantage + value, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_whitening_on_random_masks(seed: int) -> None:
    x, mask = numbers(seed, 1)[0] * 5 - 2, mask_with_gaps(seed)
    counted = x[mask].tolist()
    mean = sum(counted) / len(counted)
    deviation = math.sqrt(sum((number - mean) ** 2 for number in counted) / len(counted))
    assert whiten(x, mask)[mask].tolist() == pytest.approx([(number - mean) / deviation for number in counted], abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "low", "high"),
    [  # the gradient is that of the loss with respect to the logprob: -ratio * A, or 0 where the clip holds
        (1.1, 2.0, -2.2, -2.2, 0, 0),  # inside
        (0.9, -2.0, 1.8, 1.8, 0, 0),
        (1.5, 2.0, -2.4, 0.0, 0, 1),  # too likely already
        (1.5, -2.0, 3.0, 3.0, 0, 0),  # too likely, and to be less so: the clip does not hold it
        (0.5, 2.0, -1.0, -1.0, 0, 0),  # too unlikely, and to be more likely
        (0.5, -2.0, 1.6, 0.0, 1, 0),  # too unlikely already
        (1.5, 0.0, 0.0, 0.0, 0, 0),
        (1.0, 3.0, -3.0, -3.0, 0, 0),  # before the first update
    ],
)
def test_the_clipped_policy_loss_of_one_token(ratio: float, advantage: float, loss: float, gradient: float, low: int, high: int) -> None:
    logprob = torch.tensor([[math.log(ratio) - 1]]).requires_grad_()
    found = policy_loss(logprob, torch.tensor([[-1.0]]), torch.tensor([[advantage]]), torch.tensor([[True]]), 1, clip=0.2)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, abs=1e-6)
    assert logprob.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert (found.stats["clip_fraction_low"], found.stats["clip_fraction_high"]) == (low, high)
    assert found.stats["kl"].item() == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize(
    ("value", "target", "loss", "gradient", "clipped"),
    [  # the old value is 1, the clip 0.5: edges 0.5 and 1.5; the gradient is value - return, or 0 where the clip holds
        (1.2, 2.0, 0.32, -0.8, 0),  # inside
        (1.2, 1.2, 0.0, 0.0, 0),
        (1.8, 2.0, 0.125, 0.0, 1),  # beyond the upper edge, nearer to the return than the edge is: it counts as if at 1.5
        (1.8, 1.0, 0.32, 0.8, 0),  # beyond it, and further from the return: pulled back
        (2.0, 1.6, 0.08, 0.4, 0),  # beyond it and beyond the return, further than the edge is
        (1.6, 1.58, 0.0032, 0.0, 1),  # beyond it and beyond the return, nearer than the edge is
        (0.2, 0.0, 0.125, 0.0, 1),  # the same below the lower edge
        (0.2, 1.0, 0.32, -0.8, 0),
    ],
)
def test_the_clipped_value_loss_of_one_token(value: float, target: float, loss: float, gradient: float, clipped: int) -> None:
    values = torch.tensor([[value]]).requires_grad_()
    found = clipped_value_loss(values, torch.tensor([[1.0]]), torch.tensor([[target]]), torch.tensor([[True]]), 1, 0.5)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(loss, abs=1e-6)
    assert values.grad.item() == pytest.approx(gradient, abs=1e-6)
    assert found.stats["value_clip_fraction"] == clipped


@pytest.mark.parametrize("seed", SEEDS)
def test_losses_and_statistics_on_random_masks(seed: int) -> None:
    old, noise, advantages, old_values, values, returns = numbers(seed, 6)
    logprobs, mask, num_tokens, clip = old + 0.4 * noise, mask_with_gaps(seed), 50, 0.2
    expected = dict.fromkeys(("actor_loss", "kl", "ratio_mean", "clip_fraction_low", "clip_fraction_high", "critic_loss", "value_clip_fraction"), 0.0)
    for b, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(logprobs[b, t].item() - old[b, t].item()), advantages[b, t].item()
        value, before, target = values[b, t].item(), old_values[b, t].item(), returns[b, t].item()
        error, at_edge = (value - target) ** 2, (before + min(clip, max(-clip, value - before)) - target) ** 2
        expected["actor_loss"] -= min(ratio * advantage, min(1 + clip, max(1 - clip, ratio)) * advantage) / num_tokens
        expected["kl"] += (ratio - 1 - math.log(ratio)) / num_tokens
        expected["ratio_mean"] += ratio / num_tokens
        expected["clip_fraction_low"] += (ratio < 1 - clip and advantage < 0) / num_tokens
        expected["clip_fraction_high"] += (ratio > 1 + clip and advantage > 0) / num_tokens
        expected["critic_loss"] += max(error, at_edge) / 2 / num_tokens
        expected["value_clip_fraction"] += (at_edge > error) / num_tokens
    stats = policy_loss(logprobs, old, advantages, mask, num_tokens, clip).stats | clipped_value_loss(values, old_values, returns, mask, num_tokens, clip).stats
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected, abs=1e-5)
    assert min(expected["clip_fraction_low"], expected["clip_fraction_high"], expected["value_clip_fraction"]) > 0


def test_a_value_inside_its_clip_never_counts_as_clipped() -> None:
    """However value - old rounds: old + (value - old) may be another number than value."""
    old, values, returns = numbers(0, 3, size=50, width=50)
    inside = (values - old).abs() < 0.9
    found = clipped_value_loss(values, old, returns, inside, int(inside.sum()), 1.0)
    assert inside.sum() > 1000 and found.stats["value_clip_fraction"] == 0
