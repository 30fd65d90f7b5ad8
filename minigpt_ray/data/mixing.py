"""Which windows a step reads when there are several sources: each is drawn by the weights of that moment, seeded by (seed, step).

Windows of all sources are numbered through. Within its source a window comes in the order of an endless reading in epochs, so
that none is read twice before all are; where a source stands is found by repeating the draws of the steps before.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64

from minigpt_ray.data.packing import windows_at


class Reading:
    """The windows of every step: a function of sizes, shares, seed and the number of the step."""

    def __init__(self, sizes: Sequence[int], shares: Callable[[float], Sequence[float]], steps: int, batch_size: int, seed: int) -> None:
        """`sizes`: windows of each source; `shares`: how a step divides among them, by the share of the run that is done."""
        self.sizes, self.shares, self.steps, self.batch_size, self.seed = sizes, shares, steps, batch_size, seed
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._start()

    def _start(self) -> None:
        self._step, self._drawn = 0, np.zeros(len(self.sizes), np.int64)

    def drawn(self, step: int) -> Int64[np.ndarray, "B"]:
        """The source of each window of a step."""
        if len(self.sizes) == 1:
            return np.zeros(self.batch_size, np.int64)
        return np.random.default_rng([self.seed, 2, step]).choice(len(self.sizes), self.batch_size, p=self.shares(step / self.steps))

    def windows(self, step: int) -> Int64[np.ndarray, "B"]:
        """The windows of a step, from 0, over all ranks."""
        if step < self._step:
            self._start()
        for before in range(self._step, step):
            self._drawn += np.bincount(self.drawn(before), minlength=len(self.sizes))
        self._step = step
        chosen = self.drawn(step)
        found = np.empty(self.batch_size, np.int64)
        for source, size in enumerate(self.sizes):
            here = chosen == source
            if here.any():
                found[here] = self.offsets[source] + windows_at(self._drawn[source] + np.arange(here.sum()), size, self.seed)
        return found
