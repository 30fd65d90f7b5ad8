"""Packing examples into windows of one length, and who reads which window when.

Without flash-attn, transformers keeps packed examples apart exactly when it gets position ids that restart at every
example, no attention mask and use_cache=False; with anything else they see each other, silently.
"""

from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64


@dataclass(frozen=True)
class Group:
    """Segments of one window, one after the other, that do not see each other: an example alone, or the two answers of a pair."""

    segments: tuple[tuple[np.ndarray, np.ndarray], ...]
    """(token ids, True where the loss counts) of each."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What else the loss asks for, by name; the same names in all groups."""
    source: str = ""
    """Where it comes from, as its row says; empty where it is made of rows of several sources."""

    def __len__(self) -> int:
        return sum(len(token_ids) for token_ids, _ in self.segments)


@dataclass(frozen=True)
class Windows:
    """Packed examples, N windows of W tokens."""

    token_ids: Int32[np.ndarray, "N W"]
    """0 in the padding."""
    loss_mask: Bool[np.ndarray, "N W"]
    """True where the loss counts the token; never on an example's first, which has nothing before it to be predicted from."""
    position_ids: Int32[np.ndarray, "N W"]
    """From 0 in every segment, and in the padding, which so is a segment of its own that no other sees."""
    numbers: Mapping[str, Float32[np.ndarray, "N W"]] = field(default_factory=dict)
    """Those of a group at its first token, 0 elsewhere: the sum over the group's first segment is the number."""

    def __len__(self) -> int:
        return len(self.token_ids)


def pack(examples: Sequence[tuple[np.ndarray, np.ndarray]], window: int) -> Windows:
    """pack_groups for (token ids, loss mask) examples, each on its own."""
    return pack_groups([Group((example,)) for example in examples], window)


def pack_groups(groups: Sequence[Group], window: int) -> Windows:
    """Put groups whole into windows, the longest first, each where it leaves the least room.

    Deterministic; every token is in exactly one window. Raises ValueError for a group longer than the window.
    """
    lengths = [len(group) for group in groups]
    for index, length in enumerate(lengths):
        if length > window:
            raise ValueError(f"example {index} has {length} tokens, but window={window}; use a window of at least {max(lengths)} or remove the longer examples")
    bins = _best_fit(lengths, window)
    shape = (len(bins), window)
    token_ids, loss_mask, position_ids = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32)
    numbers = {name: np.zeros(shape, np.float32) for name in (groups[0].numbers if groups else ())}
    for row, members in enumerate(bins):
        start = 0
        for group in (groups[index] for index in members):
            for name, number in group.numbers.items():
                numbers[name][row, start] = number
            for ids, learnt in group.segments:
                end = start + len(ids)
                token_ids[row, start:end], loss_mask[row, start:end] = ids, learnt
                loss_mask[row, start] = False
                position_ids[row, start:end] = np.arange(end - start)
                start = end
        position_ids[row, start:] = np.arange(window - start)
    return Windows(token_ids, loss_mask, position_ids, numbers)


def split(example: tuple[np.ndarray, np.ndarray], window: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pieces of at most `window` tokens, each beginning with the last token of the one before, so that pack loses no learnt token."""
    token_ids, loss_mask = example
    return [(token_ids[i : i + window], loss_mask[i : i + window]) for i in range(0, max(1, len(token_ids) - 1), window - 1)]


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


@lru_cache(maxsize=16)
def window_order(num_windows: int, seed: int, epoch: int) -> Int64[np.ndarray, "N"]:
    """The order of the windows in an epoch, from 0: a permutation that depends on nothing else. Kept, since every step asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(num_windows)


def windows_at(places: Int64[np.ndarray, "R"], num_windows: int, seed: int) -> Int64[np.ndarray, "R"]:
    """Which windows come at these places, from 0, of an endless reading in epochs."""
    epochs, positions = np.divmod(places, num_windows)
    orders = {int(epoch): window_order(num_windows, seed, int(epoch)) for epoch in np.unique(epochs)}
    return np.array([orders[int(epoch)][position] for epoch, position in zip(epochs, positions, strict=True)], np.int64)
