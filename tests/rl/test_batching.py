"""Which rollouts are computed together: every row once, within the budget, the same number of batches on every rank."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from minigpt_ray.rl.batching import micro_batches, mini_batches

LENGTHS = np.random.default_rng(0).integers(5, 90, 37).tolist()


def rows(seed: int, step: int, epoch: int) -> list[list[int]]:
    return [batch.tolist() for batch in mini_batches(37, 8, seed, step, epoch)]


@pytest.mark.parametrize("size", [1, 8, 37, 64])
def test_mini_batches_cover_every_row_once(size: int) -> None:
    batches = list(mini_batches(size, 8, seed=0, step=0, epoch=0))
    assert sorted(np.concatenate(batches).tolist()) == list(range(size))
    assert [len(b) for b in batches[:-1]] == [8] * ((size - 1) // 8)


def test_mini_batches_are_a_function_of_seed_step_and_epoch() -> None:
    assert rows(1, 2, 3) == rows(1, 2, 3)
    assert len({str(rows(*key)) for key in [(1, 2, 3), (0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (1, 3, 2)]}) == 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 100, 300, 10**6])
def test_the_plan_covers_all_rows_within_the_budget_in_equally_many_batches_on_every_rank(budget: int, ranks: int) -> None:
    plan = micro_batches(LENGTHS, budget, ranks)
    assert sorted(row for batches in plan for batch in batches for row in batch) == list(range(len(LENGTHS)))
    assert len({len(batches) for batches in plan}) == 1
    for batch in (batch for batches in plan for batch in batches if batch):
        assert len(batch) == 1 or len(batch) * max(LENGTHS[row] for row in batch) <= budget


def test_a_larger_budget_makes_fewer_batches_and_the_largest_makes_one() -> None:
    counts = [len(micro_batches(LENGTHS, budget, 2)[0]) for budget in (1, 100, 300, 10**6)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == 1


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_ranks_get_equal_shares_of_tokens_up_to_one_row(ranks: int) -> None:
    plan = micro_batches(LENGTHS, 200, ranks)
    tokens = [sum(LENGTHS[row] for batch in batches for row in batch) for batches in plan]
    assert max(tokens) - min(tokens) <= max(LENGTHS)
    assert max(tokens) - min(tokens) <= 0.1 * np.mean(tokens)


def test_a_plan_by_hand() -> None:
    """Longest first to the rank with the fewest tokens: 9 | 7, then 6 to the second, 3 to the first; padding 3 to 9 costs 6, a pass 0.5."""
    assert micro_batches([3, 9, 7, 7], budget=16, ranks=2) == [[[1], [0]], [[2, 3], []]]


@pytest.mark.parametrize("budget", [64, 200, 640, 6400])
def test_no_other_cut_of_the_sorted_rows_costs_less(budget: int) -> None:
    """Padded tokens and a 32nd of the budget for each batch, against every cut of nine rows."""

    def cost(batches: list[list[int]]) -> float:
        return sum(len(batch) * max(LENGTHS[row] for row in batch) + budget / 32 for batch in batches)

    order = sorted(range(9), key=lambda row: -LENGTHS[row])
    cuts = [[0, *inner, 9] for count in range(9) for inner in combinations(range(1, 9), count)]
    plans = [[order[a:b] for a, b in pairwise(cut)] for cut in cuts]
    allowed = [plan for plan in plans if all(len(b) == 1 or len(b) * LENGTHS[b[0]] <= budget for b in plan)]
    ((*found,),) = micro_batches(LENGTHS[:9], budget, 1)
    assert cost(found) == pytest.approx(min(map(cost, allowed)))


def test_rows_of_very_different_lengths_are_hardly_padded() -> None:
    """Lengths with a heavy tail: a tenth more than the tokens themselves, where one budget alone would give three quarters more."""
    lengths = np.clip(np.rint(np.random.default_rng(0).gamma(2.0, 25.0, 64)), 6, 124).astype(int).tolist()
    (batches,) = micro_batches(lengths, 2048, 1)
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert padded < 1.12 * sum(lengths) and len(batches) < 12


def test_more_ranks_than_rows_leave_empty_batches() -> None:
    assert micro_batches([5], budget=10, ranks=3) == [[[0]], [[]], [[]]]
