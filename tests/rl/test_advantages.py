import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minigpt_ray.rl.advantages import ESTIMATORS, EstimatorInputs, gae, grpo, reinforce_plus_plus, reverse_linear_recurrence, rloo, whiten

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


def inputs(**changes: object) -> EstimatorInputs:
    rewards, values = numbers()
    given: dict[str, object] = {"mask": MASKS, "lengths": LENGTHS, "bootstrapped": TRUNCATED, "groups": torch.tensor([5, 7, 5, 7])}
    settings = {"discount": 0.9, "gae_lambda": 0.95, "divide_by_group_std": True}
    return EstimatorInputs(**({"rewards": rewards, "values": values} | given | settings | changes))  # type: ignore[arg-type]


def groups(*rewards: list[float]) -> EstimatorInputs:
    """One response of two tokens per number, in groups; nan: a row that does not count."""
    flat = [reward for group in rewards for reward in group]
    number = torch.tensor([i for i, group in enumerate(rewards) for _ in group])
    mask = torch.tensor([[False, not math.isnan(reward), not math.isnan(reward)] for reward in flat])
    earned = torch.tensor([[math.nan, 0.25, reward - 0.25] for reward in flat])
    size = len(flat)
    lengths, finished = torch.full((size,), 3), torch.zeros(size, dtype=torch.bool)
    return EstimatorInputs(earned, torch.zeros(size, 4), mask, lengths, finished, number, discount=1.0, gae_lambda=0.95, divide_by_group_std=True)


def per_row(advantages: Tensor) -> list[float]:
    """The advantage of each response, which all of its tokens share."""
    assert not advantages[:, 0].any() and torch.equal(advantages[:, 1], advantages[:, 2])
    return advantages[:, 2].tolist()


# ------------------------------------------------------------------------------------------------------------ gae


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.95, 1.0])
def test_gae_equals_the_loop_over_tokens(discount: float, gae_lambda: float) -> None:
    rewards, values = numbers()
    advantages = gae(inputs(discount=discount, gae_lambda=gae_lambda))
    assert torch.allclose(advantages, naive_gae(rewards, values, TRUNCATED, discount, gae_lambda)[0], atol=1e-5)


def test_gae_by_hand() -> None:
    """Discount 0.5, lambda 0.5, finished: deltas 0.5 * 2 - 1 = 0, 1 + 0 - 2 = -1; advantages 0 + 0.25 * -1, -1."""
    mask = torch.tensor([[False, True, True]])
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    x = EstimatorInputs(rewards, values, mask, torch.tensor([3]), torch.tensor([False]), torch.tensor([0]), 0.5, 0.5, True)
    assert gae(x).tolist() == [[0.0, -0.25, -1.0]]


def test_gae_with_lambda_one_is_return_minus_value() -> None:
    rewards, values = numbers()
    advantages = gae(inputs(bootstrapped=torch.zeros(4, dtype=torch.bool), discount=1.0, gae_lambda=1.0))
    reward_to_go = torch.where(MASKS, rewards, 0).flip(1).cumsum(1).flip(1)
    assert torch.allclose(advantages, torch.where(MASKS, reward_to_go - values[:, :-1], 0), atol=1e-5)


def test_gae_with_lambda_zero_is_the_one_step_error() -> None:
    rewards, values = numbers()
    expected = rewards[0] + 0.9 * values[0, 1:] - values[0, :-1]
    assert torch.allclose(gae(inputs(gae_lambda=0.0))[0], torch.where(MASKS[0], expected, 0), atol=1e-6)


def test_a_truncated_response_bootstraps_from_the_value_after_its_last_token_and_a_finished_one_from_zero() -> None:
    _, values = numbers()
    truncated, finished = (gae(inputs(bootstrapped=torch.full((4,), there), gae_lambda=0.5)) for there in (True, False))
    assert torch.allclose((truncated - finished)[0, 8], 0.9 * values[0, 9], atol=1e-6)
    assert torch.allclose((truncated - finished)[1, 7], 0.9 * values[1, 8], atol=1e-6)


# --------------------------------------------------------------------------------------- without a critic, by hand


def test_rloo_by_hand() -> None:
    """Rewards 4, 1, 1: the others' means are 1, 2.5, 2.5. A second group does not matter to the first."""
    assert per_row(rloo(groups([4.0, 1.0, 1.0], [0.0, 1.0]))) == [3.0, -1.5, -1.5, -1.0, 1.0]


def test_grpo_by_hand() -> None:
    """Rewards 4, 1, 1: mean 2, variance (4 + 1 + 1) / 2 = 3. Rewards 0, 1: mean 0.5, variance 0.5."""
    expected = [2 / 3**0.5, -1 / 3**0.5, -1 / 3**0.5, -(0.5**0.5), 0.5**0.5]
    assert per_row(grpo(groups([4.0, 1.0, 1.0], [0.0, 1.0]))) == pytest.approx(expected, rel=1e-5)


def test_grpo_without_the_division_by_hand() -> None:
    assert per_row(grpo(replace(groups([4.0, 1.0, 1.0], [0.0, 1.0]), divide_by_group_std=False))) == [2.0, -1.0, -1.0, -0.5, 0.5]


def test_reinforce_plus_plus_by_hand() -> None:
    """Rewards 1, 2, 4 with a token of a tool before the last: 4, then 2 + 0.5 * 4, then 1 + 0.5 * 4."""
    mask = torch.tensor([[False, True, True, False, True]])
    rewards = torch.tensor([[9.0, 1.0, 2.0, 9.0, 4.0]])
    x = EstimatorInputs(rewards, torch.zeros(1, 6), mask, torch.tensor([5]), torch.tensor([False]), torch.tensor([0]), 0.5, 0.95, True)
    assert reinforce_plus_plus(x).tolist() == [[0.0, 3.0, 4.0, 0.0, 4.0]]


# ------------------------------------------------------------------------------------------------ what they share

GROUPED = (rloo, grpo)


@pytest.mark.parametrize("estimate", GROUPED)
def test_a_group_whose_responses_earn_the_same_has_no_advantage(estimate: Callable[[EstimatorInputs], Tensor]) -> None:
    assert not estimate(groups([0.1] * 3, [1.0] * 7, [0.3])).any()


@pytest.mark.parametrize("estimate", GROUPED)
def test_a_row_that_does_not_count_enters_no_baseline_and_one_alone_has_no_advantage(estimate: Callable[[EstimatorInputs], Tensor]) -> None:
    found = per_row(estimate(groups([4.0, math.nan, 1.0], [math.nan, 1.0], [math.nan, math.nan])))
    assert [found[0], found[2]] == per_row(estimate(groups([4.0, 1.0])))
    assert found[1] == 0 and found[3:] == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("estimate", GROUPED)
def test_groups_are_told_apart_by_their_number_and_not_by_their_place(estimate: Callable[[EstimatorInputs], Tensor]) -> None:
    x = groups([4.0, 1.0, 1.0], [0.0, 1.0])
    order = torch.tensor([3, 0, 4, 2, 1])
    moved = replace(x, rewards=x.rewards[order], groups=x.groups[order])
    assert torch.equal(estimate(moved), estimate(x)[order])


def test_grpo_without_the_division_is_rloo_times_all_but_one_over_all() -> None:
    x = groups([4.0, 1.0, -2.5, 0.5])
    assert torch.allclose(grpo(replace(x, divide_by_group_std=False)), rloo(x) * 3 / 4)


def test_grpo_does_not_see_scale_and_place_of_the_rewards() -> None:
    assert torch.allclose(grpo(groups([4.0, 1.0, 1.0])), grpo(groups([43.0, 13.0, 13.0])), atol=1e-5)


def test_reinforce_plus_plus_is_gae_with_lambda_one_and_values_of_zero() -> None:
    finished = torch.zeros(4, dtype=torch.bool)
    x = inputs(values=torch.zeros(4, 10), gae_lambda=1.0, bootstrapped=finished)
    assert torch.allclose(reinforce_plus_plus(x), gae(x), atol=1e-6)


def test_reinforce_plus_plus_without_discount_or_token_costs_is_the_score_whitened() -> None:
    score = torch.tensor([1.0, 0.0, 2.0, 0.0])
    mask = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)
    last = torch.tensor([2, 3, 1, 2])
    x = inputs(rewards=torch.nn.functional.one_hot(last, 4) * score[:, None], values=torch.zeros(4, 5), mask=mask, discount=1.0)
    assert torch.allclose(whiten(reinforce_plus_plus(x), mask), whiten(torch.where(mask, score[:, None], 0), mask))


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_garbage_outside_the_mask_changes_nothing(name: str, garbage: float) -> None:
    x = inputs(gae_lambda=0.5)
    bootstrap = torch.nn.functional.one_hot(LENGTHS, 10).bool() & TRUNCATED[:, None] & MASKS.any(1, keepdim=True)
    kept = torch.cat([MASKS, torch.zeros(4, 1, dtype=torch.bool)], dim=1) | bootstrap
    dirty = replace(x, rewards=torch.where(MASKS, x.rewards, garbage), values=torch.where(kept, x.values, garbage))
    assert torch.equal(ESTIMATORS[name](dirty), ESTIMATORS[name](x))


def test_deleting_columns_outside_the_mask_changes_nothing() -> None:
    rewards, values = numbers()
    columns = [3, 4, 7]
    short = {"rewards": rewards[1:2, columns], "values": values[1:2, [*columns, 8]], "mask": torch.ones(1, 3, dtype=torch.bool)}
    cut = gae(inputs(**short, lengths=torch.tensor([3]), bootstrapped=TRUNCATED[1:2], groups=torch.tensor([0])))
    assert torch.allclose(cut, gae(inputs())[1:2, columns], atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_more_padding_changes_nothing(name: str) -> None:
    x, pad = inputs(), torch.zeros(4, 7)
    wide = replace(x, rewards=torch.cat([x.rewards, pad], 1), values=torch.cat([x.values, pad], 1), mask=torch.cat([MASKS, pad.bool()], 1))
    found = ESTIMATORS[name](wide)
    assert torch.allclose(found[:, :9], ESTIMATORS[name](x), atol=1e-6) and not found[:, 9:].any()


@pytest.mark.parametrize("name", [name for name in ESTIMATORS if name != "gae"])
def test_only_gae_reads_values(name: str) -> None:
    assert torch.equal(ESTIMATORS[name](inputs()), ESTIMATORS[name](inputs(values=torch.full((4, 10), math.nan))))


# -------------------------------------------------------------------------------------------- scan and whitening


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
