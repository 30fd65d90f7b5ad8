"""Which rollouts are computed together: mini-batches, ranks, micro-batches. Every rank computes the same plan."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

PASS_SHARE = 1 / 32
"""What a further micro-batch costs in time, as a share of what a full one costs. It keeps a GPU, whose budget is large, from passes of a few rows."""


def mini_batches(size: int, mini_batch_size: int, seed: int, step: int, epoch: int) -> Iterator[np.ndarray]:
    """Row indices of each mini-batch: a permutation that is a function of (seed, step, epoch), cut in order."""
    order = np.random.default_rng([seed, step, epoch]).permutation(size)
    yield from (order[start : start + mini_batch_size] for start in range(0, size, mini_batch_size))


def micro_batches(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """`plan[rank][i]` are the positions in `lengths` that make micro-batch i of a rank.

    Longest rows go first to the rank with the fewest tokens; a micro-batch holds rows of similar length, so that little is
    padding, and its padded size stays within `budget` tokens (one row may exceed it alone). Every rank gets the same number of micro-batches,
    because each one is a collective: a rank that has fewer rows gets empty lists.
    """
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for row in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = load.index(min(load))
        by_rank[rank].append(row)
        load[rank] += lengths[row]
    plan = [list(_cut(rows, lengths, budget)) for rows in by_rank]
    count = max(len(batches) for batches in plan)
    return [batches + [[] for _ in range(count - len(batches))] for batches in plan]


def _cut(rows: Sequence[int], lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Rows, longest first, in batches of at most `budget` padded tokens, so that padding and passes together cost the least.

    A pass costs as much as PASS_SHARE of the budget in tokens, whatever is in it. By dynamic programming: the cheapest way
    to cut the first i rows ends with a batch [j, i) after the cheapest way to cut the first j.
    """
    size = len(rows)
    widths = np.asarray([lengths[row] for row in rows], np.int64)
    cost, start, lowest = np.zeros(size + 1), np.zeros(size + 1, np.int64), 0
    for end in range(1, size + 1):
        while lowest < end - 1 and widths[lowest] * (end - lowest) > budget:
            lowest += 1
        begins = np.arange(lowest, end)
        costs = cost[begins] + widths[begins] * (end - begins) + PASS_SHARE * budget
        start[end], cost[end] = begins[costs.argmin()], costs.min()
    cuts = [size]
    while cuts[-1] > 0:
        cuts.append(int(start[cuts[-1]]))
    yield from (list(rows[begin:end]) for begin, end in pairwise(reversed(cuts)))
