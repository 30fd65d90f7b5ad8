"""Packing examples into windows of one length, and who reads which window when.

Without flash-attn, transformers keeps packed examples apart exactly when it gets position ids that restart at every
example, no attention mask and use_cache=False; with anything else they see each other, silently.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int32, Int64


@dataclass(frozen=True)
class Windows:
    """Packed examples, N windows of W tokens."""

    token_ids: Int32[np.ndarray, "N W"]
    """0 in the padding."""
    loss_mask: Bool[np.ndarray, "N W"]
    """True where the loss counts the token; never on an example's first, which has nothing before it to be predicted from."""
    position_ids: Int32[np.ndarray, "N W"]
    """From 0 in every example, and in the padding, which so is a segment of its own that no example sees."""

    def __len__(self) -> int:
        return len(self.token_ids)


def pack(examples: Sequence[tuple[np.ndarray, np.ndarray]], window: int) -> Windows:
    """Put (token ids, loss mask) examples whole into windows, the longest first, each where it leaves the least room.

    Deterministic; every token is in exactly one window. Raises ValueError for an example longer than the window.
    """
    lengths = [len(token_ids) for token_ids, _ in examples]
    for index, length in enumerate(lengths):
        if length > window:
            raise ValueError(f"example {index} has {length} tokens, but window={window}; use a window of at least {max(lengths)} or remove the longer examples")
    bins = _best_fit(lengths, window)
    token_ids, loss_mask, position_ids = np.zeros((len(bins), window), np.int32), np.zeros((len(bins), window), bool), np.zeros((len(bins), window), np.int32)
    for row, members in enumerate(bins):
        start = 0
        for index in members:
            end = start + lengths[index]
            token_ids[row, start:end], loss_mask[row, start:end] = examples[index]
            loss_mask[row, start] = False
            position_ids[row, start:end] = np.arange(end - start)
            start = end
        position_ids[row, start:] = np.arange(window - start)
    return Windows(token_ids, loss_mask, position_ids)


def _best_fit(lengths: Sequence[int], window: int) -> list[list[int]]:
    """Indices of the examples in each window."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, window), sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[index] == 0:
            continue
        at = bisect_left(room, (lengths[index], 0))
        if at < len(room):
            free, chosen = room.pop(at)
        else:
            free, chosen = window, len(bins)
            bins.append([])
        bins[chosen].append(index)
        insort(room, (free - lengths[index], chosen))
    return bins


def window_order(num_windows: int, seed: int, epoch: int) -> Int64[np.ndarray, "N"]:
    """The order of the windows in an epoch, from 0: a permutation that depends on nothing else."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def windows_for(step: int, rank: int, num_ranks: int, batch_size: int, num_windows: int, seed: int) -> Int64[np.ndarray, "R"]:
    """Which windows a rank reads in a step, from 0: a function of its arguments alone, so a resumed run skips nothing.

    The ranks' parts, joined in rank order, are the same `batch_size` windows whatever their number; a batch may reach
    into the next epoch. Assumes that batch_size divides among the ranks and num_windows > 0.
    """
    assert batch_size % num_ranks == 0 and num_windows > 0
    share = batch_size // num_ranks
    places = step * batch_size + rank * share + np.arange(share)
    epochs, positions = np.divmod(places, num_windows)
    orders = {int(epoch): window_order(num_windows, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][position] for epoch, position in zip(epochs, positions, strict=True)], np.int64)
