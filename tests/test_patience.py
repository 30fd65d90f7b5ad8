"""How long a loss has not fallen."""

import math

from minigpt_ray.patience import Patience


def after(*losses: float) -> Patience:
    patience = Patience()
    for step, loss in enumerate(losses, start=1):
        patience = patience.after(10 * step, loss)
    return patience


def test_it_counts_validations_since_the_lowest_loss() -> None:
    assert [after(*losses).since for losses in ([], [3.0], [3.0, 2.0], [3.0, 2.0, 2.0], [3.0, 2.0, 2.5, 2.1])] == [0, 0, 0, 1, 2]
    assert after(3.0, 2.0, 2.5, 1.9) == Patience(step=40, lowest=1.9, lowest_step=40, since=0)


def test_a_loss_that_is_no_number_is_not_the_lowest() -> None:
    assert after(2.0, math.nan, math.nan).since == 2 and after(math.nan).since == 1


def test_the_sentence_says_what_was_waited_for() -> None:
    assert "after step 30, since the validation loss has not fallen below its 2.0000 of step 10 in 2 validations" in after(2.0, 3.0, 2.0).sentence
