"""The rows of a mix on disk, in the order in which they were read; memory keeps about 50 bytes of each, and 220 while they are compared."""

import json
import os
import re
import shutil
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64, UInt64

from minigpt_ray.config import AnySource, DatasetConfig, FiltersConfig, MixConfig, TaskSource
from minigpt_ray.config.mix import KINDS
from minigpt_ray.data.duplicates import Signatures, fingerprint, normalised, repetition, signature
from minigpt_ray.data.records import DataError, Object
from minigpt_ray.data.sources import Example, Unusable, Watch, read_source


@dataclass(frozen=True)
class Origin:
    """A source in its place in the mix."""

    kind: str
    name: str
    source: AnySource
    dataset: DatasetConfig

    @property
    def path(self) -> str:
        return f"{self.kind}.sources.{self.name}"

    @property
    def templated(self) -> bool:
        return isinstance(self.source, TaskSource) or self.source.templated

    @property
    def size(self) -> int:
        """How many questions a task is asked for."""
        if self.source.weight is None or self.dataset.rows is None:
            return self.source.count or 0
        total = sum(source.weight or 0 for source in self.dataset.sources.values())
        return int(np.ceil(self.dataset.rows * self.source.weight / total))

    def random(self, seed: int) -> np.random.Generator:
        return np.random.default_rng([seed, zlib.crc32(self.path.encode())])


def origins(config: MixConfig) -> list[Origin]:
    """All sources in the order in which they are read."""
    datasets: dict[str, DatasetConfig] = {kind: getattr(config, kind) for kind in KINDS}
    return [Origin(kind, name, source, dataset) for kind, dataset in datasets.items() for name, source in dataset.sources.items()]


@dataclass(frozen=True)
class Rows:
    """What is known of the R rows in a spool."""

    origin: Int64[np.ndarray, "R"]
    """Index into the origins."""
    kind: Int64[np.ndarray, "R"]
    """Index into KINDS."""
    text: UInt64[np.ndarray, "R"]
    """Hash of what makes two rows duplicates."""
    opening: UInt64[np.ndarray, "R"]
    """Hash of what must not be on both sides of the split."""

    def __len__(self) -> int:
        return len(self.origin)


@dataclass(frozen=True)
class Similar:
    """What comparing R rows has shown."""

    near: Bool[np.ndarray, "R"]
    """True for a near duplicate of a row of its kind that came before."""
    joins: Int64[np.ndarray, "P 2"]
    """Pairs of rows that must be on the same side of the split."""


class Spool:
    """Rows on disk in the order in which they were read."""

    def __init__(self, directory: Path, config: MixConfig):
        directory.mkdir(parents=True)
        self._directory, self._config = directory, config
        self.origins = origins(config)
        self.dropped: list[Counter[str]] = [Counter() for _ in self.origins]
        self.first_malformed: list[str] = ["" for _ in self.origins]
        """For each origin the first record that was dropped as malformed, and why."""
        self._lines = (directory / "rows").open("w+b")
        self._ends, self._texts, self._openings = array("Q"), array("Q"), array("Q")
        self._origin, self._source = array("H"), array("I")
        self._source_names: dict[str, int] = {}
        self._answered: tuple[bool, str] | None = None  # whether the first prompt has an answer, and its place
        self._text_signatures, self._opening_signatures = Signatures(directory / "texts"), Signatures(directory / "openings")
        self._signed_texts, self._signed_openings = array("Q"), array("Q")

    def read(self, watch: Watch) -> None:
        """Read every source. Raises DataError."""
        for index, origin in enumerate(self.origins):
            filters = Filters(origin.source.filters)
            for outcome in read_source(origin.kind, origin.name, origin.source, origin.size, self._config.seed, watch):
                if isinstance(outcome, Unusable):
                    self.dropped[index][outcome.reason] += 1
                    if outcome.reason == "malformed":
                        self.first_malformed[index] = self.first_malformed[index] or outcome.sentence
                    continue
                even = normalised(outcome.text)
                if reason := filters.reason(outcome.text, even):
                    self.dropped[index][reason] += 1
                else:
                    said = even if outcome.said == outcome.text else normalised(outcome.said)
                    self._add(index, outcome, said, said if outcome.opening == outcome.said else normalised(outcome.opening))
        self._lines.flush()

    def _add(self, index: int, example: Example, said: str, opening: str) -> None:
        origin, row = self.origins[index], len(self)
        value = example.value if origin.kind != "prompts" else self._with_or_without_answer(example)
        line = json.dumps(value, ensure_ascii=False).encode() + b"\n"
        self._lines.write(line)
        self._ends.append(len(line) + (self._ends[-1] if row else 0))
        self._texts.append(fingerprint(said))
        self._openings.append(fingerprint(opening))
        self._origin.append(index)
        self._source.append(self._source_names.setdefault(value["source"], len(self._source_names)))
        if self._config.near_duplicates is None or origin.templated:
            return
        signed = signature(said)
        self._text_signatures.append(signed)
        self._signed_texts.append(row)
        if origin.kind != "documents":
            self._opening_signatures.append(signed if opening is said else signature(opening))
            self._signed_openings.append(row)

    def _with_or_without_answer(self, example: Example) -> Object:
        """The value of a prompt. Raises DataError where some have answers and others have not: a file keeps to one format."""
        if self._config.prompts.answers == "drop":
            return {name: value for name, value in example.value.items() if name != "answer"}
        has = "answer" in example.value
        self._answered = self._answered or (has, example.place)
        if has != self._answered[0]:
            with_answer, without = (example.place, self._answered[1]) if has else (self._answered[1], example.place)
            raise DataError(f"{without}: the prompt has no answer to verify, but that of {with_answer} has; set prompts.answers=drop, or make them in two runs")
        return example.value

    def __len__(self) -> int:
        return len(self._origin)

    @property
    def rows(self) -> Rows:
        origin = np.array(self._origin, np.int64)
        kinds = np.array([KINDS.index(origin.kind) for origin in self.origins])
        return Rows(origin, kinds[origin], np.array(self._texts, np.uint64), np.array(self._openings, np.uint64))

    def close(self) -> None:
        """Remove what is on disk."""
        self._lines.close()
        shutil.rmtree(self._directory)

    def similar(self, kind: Int64[np.ndarray, "R"]) -> Similar:
        """Compare the rows of each kind by all their text, and all rows by their openings; nothing where only exact duplicates count."""
        threshold = self._config.near_duplicates
        if threshold is None:
            return Similar(np.zeros(len(self), bool), np.zeros((0, 2), np.int64))
        texts, openings = np.array(self._signed_texts, np.int64), np.array(self._signed_openings, np.int64)
        by_text = self._text_signatures.clusters(threshold, kind[texts])
        by_opening = self._opening_signatures.clusters(threshold, np.zeros_like(openings))
        near = np.zeros(len(self), bool)
        near[texts] = by_text.near != np.arange(len(texts))
        joins = [np.stack([rows[labels], rows], axis=1) for rows, labels in ((texts, by_text.akin), (openings, by_opening.akin))]
        return Similar(near, np.concatenate(joins))

    def write(self, rows: Int64[np.ndarray, "N"], path: Path) -> dict[str, int]:
        """Write rows in the order given; returns how many are of which source."""
        ends = np.array(self._ends, np.int64)
        begins = np.concatenate([[0], ends[:-1]])
        with path.open("wb") as file:
            for begin, end in zip(begins[rows].tolist(), ends[rows].tolist(), strict=True):
                file.write(os.pread(self._lines.fileno(), end - begin, begin))
        counts = np.bincount(np.array(self._source, np.int64)[rows], minlength=len(self._source_names))
        return {name: int(counts[number]) for name, number in sorted(self._source_names.items()) if counts[number]}


class Filters:
    """The filters of a source, ready for use."""

    def __init__(self, config: FiltersConfig):
        self._config = config
        self._keep, self._drop = ([re.compile(pattern) for pattern in patterns] for patterns in (config.keep, config.drop))

    def reason(self, text: str, even: str) -> str | None:
        """Why a row is left out, None if it is not; `even` is its normalised text."""
        config = self._config
        if len(text) < config.min_characters:
            return "too_short"
        if config.max_characters is not None and len(text) > config.max_characters:
            return "too_long"
        if not all(pattern.search(text) for pattern in self._keep) or any(pattern.search(text) for pattern in self._drop):
            return "pattern"
        if config.max_repetition < 1 and repetition(even) > config.max_repetition:
            return "repetitive"
        return None
