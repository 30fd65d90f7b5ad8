"""Preparing a mix of any size: which rows are duplicates, on which side of the split each stands, how many are taken, in which order.

    spool = Spool(directory, config)
    spool.read(watch)                  # every source: filters; rows, hashes and signatures are put down
    choice = choose(spool, config)     # duplicates, sides of the split, amounts, order
    spool.write(rows, path)            # the chosen rows, in their order

Nothing depends on time or on the order of a set: the same config and files give the same bytes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from minigpt_ray.config import MixConfig
from minigpt_ray.config.mix import KINDS
from minigpt_ray.data.duplicates import first_of_each, join, mix_bits
from minigpt_ray.data.reasoning import apportion
from minigpt_ray.data.records import DataError, Object
from minigpt_ray.data.spool import Origin, Spool

HELD_OUT = {kind: "held_out" if kind == "prompts" else f"held_out_{kind}" for kind in KINDS}
"""Kind -> name of the file of its held-out rows; held_out.jsonl is what evaluation reads."""
READING = ("malformed", "tie", "too_short", "too_long", "repetitive", "pattern")
CHOOSING = ("duplicate", "near_duplicate", "surplus")
DROPPED = (*READING, *CHOOSING)
"""Why a row was dropped: when it was read, when rows were chosen. `surplus`: more than its source was asked for."""
LARGE_CLUSTER = 0.1
"""Share of a kind's rows in one cluster from which the split is told to be uneven."""
LITTLE = 0.5
"""Share of the rows that the weights let through, below which it is told why."""


@dataclass(frozen=True)
class Choice:
    """Which rows are written, and why others are not."""

    train: dict[str, Int64[np.ndarray, "_"]]
    """Kind -> rows in the order in which they are written."""
    held_out: dict[str, Int64[np.ndarray, "_"]]
    dropped: list[Counter[str]]
    """For each origin."""
    notes: list[str]
    """What a person should look at."""


def choose(spool: Spool, config: MixConfig) -> Choice:
    """Drop duplicates, split, take what each source was asked for, put into order. Raises DataError when a source has too little."""
    rows = spool.rows
    similar = spool.similar(rows.kind)
    first = first_of_each(mix_bits(rows.text ^ mix_bits(rows.kind.astype(np.uint64))))
    near = first & similar.near
    labels = join(join(np.arange(len(rows)), _joined_by(rows.opening)), similar.joins)
    held_out = sides(rows.opening, labels, config.held_out, config.seed)

    members = [np.flatnonzero(rows.origin == index) for index in range(len(spool.origins))]
    available = [part[(first & ~near)[part]] for part in members]
    dropped = [Counter(duplicate=int((~first[part]).sum()), near_duplicate=int(near[part].sum())) for part in members]
    train, aside, notes = {}, {}, []
    for number, kind in enumerate(KINDS):
        mine = [index for index, origin in enumerate(spool.origins) if origin.kind == kind]
        if not mine:
            continue
        sizes = [len(available[index]) for index in mine]
        amounts = take([spool.origins[index] for index in mine], sizes)
        for index, amount in zip(mine, amounts, strict=True):
            dropped[index]["surplus"] = max(0, len(available[index]) - amount)
        taken = [_draw(spool.origins[index], available[index], amount, config.seed) for index, amount in zip(mine, amounts, strict=True)]
        chosen = np.random.default_rng([config.seed, number]).permutation(np.concatenate(taken))
        train[kind], aside[kind] = chosen[~held_out[chosen]], _once(chosen[held_out[chosen]])
        if not len(train[kind]):
            read = sum(len(members[index]) for index in mine)
            raise DataError(
                f"{kind}: of {read} rows that the filters let through none is left to train on, {len(aside[kind])} are held out; loosen the filters"
            )
        notes += _scarce([spool.origins[index] for index in mine], sizes, amounts) + _uneven(kind, _once(chosen), labels)
    return Choice(train, aside, dropped, notes)


def sides(opening: UInt64[np.ndarray, "R"], labels: Int64[np.ndarray, "R"], share: float, seed: int) -> Bool[np.ndarray, "R"]:
    """Which rows are held out: a hash decides for each cluster, so that it does not matter what else there is, or in which order."""
    smallest = np.full(len(opening), ~np.uint64(0))
    np.minimum.at(smallest, labels, opening)
    return mix_bits(smallest[labels] ^ mix_bits(np.array([seed], np.uint64))) < np.uint64(int(share * 2**64))


def take(origins: Sequence[Origin], available: Sequence[int]) -> list[int]:
    """Rows of each source of one kind, from what there is. Raises DataError when a source has too little and must not repeat."""
    dataset = origins[0].dataset
    amounts = [
        size if origin.source.weight is None and origin.source.count is None else origin.source.count or 0
        for origin, size in zip(origins, available, strict=True)
    ]
    weighted = [index for index, origin in enumerate(origins) if origin.source.weight is not None]
    if weighted:
        weights = [origins[index].source.weight or 0.0 for index in weighted]
        if dataset.rows is not None:
            total = dataset.rows - sum(amounts)
            if total <= 0:
                raise DataError(f"{origins[0].kind}.rows={dataset.rows}, but the sources without a weight give {sum(amounts)} rows already; raise it")
        else:
            bounds = [available[i] * sum(weights) / w for i, w in zip(weighted, weights, strict=True) if not origins[i].source.repeat]
            total = int(min(bounds)) if bounds else sum(available[i] for i in weighted)
        for index, amount in zip(weighted, apportion(total, weights), strict=True):
            amounts[index] = amount if dataset.rows is not None or origins[index].source.repeat else min(amount, available[index])
    for origin, amount, size in zip(origins, amounts, available, strict=True):
        if amount > size and not (origin.source.repeat and size):
            raise DataError(f"{origin.path}: {amount} rows are asked for, but it has {size} that are not dropped; ask for fewer, or set its repeat=true")
    return amounts


@dataclass(frozen=True)
class Tally:
    """What became of the rows of one source."""

    kind: str
    name: str
    read: int
    dropped: Counter[str]
    """By reason, one of DROPPED."""
    train: int
    """Rows written, repetitions included."""
    held_out: int
    first_malformed: str
    """The sentence about the first record that was dropped as malformed; empty when there was none."""

    def resolved(self) -> Object:
        """As values that JSON knows."""
        return {**vars(self), "dropped": {reason: self.dropped[reason] for reason in DROPPED if self.dropped[reason]}}


def tally(spool: Spool, choice: Choice) -> list[Tally]:
    """One for each source, in the order of the mix."""
    origin, found = spool.rows.origin, []
    for index, of in enumerate(spool.origins):
        train, held_out = (int((origin[part[of.kind]] == index).sum()) for part in (choice.train, choice.held_out))
        read = int((origin == index).sum()) + spool.dropped[index].total()
        found.append(Tally(of.kind, of.name, read, spool.dropped[index] + choice.dropped[index], train, held_out, spool.first_malformed[index]))
    return found


def _draw(origin: Origin, rows: Int64[np.ndarray, "_"], amount: int, seed: int) -> Int64[np.ndarray, "_"]:
    """Some of the rows, by chance; all of them before one comes again."""
    return np.resize(origin.random(seed).permutation(rows), amount)


def _once(rows: Int64[np.ndarray, "_"]) -> Int64[np.ndarray, "_"]:
    """Without what is repeated."""
    return rows[np.sort(np.unique(rows, return_index=True)[1])]


def _joined_by(values: UInt64[np.ndarray, "R"]) -> Int64[np.ndarray, "P 2"]:
    """Pairs that join all rows of the same value to the first of them."""
    _, begins, groups = np.unique(values, return_index=True, return_inverse=True)
    pairs = np.stack([begins[groups], np.arange(len(values))], axis=1)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def _scarce(origins: Sequence[Origin], available: Sequence[int], amounts: Sequence[int]) -> list[str]:
    """A note when one source with a weight runs out so early that most rows of the others are left."""
    weighted = [index for index, origin in enumerate(origins) if origin.source.weight is not None]
    taken, there = (sum(numbers[index] for index in weighted) for numbers in (amounts, available))
    if not weighted or origins[0].dataset.rows is not None or taken >= LITTLE * there:
        return []
    scarcest = min(weighted, key=lambda index: (origins[index].source.repeat, available[index] / (origins[index].source.weight or 1)))
    origin, size = origins[scarcest], available[scarcest]
    return [
        f"{origin.kind}: {taken:,} of the {there:,} rows of the sources with a weight are taken, because {origin.path} ends after {size:,}; "
        f"set its repeat=true, lower its weight={origin.source.weight:g}, or say how many are wanted with {origin.kind}.rows"
    ]


def _uneven(kind: str, chosen: Int64[np.ndarray, "N"], labels: Int64[np.ndarray, "R"]) -> list[str]:
    """A note when many rows can only be on one side together."""
    if len(chosen) < 100:
        return []
    counts = np.unique(labels[chosen], return_counts=True)[1]
    share = counts.max() / len(chosen)
    if share < LARGE_CLUSTER:
        return []
    return [
        f"{kind}: {share:.0%} of the rows begin in the same or nearly the same way and so are on one side of the split; where that comes from a template, set templated=true on their source"
    ]
