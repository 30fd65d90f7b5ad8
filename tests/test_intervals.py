"""Intervals against known tables and their own meaning; pass@k against counting."""

from itertools import combinations

import numpy as np
import pytest

from minigpt_ray.intervals import mean, pass_at_k, proportion, wins


def test_wilsons_interval_has_the_published_values() -> None:
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for successes, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        estimate = proportion(successes, n)
        assert (estimate.value, estimate.low, estimate.high) == pytest.approx((successes / n, low, high), abs=6e-5)


def test_wilsons_interval_turns_with_the_question() -> None:
    right, wrong = proportion(7, 20), proportion(13, 20)
    assert (right.low, right.high) == pytest.approx((1 - wrong.high, 1 - wrong.low))


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval_and_seeded() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    estimate = mean(values, seed=1)
    half = 1.96 * values.std() / 20
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), abs=0.03)
    assert mean(values, seed=1) == estimate != mean(values, seed=2)


def test_a_constant_has_no_width() -> None:
    estimate = mean(np.full(9, 0.5), seed=0)
    assert estimate.value == estimate.low == estimate.high == 0.5


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n, correct in ((5, 0), (5, 2), (6, 5), (4, 4)):
        for k in range(1, n + 1):
            subsets = list(combinations([True] * correct + [False] * (n - correct), k))
            assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_more_than_was_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="pass@5 needs at least 5 samples, found 4"):
        pass_at_k(4, 2, 5)


def test_a_tie_is_half_a_win() -> None:
    assert wins(np.array([1.0, 0.0, 2.0]), np.array([0.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
