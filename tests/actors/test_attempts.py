"""Calls that fail are repeated a bounded number of times; only guilty rollouts stay without a score, and not too many of them."""

import math
import threading
import time

import numpy as np
import pytest

from actors.attempts import Call, Fault, Source, Tally
from minigpt_ray.config import CalledReward
from minigpt_ray.rl.experience import Prompt, Rollout

REMEDIES = {"max_errors": "mend it", "max_outages": "start it"}


def rollouts(*texts: str) -> list[Rollout]:
    prompt = Prompt(0, ({"role": "user", "content": "?"},), np.zeros(1, np.int32), "test", None)
    none = np.zeros(0, np.int32)
    return [Rollout(prompt, 0, none, none.astype(bool), none.astype(np.float32), none, text, "stop") for text in texts]


def source(call: Call, batch_size: int | None = None, concurrency: int = 1, backoff_s: float = 0, **fields: float) -> Source:
    config = CalledReward(**fields)  # type: ignore[arg-type]
    return Source(Tally("rewards.mine", config, REMEDIES), call, config.retries, batch_size, concurrency, backoff_s)


class Recorder:
    """A call that scores lengths, fails where a text says how, and keeps what it was asked."""

    def __init__(self, *outcomes: str) -> None:
        """`outcomes` of the first calls: a kind of failure, or empty; later ones fail only for texts that are a kind."""
        self.outcomes, self.asked = list(outcomes), []

    def __call__(self, batch: list[Rollout]) -> list[float]:
        texts = [rollout.text for rollout in batch]
        self.asked.append(texts)
        planned = self.outcomes.pop(0) if self.outcomes else ""
        for kind in [planned, *texts]:
            if kind in ("errors", "timeouts", "lost"):
                raise Fault(kind, f"it {kind}")
        return [float(len(text)) for text in texts]


def test_a_call_that_fails_now_and_then_is_repeated_and_counted() -> None:
    call = Recorder("errors", "timeouts")
    found = source(call).score(rollouts("a", "bb"))
    assert found.scores == [1.0, 2.0] and found.too_many == ""
    assert call.asked == [["a", "bb"]] * 3
    assert found.calls == {"errors": 1, "timeouts": 1, "lost": 0, "retries": 2}


def test_after_the_retries_of_a_batch_only_the_guilty_rollouts_stay_without_a_score() -> None:
    call = Recorder()
    found = source(call, batch_size=3, retries=1, max_errors=0.25).score(rollouts("a", "errors", "ccc", "dd"))
    np.testing.assert_equal(found.scores, [1, math.nan, 3, 2])
    assert call.asked == [["a", "errors", "ccc"]] * 2 + [["a"], ["errors"], ["ccc"]] + [["dd"]]
    assert found.calls == {"errors": 3, "timeouts": 0, "lost": 0, "retries": 1 + 3}


@pytest.mark.parametrize(("size", "retries"), [(1, 0), (1, 3), (5, 0), (5, 2)])
def test_a_batch_takes_at_most_its_attempts_and_one_call_for_each_rollout(size: int, retries: int) -> None:
    call = Recorder()
    found = source(call, retries=retries, max_errors=1).score(rollouts(*["errors"] * size))
    assert all(map(math.isnan, found.scores)) and found.too_many == ""
    assert len(call.asked) == 1 + retries + (size if size > 1 else 0)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_no_call_begins_once_too_many_rollouts_are_without_a_score(concurrency: int) -> None:
    call = Recorder()
    found = source(call, batch_size=1, retries=0, max_errors=0.1, concurrency=concurrency).score(rollouts(*["errors"] * 120))
    assert found.too_many == (
        "rewards.mine: 13 of the newest 13 rollouts stay without a score, where max_errors=0.1 of 120 may; the last failure: it errors; mend it"
    )
    assert 13 <= len(call.asked) < 13 + concurrency


def test_errors_and_outages_have_budgets_of_their_own() -> None:
    asked = rollouts("errors", "lost", "timeouts", *"abcdefg")
    assert source(Recorder(), max_errors=0.01, max_outages=0.02).score(asked).too_many == ""
    assert (
        source(Recorder(), max_errors=0.01, max_outages=0.01).score(asked).too_many
    ) == "rewards.mine: 2 of the newest 3 rollouts stay without a score, where max_outages=0.01 of 100 may; the last failure: it timeouts; start it"
    assert "1 of the newest 1 rollouts stay without a score, where max_errors=0 of 100 may" in source(Recorder(), max_errors=0).score(asked).too_many


@pytest.mark.parametrize(("bad", "stops"), [(1, False), (2, True)])
def test_the_share_is_of_the_newest_rollouts_however_small_the_chunks_are(bad: int, stops: bool) -> None:
    """Of ten, one or two stay without a score: 10 % of the newest hundred is allowed, and the eleventh is too many."""
    chunked = source(Recorder(), batch_size=1, retries=0, max_errors=0.1)
    texts = ["errors"] * bad + ["a"] * (10 - bad)
    told = [chunked.score(rollouts(text)).too_many for text in texts * 30]
    assert bool(told[-1]) == stops
    if stops:
        assert sum(not sentence for sentence in told) == 50  # of the fifty-first rollout, eleven have failed


def test_nan_is_an_answer_and_no_failure() -> None:
    found = source(lambda batch: [math.nan] * len(batch), max_errors=0).score(rollouts("a", "b"))
    assert all(map(math.isnan, found.scores)) and found.too_many == "" and not any(found.calls.values())


def test_dropped_samples_are_not_asked_about() -> None:
    call = Recorder()
    kept, dropped = rollouts("a", "errors")
    object.__setattr__(dropped, "valid", False)
    np.testing.assert_equal(source(call).score([dropped, kept]).scores, [math.nan, 1])
    assert call.asked == [["a"]]


def test_as_many_scores_as_rollouts_are_needed() -> None:
    found = source(lambda batch: [0.0], max_errors=1).score(rollouts("a", "b"))
    assert found.scores == [0.0, 0.0] and found.calls["errors"] == 3  # one by one they are right


def test_batches_are_scored_side_by_side_and_stay_in_their_places() -> None:
    together = threading.Barrier(4, timeout=30)

    def call(batch: list[Rollout]) -> list[float]:
        together.wait()
        return [float(rollout.text) for rollout in batch]

    assert source(call, batch_size=2, concurrency=4).score(rollouts(*map(str, range(8)))).scores == list(range(8))


def test_the_wait_between_attempts_doubles() -> None:
    begin = time.monotonic()
    source(Recorder("lost", "lost"), backoff_s=0.1).score(rollouts("a"))
    assert 0.3 <= time.monotonic() - begin < 3
