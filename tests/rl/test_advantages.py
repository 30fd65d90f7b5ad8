import pytest
import torch
from torch import Tensor

from minigpt_ray.rl.advantages import gae, reverse_linear_recurrence, whiten

# Prompt tokens, then a response with tool output in its middle, then padding.
MASKS = torch.tensor(
    [
        [0, 0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 0, 0, 1, 0],
        [0, 1, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
LENGTHS = torch.tensor([9, 8, 2, 5])
TRUNCATED = torch.tensor([True, True, False, True])


def numbers(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 9, generator=generator), torch.randn(4, 10, generator=generator)


def naive_gae(rewards: Tensor, values: Tensor, truncated: Tensor, discount: float, gae_lambda: float) -> tuple[Tensor, Tensor]:
    """The definition as a loop over MASKS, from the last token to the first."""
    advantages, returns = torch.zeros(4, 9), torch.zeros(4, 9)
    for b in range(4):
        following = values[b, LENGTHS[b]] if truncated[b] else torch.tensor(0.0)
        advantage = torch.tensor(0.0)
        for t in reversed(MASKS[b].nonzero().flatten().tolist()):
            advantage = rewards[b, t] + discount * following - values[b, t] + discount * gae_lambda * advantage
            following = values[b, t]
            advantages[b, t], returns[b, t] = advantage, advantage + values[b, t]
    return advantages, returns


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_the_loop_over_tokens(discount: float, gae_lambda: float) -> None:
    rewards, values = numbers()
    for ours, expected in zip(
        gae(rewards, values, MASKS, LENGTHS, TRUNCATED, discount, gae_lambda), naive_gae(rewards, values, TRUNCATED, discount, gae_lambda), strict=True
    ):
        assert torch.allclose(ours, expected, atol=1e-5)


def test_gae_by_hand() -> None:
    """Discount 0.5, lambda 0.5, finished: deltas 0.5 * 2 - 1 = 0, 1 + 0 - 2 = -1; advantages 0 + 0.25 * -1, -1."""
    mask = torch.tensor([[False, True, True]])
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    advantages, returns = gae(rewards, values, mask, torch.tensor([3]), torch.tensor([False]), 0.5, 0.5)
    assert advantages.tolist() == [[0.0, -0.25, -1.0]]
    assert returns.tolist() == [[0.0, 0.75, 1.0]]


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    rewards, values = numbers()
    finished = torch.zeros(4, dtype=torch.bool)
    advantages, returns = gae(rewards, values, MASKS, LENGTHS, finished, 1.0, 1.0)
    reward_to_go = torch.where(MASKS, rewards, 0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, torch.where(MASKS, reward_to_go, 0), atol=1e-5)
    assert torch.allclose(advantages, torch.where(MASKS, reward_to_go - values[:, :-1], 0), atol=1e-5)


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    rewards, values = numbers()
    advantages, _ = gae(rewards, values, MASKS, LENGTHS, TRUNCATED, 0.9, 0.0)
    expected = rewards[0] + 0.9 * values[0, 1:] - values[0, :-1]
    assert torch.allclose(advantages[0], torch.where(MASKS[0], expected, 0), atol=1e-6)


def test_a_truncated_response_bootstraps_from_the_value_after_its_last_token_and_a_finished_one_from_zero() -> None:
    rewards, values = numbers()
    truncated, _ = gae(rewards, values, MASKS, LENGTHS, torch.ones(4, dtype=torch.bool), 0.9, 0.5)
    finished, _ = gae(rewards, values, MASKS, LENGTHS, torch.zeros(4, dtype=torch.bool), 0.9, 0.5)
    assert torch.allclose((truncated - finished)[0, 8], 0.9 * values[0, 9], atol=1e-6)
    assert torch.allclose((truncated - finished)[1, 7], 0.9 * values[1, 8], atol=1e-6)


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_garbage_outside_the_mask_changes_nothing(garbage: float) -> None:
    rewards, values = numbers()
    expected = gae(rewards, values, MASKS, LENGTHS, TRUNCATED, 0.9, 0.5)
    bootstrap = torch.nn.functional.one_hot(LENGTHS, 10).bool() & TRUNCATED[:, None] & MASKS.any(1, keepdim=True)
    kept = torch.cat([MASKS, torch.zeros(4, 1, dtype=torch.bool)], dim=1) | bootstrap
    dirty = gae(torch.where(MASKS, rewards, garbage), torch.where(kept, values, garbage), MASKS, LENGTHS, TRUNCATED, 0.9, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(dirty, expected, strict=True))


def test_deleting_columns_outside_the_mask_changes_nothing() -> None:
    rewards, values = numbers()
    expected = gae(rewards, values, MASKS, LENGTHS, TRUNCATED, 0.9, 0.95)
    columns = [3, 4, 7]
    cut_values = values[1:2, [*columns, 8]]
    ones = torch.ones(1, 3, dtype=torch.bool)
    cut = gae(rewards[1:2, columns], cut_values, ones, torch.tensor([3]), TRUNCATED[1:2], 0.9, 0.95)
    assert all(torch.allclose(a, b[1:2, columns], atol=1e-6) for a, b in zip(cut, expected, strict=True))


def test_more_padding_changes_nothing() -> None:
    rewards, values = numbers()
    expected = gae(rewards, values, MASKS, LENGTHS, TRUNCATED, 0.9, 0.95)
    pad = torch.zeros(4, 7)
    wide = gae(torch.cat([rewards, pad], 1), torch.cat([values, pad], 1), torch.cat([MASKS, pad.bool()], 1), LENGTHS, TRUNCATED, 0.9, 0.95)
    assert all(torch.allclose(a[:, :9], b, atol=1e-6) and not a[:, 9:].any() for a, b in zip(wide, expected, strict=True))


@pytest.mark.parametrize("width", [1, 2, 3, 8, 13])
def test_the_scan_equals_the_recurrence(width: int) -> None:
    torch.manual_seed(width)
    factor, addend = torch.rand(2, width), torch.randn(2, width)
    x, expected = torch.zeros(2), []
    for t in reversed(range(width)):
        x = addend[:, t] + factor[:, t] * x
        expected.insert(0, x)
    assert torch.allclose(reverse_linear_recurrence(factor, addend), torch.stack(expected, 1), atol=1e-6)


def test_whitened_numbers_have_mean_zero_and_deviation_one_over_the_mask() -> None:
    x = torch.where(MASKS, numbers()[0] * 7 + 3, float("nan"))
    white = whiten(x, MASKS)
    assert white[MASKS].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[MASKS].std(correction=0).item() == pytest.approx(1, abs=1e-5)
    assert not white[~MASKS].any()


def test_whitening_equal_numbers_or_none_gives_zeros() -> None:
    assert not whiten(torch.full((4, 9), 2.5), MASKS).any()
    assert not whiten(torch.full((4, 9), float("inf")), torch.zeros_like(MASKS)).any()
