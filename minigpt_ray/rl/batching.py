"""Which rollouts are computed together: mini-batches, ranks, micro-batches. Every rank computes the same plan."""

from collections.abc import Iterator, Sequence

import numpy as np


def mini_batches(size: int, mini_batch_size: int, seed: int, step: int, epoch: int) -> Iterator[np.ndarray]:
    """Row indices of each mini-batch: a permutation that is a function of (seed, step, epoch), cut in order."""
    order = np.random.default_rng([seed, step, epoch]).permutation(size)
    yield from (order[start : start + mini_batch_size] for start in range(0, size, mini_batch_size))


def micro_batches(lengths: Sequence[int], budget: int, ranks: int) -> list[list[list[int]]]:
    """`plan[rank][i]` are the positions in `lengths` that make micro-batch i of a rank.

    Longest rows go first to the rank with the fewest tokens; a micro-batch holds rows of similar length whose padded
    size stays within `budget` tokens (one row may exceed it alone). Every rank gets the same number of micro-batches,
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
    """Rows, longest first, in batches of at most `budget` padded tokens."""
    batch: list[int] = []
    for row in rows:
        if batch and lengths[batch[0]] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
