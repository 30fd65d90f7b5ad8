"""Near duplicates of millions of texts in little memory: MinHash signatures on disk, compared band by band.

A text is the set of its 8-byte windows (after white space and case were evened out), so that no language is special. Its
signature estimates the Jaccard similarity of two such sets: one permutation hashing (arXiv:1208.1259) with empty bins
filled from others (arXiv:1703.04664), of each minimum 16 bits (arXiv:0910.3349). 128 bins of 16 bits are 32 bands of
64 bits. Two texts that agree in a band are compared: at a similarity of 0.8 nearly all pairs are found, at 0.5 seven of eight,
and the estimate then has a standard error of about 0.04.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from jaxtyping import Bool, Float64, Int64, UInt16, UInt64

BINS = 128
BANDS = 32
BANDS_AT_ONCE = 4
ROWS_AT_ONCE = 1 << 14
WINDOW = 8
"""Bytes that are compared as one: about two words of English, three characters of Chinese."""
MARGIN = 0.1
"""Between two and three standard errors of an estimate."""
LONG_WINDOW = 32
"""Bytes that natural text hardly ever says twice."""
ROUNDS = 64
"""Most texts of a bucket that the others in it are compared with."""

_MIX = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.random.default_rng(0).integers(0, 2**63, LONG_WINDOW // WINDOW, np.uint64) * np.uint64(2) + np.uint64(1)
_BIN_BITS = BINS.bit_length() - 1
_EDGES = np.arange(BINS, dtype=np.uint64) << np.uint64(64 - _BIN_BITS)
_DONORS = np.random.default_rng(0).permuted(np.tile(np.arange(BINS), (BINS, 1)), axis=1).T.copy()
"""For each bin, in a column, the order in which an empty one asks the others; the same for all texts."""


def normalised(text: str) -> str:
    """What makes two texts the same: white space and case aside."""
    return " ".join(text.split()).casefold()


def fingerprint(text: str) -> int:
    """64-bit hash of a normalised text."""
    return xxhash.xxh3_64_intdigest(text.encode())


def signature(text: str) -> UInt16[np.ndarray, "128"]:
    """MinHash signature of a normalised text."""
    hashes = mix_bits(_windows(text.encode()))
    if len(hashes) > 64 * BINS:
        # A bin's minimum lies above 32 times its expectation once in e^32: what is above need not be sorted.
        low = hashes[(hashes << np.uint64(_BIN_BITS)) < np.uint64(32 * BINS * 2**64 // len(hashes))]
        hashes = low if len(low) >= BINS else hashes
    hashes = np.sort(hashes)
    first = hashes.searchsorted(_EDGES)
    filled = np.empty(BINS, bool)
    filled[:-1], filled[-1] = first[:-1] < first[1:], first[-1] < len(hashes)
    bins = hashes.take(first, mode="clip").astype(np.uint16)  # the last 16 bits
    if filled.all():
        return bins
    empty = np.flatnonzero(~filled)
    for donors in (_DONORS[:8], _DONORS):  # a few mostly do
        asked = donors[:, empty]
        answers = filled[asked]
        bins[empty] = bins[asked[answers.argmax(axis=0), np.arange(len(empty))]]
        empty = empty[~answers.any(axis=0)]
        if not len(empty):
            break
    return bins


def repetition(text: str) -> float:
    """Share of a normalised text's 32-byte windows that stood in it before: 0 of prose, near 1 of one sentence again and again."""
    raw = text.encode()
    if len(raw) < 2 * LONG_WINDOW:
        return 0.0
    words = _windows(raw)
    count = len(raw) - LONG_WINDOW + 1
    hashes = sum(words[part * WINDOW : part * WINDOW + count] * factor for part, factor in enumerate(_FACTORS))
    hashes.sort()
    return np.count_nonzero(hashes[1:] == hashes[:-1]) / count


def _windows(raw: bytes) -> UInt64[np.ndarray, "N"]:
    """Every run of 8 bytes as a number; bytes that are missing are 0."""
    raw = raw.ljust(WINDOW, b"\0")
    return np.ndarray((len(raw) - WINDOW + 1,), np.uint64, raw, strides=(1,))


def mix_bits(values: UInt64[np.ndarray, "N"]) -> UInt64[np.ndarray, "N"]:
    """A bijection after which the first and the last bits look random."""
    values = values * _MIX
    values ^= values >> np.uint64(32)
    values *= _MIX
    return values


@dataclass(frozen=True)
class Clusters:
    """For each of N texts the first one that it is similar to, directly or through others; itself if there is none."""

    near: Int64[np.ndarray, "N"]
    """Similarity of at least the threshold, as it is estimated."""
    akin: Int64[np.ndarray, "N"]
    """Or less by MARGIN, so that hardly any pair of near duplicates is not akin."""


class Signatures:
    """Signatures of texts in a file, 256 bytes each."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("wb")

    def append(self, signature: UInt16[np.ndarray, "128"]) -> None:
        self._file.write(signature.tobytes())

    def clusters(self, threshold: float, group: Int64[np.ndarray, "N"]) -> Clusters:
        """Which texts of the same group are similar, directly or through others."""
        self._file.flush()
        near = akin = np.arange(len(group))
        if not len(group):
            return Clusters(near, akin)
        stored, salt = np.memmap(self._path, np.uint16, "r").reshape(-1, BINS), mix_bits(group.astype(np.uint64))
        for first in range(0, BANDS, BANDS_AT_ONCE):
            for band in self._bands(first, len(group)):
                for pairs, estimates in _agreeing(mix_bits(band ^ salt), stored, threshold):
                    near, akin = join(near, pairs[estimates >= threshold]), join(akin, pairs[estimates >= threshold - MARGIN])
        return Clusters(near, akin)

    def _bands(self, first: int, count: int) -> UInt64[np.ndarray, "4 N"]:
        """Some columns of the file, which is read through and not mapped: what is mapped counts as memory."""
        bands = np.empty((BANDS_AT_ONCE, count), np.uint64)
        with self._path.open("rb") as file:
            for at in range(0, count, ROWS_AT_ONCE):
                rows = np.fromfile(file, np.uint64, ROWS_AT_ONCE * BANDS).reshape(-1, BANDS)
                bands[:, at : at + len(rows)] = rows[:, first : first + BANDS_AT_ONCE].T
        return bands


def _agreeing(
    keys: UInt64[np.ndarray, "N"], stored: UInt16[np.ndarray, "N 128"], threshold: float
) -> Iterator[tuple[Int64[np.ndarray, "_ 2"], Float64[np.ndarray, "_"]]]:
    """Pairs in a bucket of equal keys, and their estimated similarity: the first text and all others, then the first of those unlike it and the rest of them."""
    order = np.argsort(keys, kind="stable")
    for _ in range(ROUNDS):
        begins = np.flatnonzero(np.diff(keys[order], prepend=~keys[order[:1]]))
        sizes = np.diff(begins, append=len(order))
        leaders = np.repeat(order[begins], sizes)
        others = leaders != order
        leaders, order = leaders[others], order[others]
        if not len(order):
            return
        estimates = np.empty(len(order))
        for at in range(0, len(order), ROWS_AT_ONCE):
            part = slice(at, at + ROWS_AT_ONCE)
            estimates[part] = (stored[leaders[part]] == stored[order[part]]).mean(axis=1)
        yield np.stack([leaders, order], axis=1), estimates
        order = order[estimates < threshold]


def join(labels: Int64[np.ndarray, "N"], pairs: Int64[np.ndarray, "_ 2"]) -> Int64[np.ndarray, "N"]:
    """Clusters that some pairs join. A cluster's label is its smallest member; np.arange(N) is everything by itself."""
    if not len(pairs):
        return labels
    left, right = pairs[:, 0], pairs[:, 1]
    while True:
        lower = np.minimum(labels[left], labels[right])
        joined = labels.copy()
        for ends in (labels[left], labels[right]):
            np.minimum.at(joined, ends, lower)
        while not np.array_equal(joined, joined[joined]):
            joined = joined[joined]
        if np.array_equal(joined, labels):
            return labels
        labels = joined


def first_of_each(values: UInt64[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    """True where a value stands for the first time."""
    mask = np.zeros(len(values), bool)
    mask[np.unique(values, return_index=True)[1]] = True
    return mask
