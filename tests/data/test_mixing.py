"""What a step reads depends on its number alone, sources come by their weights, and no window comes twice before all have."""

import numpy as np
import pytest

from minigpt_ray.config import MidtrainConfig
from minigpt_ray.data.mixing import Reading
from minigpt_ray.data.packing import windows_at

MIX = MidtrainConfig.model_validate({"mix": {"web": {"weight": 3}, "math": {"weight": 1, "final_weight": 9}}, "anneal_share": 0.5})


def reading(sizes: tuple[int, ...] = (70, 30), steps: int = 200, batch_size: int = 8) -> Reading:
    return Reading(sizes, MIX.shares, steps, batch_size, seed=3)


def test_one_source_is_read_as_without_a_mix() -> None:
    alone = Reading([11], MidtrainConfig().shares, 6, batch_size=8, seed=5)
    for step in range(6):
        assert alone.windows(step).tolist() == windows_at(8 * step + np.arange(8), 11, seed=5).tolist()


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    one = reading()
    course = [one.windows(step).tolist() for step in range(50)]
    assert reading().windows(40).tolist() == course[40]
    assert one.windows(7).tolist() == course[7]


def test_a_source_is_read_once_before_any_of_its_windows_comes_again() -> None:
    one = reading()
    read = np.concatenate([one.windows(step) for step in range(60)])
    for begin, end in ((0, 70), (70, 100)):
        own = read[(read >= begin) & (read < end)]
        whole = len(own) // (end - begin) * (end - begin)
        assert whole and np.unique(own[:whole], return_counts=True)[1].tolist() == [whole // (end - begin)] * (end - begin)


@pytest.mark.parametrize(("progress", "shares"), [(0.0, [0.75, 0.25]), (0.5, [0.75, 0.25]), (0.75, [0.5, 0.5]), (1.0, [0.25, 0.75])])
def test_shares_by_hand(progress: float, shares: list[float]) -> None:
    assert MIX.shares(progress) == pytest.approx(shares)


def test_sources_are_drawn_by_their_shares_over_the_run() -> None:
    one = reading(steps=4000)
    drawn = [np.concatenate([one.drawn(step) for step in range(a, b)]).mean() for a, b in ((0, 2000), (3900, 4000))]
    assert drawn == pytest.approx([0.25, 0.745], abs=0.03)


def test_a_mix_that_ends_in_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="mix: final_weight=0 for every source"):
        MidtrainConfig.model_validate({"mix": {"web": {"final_weight": 0}}})
