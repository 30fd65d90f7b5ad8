"""Scores from calls that may fail: a bounded number of attempts, all counted; then rollouts without a score, and not too many of them."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from minigpt_ray.config import LONGEST_WAIT_S, CalledReward
from minigpt_ray.rl.rollout import Rollout

logger = logging.getLogger(__name__)

Call = Callable[[list[Rollout]], list[float]]
"""One score per rollout, nan where there is none; raises Fault."""

LIMITS = {"errors": "max_errors", "timeouts": "max_outages", "lost": "max_outages"}
"""Kind of a failed call -> field of the source that says how many rollouts it may leave without a score."""
COUNTERS = (*LIMITS, "retries")
WINDOW = 100
"""Rollouts, the newest, of which a share is taken, or all that are scored in one go if they are more: chunks may be small."""


class RewardError(ValueError):
    """A reward source cannot be used, or leaves too many rollouts without a score: one sentence with the source, the reason and the remedy."""


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


class Tally:
    """Which of the newest rollouts a source left without a score, and why. For several threads."""

    def __init__(self, label: str, config: CalledReward, remedies: Mapping[str, str]) -> None:
        self.label, self.config, self.remedies = label, config, remedies
        self.too_many = ""
        """One sentence, once more rollouts than allowed are without a score."""
        self._newest: deque[str] = deque()
        self._window = WINDOW
        self._lock = threading.Lock()

    def begin(self, size: int) -> None:
        """`size` rollouts are about to be scored."""
        self._window = max(WINDOW, size)

    def scored(self) -> None:
        """A rollout has its score."""
        with self._lock:
            self._add("")

    def without(self, fault: Fault) -> None:
        """A rollout stays without one."""
        limit = LIMITS[fault.kind]
        share = getattr(self.config, limit)
        with self._lock:
            if not any(self._newest):
                logger.warning("%s: a rollout stays without a score: %s\n%s", self.label, fault.reason, fault.detail)
            self._add(limit)
            count = self._newest.count(limit)
            if count > share * self._window and not self.too_many:
                self.too_many = (
                    f"{self.label}: {count} of the newest {len(self._newest)} rollouts stay without a score, "
                    f"where {limit}={share:g} of {self._window} may; the last failure: {fault.reason}; {self.remedies[limit]}"
                )

    def _add(self, outcome: str) -> None:
        self._newest.append(outcome)
        while len(self._newest) > self._window:
            self._newest.popleft()


@dataclass(frozen=True)
class Source:
    """A reward source that is called."""

    tally: Tally
    call: Call
    retries: int
    batch_size: int | None
    """Rollouts of one call; None is all of them."""
    concurrency: int
    """Calls at a time; with one, calls are made in the thread of the caller."""
    backoff_s: float
    """Before the second attempt; doubles with each."""

    def score(self, rollouts: Sequence[Rollout]) -> Scored:
        """Scores of all valid rollouts; the others get none.

        A batch of b rollouts takes at most 1 + retries + b calls: those on the batch, and, when all of them failed, one
        on each of its rollouts. No call begins once too many of the newest rollouts are without a score.
        """
        return _Round(self, rollouts).result()


class _Round:
    """The attempts to score some rollouts."""

    def __init__(self, source: Source, rollouts: Sequence[Rollout]) -> None:
        self.source, self.rollouts = source, rollouts
        self.asked = [place for place, rollout in enumerate(rollouts) if rollout.valid]
        self.scores = [math.nan] * len(rollouts)
        self.calls: Counter[str] = Counter(dict.fromkeys(COUNTERS, 0))
        self.lock = threading.Lock()

    def result(self) -> Scored:
        self.source.tally.begin(len(self.asked))
        size = self.source.batch_size or max(1, len(self.asked))
        batches = [self.asked[start : start + size] for start in range(0, len(self.asked), size)]
        if self.source.concurrency == 1:
            for batch in batches:
                self._batch(batch)
        else:
            with ThreadPoolExecutor(self.source.concurrency) as threads:
                list(threads.map(self._batch, batches))
        return Scored(self.scores, dict(self.calls), self.source.tally.too_many)

    def _batch(self, places: list[int]) -> None:
        fault = self._attempts(places, 1 + self.source.retries)
        if fault is None:
            return
        if len(places) == 1:
            self.source.tally.without(fault)
            return
        for place in places:
            fault = self._attempts([place], 1, again=True)
            if fault is not None:
                self.source.tally.without(fault)

    def _attempts(self, places: list[int], times: int, again: bool = False) -> Fault | None:
        """None when there are scores, or there is no need of them any more; else why the last attempt failed."""
        last = None
        for attempt in range(times):
            if attempt:
                time.sleep(min(self.source.backoff_s * 2 ** (attempt - 1), LONGEST_WAIT_S))
            if self.source.tally.too_many:
                return None
            self._count("retries", int(again or attempt > 0))
            try:
                scores = self.source.call([self.rollouts[place] for place in places])
                if len(scores) != len(places):
                    raise Fault("errors", f"it gave {len(scores)} scores for {len(places)} rollouts; it must give one for each, in order")
            except Fault as fault:
                self._count(fault.kind, 1)
                if last is None and attempt + 1 < times:
                    logger.warning("%s: a call on %d rollouts failed (%s); it is repeated", self.source.tally.label, len(places), fault.reason)
                last = fault
                continue
            for place, score in zip(places, scores, strict=True):
                self.scores[place] = score
                self.source.tally.scored()
            return None
        return last

    def _count(self, name: str, number: int) -> None:
        with self.lock:
            self.calls[name] += number


def first_line(error: BaseException) -> str:
    """Type and first line of an exception, for a sentence."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
