"""Scores from calls that may fail: a bounded number of attempts, all counted; then rollouts without a score, and not too many of them."""

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from minigpt_ray.config import CalledReward
from minigpt_ray.rl.experience import Rollout

logger = logging.getLogger(__name__)

Call = Callable[[list[Rollout]], list[float]]
"""One score per rollout, nan where there is none; raises Fault."""

LIMITS = {"errors": "max_errors", "timeouts": "max_outages", "lost": "max_outages"}
"""Kind of a failed call -> field of the source that says how many rollouts it may leave without a score."""
COUNTERS = (*LIMITS, "retries")
LONGEST_WAIT_S = 30.0
"""Between two attempts, however many there were."""


class Fault(Exception):
    """A call that gave no scores.

    `errors`: what was asked raised an error or answered nonsense. `timeouts`: no answer in time. `lost`: the process or
    the server is gone.
    """

    def __init__(self, kind: str, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.kind, self.reason, self.detail = kind, reason, detail
        """`detail` is for the log: a traceback."""


@dataclass(frozen=True)
class Scored:
    """What became of the rollouts that a source was asked about."""

    scores: list[float]
    """nan where there is none."""
    calls: Mapping[str, int]
    """COUNTERS of the calls."""
    too_many: str
    """One sentence when more rollouts than allowed stayed without a score, else empty."""


@dataclass(frozen=True)
class Source:
    """A reward source that is called."""

    label: str
    """What sentences call it."""
    config: CalledReward
    call: Call
    remedies: Mapping[str, str]
    """For max_errors and max_outages: what a user can do."""
    batch_size: int | None
    """Rollouts of one call; None is all of them."""
    concurrency: int
    """Calls at a time; with one, calls are made in the thread of the caller."""
    backoff_s: float
    """Before the second attempt; doubles with each."""

    def score(self, rollouts: Sequence[Rollout]) -> Scored:
        """Scores of all valid rollouts; the others get none.

        A batch of b rollouts takes at most 1 + retries + b calls: those on the batch, and, when all of them failed, one
        on each of its rollouts. No call begins once too many rollouts are without a score.
        """
        return _Round(self, rollouts).result()


class _Round:
    """The attempts to score some rollouts."""

    def __init__(self, source: Source, rollouts: Sequence[Rollout]) -> None:
        self.source, self.rollouts = source, rollouts
        self.asked = [place for place, rollout in enumerate(rollouts) if rollout.valid]
        self.scores = [math.nan] * len(rollouts)
        self.calls: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.without: Counter[str] = Counter()
        self.too_many = ""
        self.lock = threading.Lock()

    def result(self) -> Scored:
        size = self.source.batch_size or max(1, len(self.asked))
        batches = [self.asked[start : start + size] for start in range(0, len(self.asked), size)]
        if self.source.concurrency == 1:
            for batch in batches:
                self._batch(batch)
        else:
            with ThreadPoolExecutor(self.source.concurrency) as threads:
                list(threads.map(self._batch, batches))
        return Scored(self.scores, dict(self.calls), self.too_many)

    def _batch(self, places: list[int]) -> None:
        fault = self._attempts(places, 1 + self.source.config.retries)
        if fault is None:
            return
        if len(places) == 1:
            self._leave(fault)
            return
        for place in places:
            fault = self._attempts([place], 1, again=True)
            if fault is not None:
                self._leave(fault)

    def _attempts(self, places: list[int], times: int, again: bool = False) -> Fault | None:
        """None when there are scores, or there is no need of them any more; else why the last attempt failed."""
        last = None
        for attempt in range(times):
            if attempt:
                time.sleep(min(self.source.backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S))
            if self.too_many:
                return None
            self._count("retries", int(again or attempt > 0))
            try:
                scores = self.source.call([self.rollouts[place] for place in places])
                if len(scores) != len(places):
                    raise Fault("errors", f"it gave {len(scores)} scores for {len(places)} rollouts; it must give one for each, in order")
            except Fault as fault:
                self._count(fault.kind, 1)
                last = fault
                continue
            for place, score in zip(places, scores, strict=True):
                self.scores[place] = score
            return None
        return last

    def _count(self, name: str, number: int) -> None:
        with self.lock:
            self.calls[name] += number

    def _leave(self, fault: Fault) -> None:
        """A rollout stays without a score."""
        limit = LIMITS[fault.kind]
        share = getattr(self.source.config, limit)
        with self.lock:
            self.without[limit] += 1
            if self.without.total() == 1:
                logger.warning("%s: a rollout stays without a score: %s\n%s", self.source.label, fault.reason, fault.detail)
            if self.without[limit] > share * len(self.asked) and not self.too_many:
                self.too_many = (
                    f"{self.source.label}: {self.without[limit]} of {len(self.asked)} rollouts stay without a score, more than {limit}={share:g} allows; "
                    f"the last failure: {fault.reason}; {self.source.remedies[limit]}"
                )


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
