"""Training data of a supervised stage: Ray Data tokenises and packs it once, workers read windows by number.

    directory = prepare_windows(stage, config, Files(paths), tokenizer, run_dir / "sft" / "windows")
    windows = StoredWindows.load(directory / "train")
    batch = windows.take(reading.windows(step))

What is stored is found again by a hash of all that it was made from. Which window is read when is a function of seed,
step and rank, so a run that goes on skips nothing, and the number of workers changes no batch.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import ray
from jaxtyping import Bool, Float32, Int32, Int64
from numpy.lib import format as npy

from actors.stage_inputs import Files, StageError
from minigpt_ray.config import SupervisedConfig
from minigpt_ray.data.packing import Group, Windows, pack_groups
from minigpt_ray.data.prepared import MANIFEST, sha256_of
from minigpt_ray.data.rows import DataError
from minigpt_ray.stages import Item, Stage
from minigpt_ray.tokenizer import PreTrainedTokenizerBase

NUMBERS = "numbers"
"""Directory of the columns that a stage has besides those of all stages."""
SOURCE_BYTES = 48
LAYOUT = 2
"""Raised when what is stored changes, so that windows of an earlier layout are made anew."""


# ------------------------------------------------------------------------------------------------------ what is stored


@dataclass(frozen=True)
class StoredWindows:
    """Packed windows on disk, and what is in each of them."""

    token_ids: Int32[np.ndarray, "N W"]
    loss_mask: Bool[np.ndarray, "N W"]
    position_ids: Int32[np.ndarray, "N W"]
    num_tokens: Int64[np.ndarray, "N"]
    """Without padding."""
    num_loss_tokens: Int64[np.ndarray, "N"]
    num_pairs: Int64[np.ndarray, "N"]
    """(query, key) pairs that attention needs: every token sees itself and what is before it in its segment."""
    num_examples: Int64[np.ndarray, "N"]
    """Examples, or preference pairs."""
    source: np.ndarray
    """(N,) of bytes: where all of the window comes from; empty where it may come from anywhere, as in training. Cut after SOURCE_BYTES."""
    numbers: Mapping[str, Float32[np.ndarray, "N W"]] = field(default_factory=dict)
    """What else the loss asks for, by name."""

    @classmethod
    def load(cls, directory: Path) -> "StoredWindows":
        """Open, without reading, what prepare_windows stored."""
        numbers = {path.stem: np.load(path, mmap_mode="r") for path in sorted((directory / NUMBERS).glob("*.npy"))}
        columns: dict[str, Any] = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in COLUMNS}
        return cls(**columns, numbers=numbers)

    def __len__(self) -> int:
        return len(self.token_ids)

    def columns(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name, below the directory, and content of every column."""
        yield from ((name, getattr(self, name)) for name in COLUMNS)
        yield from ((f"{NUMBERS}/{name}", column) for name, column in self.numbers.items())

    def take(self, rows: Int64[np.ndarray, "R"]) -> Windows:
        numbers = {name: column[rows] for name, column in self.numbers.items()}
        return Windows(self.token_ids[rows], self.loss_mask[rows], self.position_ids[rows], numbers)


COLUMNS = tuple(column.name for column in fields(StoredWindows) if column.name != NUMBERS)


@dataclass(frozen=True)
class Sources:
    """Stored windows of one or several sources, numbered through in their order."""

    parts: Mapping[str, StoredWindows]

    @classmethod
    def load(cls, stored: Mapping[str, Path], part: str) -> "Sources":
        """Open the part `train` or `validation` of what prepare_windows stored for each source."""
        return cls({name: StoredWindows.load(directory / part) for name, directory in stored.items()})

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def sizes(self) -> list[int]:
        return [len(part) for part in self.parts.values()]

    def by_source(self) -> dict[str, Int64[np.ndarray, "r"]]:
        """Rows of each source: by its name in the mix, or where nothing is mixed, by what the rows of the files say."""
        found: dict[str, np.ndarray] = {}
        begin = 0
        for name, part in self.parts.items():
            own = part.source if not name else np.full(len(part), name.encode())
            found |= {source.decode(): begin + np.flatnonzero(own == source) for source in np.unique(own)}
            begin += len(part)
        return found

    def sample(self, most: int) -> Windows:
        """So many windows at most, evenly spaced."""
        return self.take(np.linspace(0, len(self) - 1, min(most, len(self))).astype(np.int64))

    def locate(self, rows: Int64[np.ndarray, "R"]) -> Iterator[tuple[str, Int64[np.ndarray, "r"], Int64[np.ndarray, "r"]]]:
        """For every source among the rows: its name, where its rows stand in `rows`, and their numbers within the source."""
        begin = 0
        for name, size in zip(self.parts, self.sizes, strict=True):
            places = np.flatnonzero((rows >= begin) & (rows < begin + size))
            if len(places):
                yield name, places, rows[places] - begin
            begin += size

    def take(self, rows: Int64[np.ndarray, "R"]) -> Windows:
        found = [(places, self.parts[name].take(inner)) for name, places, inner in self.locate(rows)]
        order, parts = np.argsort(np.concatenate([places for places, _ in found])), [part for _, part in found]

        def joined(columns: Iterable[np.ndarray]) -> np.ndarray:
            return np.concatenate(list(columns))[order]

        return Windows(
            token_ids=joined(part.token_ids for part in parts),
            loss_mask=joined(part.loss_mask for part in parts),
            position_ids=joined(part.position_ids for part in parts),
            numbers={name: joined(part.numbers[name] for part in parts) for name in parts[0].numbers},
        )

    def count(self, column: str, rows: Int64[np.ndarray, "R"] | None = None) -> dict[str, int]:
        """Sum of a `num_...` column over the rows, or over all, by source; those without a row are left out."""
        if rows is None:
            return {name: int(getattr(part, column).sum()) for name, part in self.parts.items()}
        return {name: int(getattr(self.parts[name], column)[inner].sum()) for name, _, inner in self.locate(rows)}


# -------------------------------------------------------------------------------------------------------- preparation


def prepare_windows(stage: Stage, config: SupervisedConfig, files: Files, tokenizer: PreTrainedTokenizerBase, directory: Path) -> Path:
    """The directory with `train` and `validation` windows of the files, made now unless it is there.

    Raises DataError for what cannot be used: a malformed line, a demonstration without an answer, an example longer than the window.
    """
    target = directory / fingerprint(stage, config, files, tokenizer)
    if (target / MANIFEST).is_file():
        return target
    items = stage.read(files.paths, files.only, config)
    if not items:
        wanted = f" of the source {files.only!r}" if files.only else ""
        raise DataError(f"{', '.join(map(str, files.paths))}: no rows{wanted}; training needs at least one")
    held_out = hold_out(stage, items, config.validation_share, config.seed)
    unfinished = directory / f".{target.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, part in (("train", [item for i, item in enumerate(items) if i not in held_out]), ("validation", [items[i] for i in sorted(held_out)])):
        store(unfinished / name, tokenise_and_pack(stage, config, part, tokenizer, apart=name == "validation"))
    manifest = {"files": [str(path) for path in files.paths], "source": files.only, "window": config.window, "items": len(items)}
    (unfinished / MANIFEST).write_text(json.dumps(manifest | {"validation_items": len(held_out), "seed": config.seed}, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)  # whole or absent
    return target


def left_out(stored: Mapping[str, Path], *parts: Sources) -> int:
    """Items that are in no window of `parts`, which are all that `stored` has; for stages whose items are examples."""
    items = sum(json.loads((directory / MANIFEST).read_text())["items"] for directory in stored.values())
    return int(items - sum(sum(part.count("num_examples").values()) for part in parts))


def fingerprint(stage: Stage, config: SupervisedConfig, files: Files, tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that the windows depend on."""
    own = {name: getattr(config, name) for name in stage.settings}
    settings = [
        stage.name,
        config.window,
        config.validation_share,
        config.seed,
        own,
        files.only,
        stage.block_items,
        LAYOUT,
        tokenizer.chat_template,
        tokenizer.eos_token,
    ]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in files.paths:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()[:16]


def hold_out(stage: Stage, items: Sequence[Item], share: float, seed: int) -> set[int]:
    """Items kept for validation; those that belong together are kept together."""
    owners = [index if stage.belongs_to is None else stage.belongs_to(item) for index, item in enumerate(items)]
    distinct = list(dict.fromkeys(owners))
    chosen = {distinct[i] for i in choose_validation(len(distinct), share, seed)}
    return {index for index, owner in enumerate(owners) if owner in chosen}


def choose_validation(num_rows: int, share: float, seed: int) -> set[int]:
    """Rows kept for the validation loss: the share, but at least one when it is not 0, and never all."""
    count = min(max(round(share * num_rows), share > 0), num_rows - 1)
    return {int(i) for i in np.random.default_rng([seed, 1]).permutation(num_rows)[:count]}


def tokenise_and_pack(
    stage: Stage, config: SupervisedConfig, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, apart: bool
) -> Iterator[StoredWindows]:
    """Windows of these items, block by block in their order, made on all CPUs of the cluster a few blocks ahead.

    `apart`: a window holds what is of one source. A single block is made here: for it alone, the processes of Ray Data
    would take longer to start than to work.
    """
    yield pack_windows([], config.window, stage.segments, apart)  # the columns' types, also where there are no items
    starts = range(0, len(items), stage.block_items)
    if len(starts) > 1:
        packed = _pack_in_parallel(stage, config, items, tokenizer, apart)
    else:
        packed = (_pack_block(stage, config, items, tokenizer, apart) for _ in starts)
    for block in packed:
        if isinstance(block, DataError):
            raise block
        yield block


def _pack_in_parallel(
    stage: Stage, config: SupervisedConfig, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, apart: bool
) -> Iterator[StoredWindows | DataError]:
    """What _pack_block makes of each block, by Ray Data; raises StageError when no further one is made within hang_after_s."""
    from ray.data.exceptions import ExecutionTimeoutError  # ray.data takes long to import, and the stage's workers need none of it

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else its execution plans stand between a job's lines
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.execution_no_progress_timeout_s = config.hang_after_s
    shared = ray.put(tokenizer)

    def pack_block(block: dict[str, Any]) -> dict[str, Any]:
        return {"packed": pickle.dumps(_pack_block(stage, config, pickle.loads(block["items"]), ray.get(shared), apart))}

    # Pickled: Arrow would take items and ragged arrays apart.
    blocks = [{"items": pickle.dumps(items[i : i + stage.block_items])} for i in range(0, len(items), stage.block_items)]
    try:
        for result in ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(pack_block).iter_rows():
            yield pickle.loads(result["packed"])
    except ExecutionTimeoutError:
        raise StageError(
            f"no block of {stage.block_items:,} rows was tokenised for {config.hang_after_s:g} s: a data worker stands still, or no node has room for one; "
            "see `ray status`, raise hang_after_s if a block takes so long, and give the same command again"
        ) from None


def _pack_block(stage: Stage, config: SupervisedConfig, items: Sequence[Item], tokenizer: PreTrainedTokenizerBase, apart: bool) -> StoredWindows | DataError:
    """One block, or what is wrong with its first unusable item: raised here, it would arrive wrapped in a page of frames."""
    groups: list[Group] = []
    try:
        for item in items:
            groups += stage.encode(tokenizer, item, config)
    except DataError as error:
        return error
    return pack_windows(groups, config.window, stage.segments, apart)


def pack_windows(groups: Sequence[Group], window: int, segments: int = 1, apart: bool = False) -> StoredWindows:
    """Groups in windows, those of each source in windows of their own if `apart`; an example is so many segments."""
    if not apart or not groups:
        return describe(pack_groups(groups, window), segments)
    of_source: dict[str, list[Group]] = {}
    for group in groups:
        of_source.setdefault(group.source, []).append(group)
    return join([describe(pack_groups(own, window), segments, source) for source, own in of_source.items()])


def join(parts: Sequence[StoredWindows]) -> StoredWindows:
    """The windows of all parts, one after the other."""
    columns: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in COLUMNS}
    return StoredWindows(**columns, numbers={name: np.concatenate([part.numbers[name] for part in parts]) for name in parts[0].numbers})


def describe(windows: Windows, segments: int = 1, source: str = "") -> StoredWindows:
    """Windows and their counts, when an example is so many segments, and where all of them come from.

    Assumes that the last token of every segment is learnt, so that padding is what follows the last learnt token.
    """
    size = windows.token_ids.shape[1]
    ends = np.where(windows.loss_mask.any(1), size - windows.loss_mask[:, ::-1].argmax(1), 0)
    used = np.arange(size) < ends[:, None]
    return StoredWindows(
        token_ids=windows.token_ids,
        loss_mask=windows.loss_mask,
        position_ids=windows.position_ids,
        num_tokens=ends.astype(np.int64),
        num_loss_tokens=windows.loss_mask.sum(1, dtype=np.int64),
        num_pairs=np.where(used, windows.position_ids + 1, 0).sum(1, dtype=np.int64),
        num_examples=(used & (windows.position_ids == 0)).sum(1, dtype=np.int64) // segments,
        source=np.full(len(windows), source.encode()[:SOURCE_BYTES].decode(errors="ignore").encode(), f"S{SOURCE_BYTES}"),
        numbers=windows.numbers,
    )


def store(directory: Path, blocks: Iterable[StoredWindows]) -> None:
    """Write windows that come block by block, each column into one .npy file, holding no more than a block."""
    with ExitStack() as stack:
        columns: dict[str, Column] = {}
        for block in blocks:
            for name, array in block.columns():
                if name not in columns:
                    columns[name] = stack.enter_context(Column(directory / f"{name}.npy"))
                columns[name].append(array)


class Column:
    """A .npy file that grows; complete once closed."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._rows = path, 0

    def __enter__(self) -> "Column":
        self._file = self._path.open("wb")
        return self

    def append(self, array: np.ndarray) -> None:
        self._rows += len(array)
        if self._file.tell() == 0:
            self._header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            npy.write_array_header_1_0(self._file, self._header)
        array.tofile(self._file)

    def __exit__(self, *error: object) -> None:
        self._file.seek(0)  # numpy leaves room in the header for a longer first axis
        npy.write_array_header_1_0(self._file, self._header | {"shape": (self._rows, *self._header["shape"][1:])})
        self._file.close()
