"""Who answers which prompts: all are handed out at once and evenly, the longest first, then moved when a worker has nothing left to do.

Nothing here knows a process. A worker is a number, a prompt its position; the samples of a prompt stay together, so that
its tokens are read once. Whoever answers, the answer is the same, which is why a prompt may be moved, or given to two.
"""

import math
from collections import Counter, deque
from collections.abc import Collection, Sequence
from typing import NamedTuple

SLOW = 2.0
"""A worker is slow when it takes so many times as long for what it holds as another took for its own."""
SLOW_SECONDS = 5.0
"""And at least so long: in less than this a second attempt gains nothing."""
SUSPECT_DEATHS = 2
"""Workers that died with a prompt, before it is a suspect."""
NARROWER = 8
"""Suspects are answered together in groups that are so many times smaller than the one that died last, so few deaths find the guilty one."""
MEMORY = 0.9
"""Weight of what was known of a source beside its next response."""


class Lengths:
    """How long a response is expected to be: as the newest ones to prompts of the same source were."""

    def __init__(self) -> None:
        self._mean: dict[str, float] = {}
        """Source -> tokens, an exponential mean."""

    def see(self, source: str, tokens: int) -> None:
        """A response to a prompt of a source had so many tokens."""
        self._mean[source] = MEMORY * self._mean.get(source, tokens) + (1 - MEMORY) * tokens

    def longest_first(self, prompts: Sequence[tuple[str, int]], chunk: int) -> list[int]:
        """Positions of prompts, each a source and its own tokens: chunk by chunk, in a chunk the longest response first, which one of an unknown source may be; of equals the longest prompt."""
        expected = [(-self._mean.get(source, math.inf), -tokens) for source, tokens in prompts]
        return sorted(range(len(prompts)), key=lambda position: (position // chunk, expected[position]))


class Death(NamedTuple):
    """What the death of a worker tells about the prompts that it had."""

    fatal: int | None
    """The position of the prompt of which it died, which is not open any more."""
    seen_before: bool
    """Each of them was with a worker that died before, so these deaths may well have one cause: a prompt."""


class Orders(NamedTuple):
    """What a worker is told."""

    new: list[int]
    """Positions of prompts to answer."""
    dropped: list[int]
    """Positions that somebody else answers, or has answered."""

    def __bool__(self) -> bool:
        return bool(self.new or self.dropped)


class Dispatch:
    """The prompts of one call and the workers that answer them."""

    def __init__(self, order: Sequence[int], capacity: int) -> None:
        """`order`: positions of all prompts as they are to be handed out; `capacity`: how many a worker computes at a time, the rest waits in it."""
        self.capacity = capacity
        self.open = set(order)
        """Positions without an answer."""
        self._waiting = deque(order)
        self._held: dict[int, dict[int, None]] = {}
        """Worker -> positions that it is to answer, the oldest first."""
        self._orders: dict[int, Orders] = {}
        self._since: dict[int, float] = {}
        self._took: dict[int, float] = {}
        """Worker -> seconds that it needed, the last time, until it held nothing any more."""
        self._deaths: Counter[int] = Counter()
        """Position -> workers that died with it."""
        self._at_most_together: dict[int, int] = {}
        """Suspect without an answer -> how many, itself included, a worker may have at a time."""

    @property
    def queue_depth(self) -> int:
        """Prompts that nobody has begun to answer."""
        return len(self._waiting) + sum(max(0, len(held) - self.capacity) for held in self._held.values())

    def holds(self, worker: int) -> bool:
        """Whether the worker is to answer something."""
        return bool(self._held.get(worker))

    def holds_suspects(self, worker: int) -> bool:
        """Whether the worker has prompts with which several died, and which nobody else is given meanwhile."""
        return not self._at_most_together.keys().isdisjoint(self._held.get(worker, ()))

    def has_work(self, worker: int) -> bool:
        """Whether there is something to tell the worker, or to ask it for."""
        return bool(self._orders.get(worker)) or self.holds(worker)

    def orders(self, worker: int) -> Orders:
        """What the worker has to be told since the last time."""
        return self._orders.pop(worker, Orders([], []))

    def balance(self, workers: Collection[int], now: float) -> None:
        """Hand out what waits, to the worker that holds least. `workers` are those that take prompts; `now` is in seconds.

        When one of them holds nothing and nothing waits, it gets a share of what others hold and have not begun, else
        what a slow one holds, as well: who is first wins.
        """
        free = [worker for worker in workers if not self.holds(worker)]
        if free and not self._waiting:
            for worker in list(self._held):
                self.take_back(worker)
        if free and not self._waiting:
            self._give_again(free, now)
        for position in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            if position not in self.open:  # a worker that left, or died, had answered it
                continue
            able = [worker for worker in workers if self._may_hold(worker, position)] if self._at_most_together else workers
            if able:
                self._hold(min(able, key=lambda worker: len(self._held.get(worker, ()))), position, now)
            else:
                self._waiting.append(position)

    def _may_hold(self, worker: int, position: int) -> bool:
        """Whether a worker may be given a prompt beside those that it holds: suspects stay among themselves, and few."""
        held = self._held.get(worker, {})
        if not held or not (position in self._at_most_together or self.holds_suspects(worker)):
            return True
        return len(held) < min(self._at_most_together.get(one, 0) for one in (*held, position))

    def finish(self, worker: int, position: int, now: float) -> bool:
        """A worker has an answer; whether it is the first to this prompt."""
        if position not in self.open:
            return False
        self.close(position, now, answered_by=worker)
        return True

    def close(self, position: int, now: float, answered_by: int | None = None) -> None:
        """Nobody is to answer a prompt any more."""
        self.open.discard(position)
        self._at_most_together.pop(position, None)
        for worker, held in self._held.items():
            if position in held:
                del held[position]
                if worker != answered_by:
                    self._drop(worker, position)
                if not held:
                    self._took[worker] = now - self._since[worker]

    def lost(self, worker: int, now: float, blameless: bool = False) -> Death:
        """A worker died; what it held waits again, before all else, but for a prompt of which it died: one that it had alone, as the last of several.

        `blameless`: the reason is known, and lies elsewhere.
        """
        untold = set(self._orders.pop(worker, Orders([], [])).new)
        self._took.pop(worker, None)
        held = self._held.pop(worker, {})
        told = [position for position in held if position not in untold and not blameless]
        seen_before = bool(told) and all(self._deaths[position] for position in told)
        self._deaths.update(told)
        suspects = [position for position in told if self._deaths[position] >= SUSPECT_DEATHS]
        self._at_most_together.update({position: max(1, len(told) // NARROWER) for position in suspects})
        fatal = told[0] if len(told) == 1 and self._deaths[told[0]] > SUSPECT_DEATHS else None
        if fatal is not None:
            self.close(fatal, now)
        elsewhere = {position for others in self._held.values() for position in others}
        self._waiting.extendleft(reversed([position for position in held if position in self.open and position not in elsewhere]))
        return Death(fatal, seen_before)

    def take_back(self, worker: int) -> None:
        """What a worker holds beyond its capacity waits again."""
        held = self._held.get(worker, {})
        for position in list(held)[self.capacity :]:
            del held[position]
            self._drop(worker, position)
            self._waiting.append(position)

    def _told(self, worker: int) -> Orders:
        return self._orders.setdefault(worker, Orders([], []))

    def _hold(self, worker: int, position: int, now: float) -> None:
        held = self._held.setdefault(worker, {})
        if not held:
            self._since[worker] = now
        held[position] = None
        self._told(worker).new.append(position)

    def _drop(self, worker: int, position: int) -> None:
        told = self._told(worker)
        if position in told.new:  # it has not heard of it
            told.new.remove(position)
        else:
            told.dropped.append(position)

    def _give_again(self, free: Sequence[int], now: float) -> None:
        took = [seconds for worker, seconds in self._took.items() if not self.holds(worker)]
        limit = max(SLOW_SECONDS, SLOW * max(took, default=math.inf))
        slow = [worker for worker, held in self._held.items() if held and now - self._since[worker] > limit]
        holders = Counter(position for held in self._held.values() for position in held) if slow else Counter[int]()
        alone = [position for worker in slow for position in self._held[worker] if holders[position] == 1 and position not in self._at_most_together]
        for place, position in enumerate(alone):
            self._hold(free[place % len(free)], position, now)
