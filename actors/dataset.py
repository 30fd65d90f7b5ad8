"""Training data of a supervised stage: Ray Data tokenises and packs it once, workers read windows by number.

    directory = prepare_windows(stage, files, tokenizer, run_dir / "sft" / "windows", window=128, validation_share=0.02, seed=0)
    windows = StoredWindows.load(directory / "train")
    batch = windows.take(windows_for(step, rank, ...))

What is stored is found again by a hash of all that it was made from. Which window is read when is a function of seed,
step and rank, so a run that goes on skips nothing, and the number of workers changes no batch.
"""

import hashlib
import json
import logging
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import ray
from jaxtyping import Bool, Int32, Int64
from transformers import PreTrainedTokenizerBase

from minigpt_ray.data.packing import Windows, pack
from minigpt_ray.data.rows import DataError, Row, read_rows
from minigpt_ray.stages import Stage

BLOCK_ROWS = 4096
"""Rows that are packed together. A constant, so that windows do not depend on the cluster that makes them."""
MANIFEST = "manifest.json"


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
    """(query, key) pairs that attention needs: every token sees itself and what is before it in its example."""
    num_examples: Int64[np.ndarray, "N"]

    @classmethod
    def load(cls, directory: Path) -> "StoredWindows":
        """Open, without reading, what prepare_windows stored."""
        return cls(*(np.load(directory / f"{field.name}.npy", mmap_mode="r") for field in fields(cls)))

    def __len__(self) -> int:
        return len(self.token_ids)

    def take(self, rows: Int64[np.ndarray, "R"]) -> Windows:
        return Windows(self.token_ids[rows], self.loss_mask[rows], self.position_ids[rows])


def prepare_windows(
    stage: Stage,
    files: Sequence[Path],
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    window: int,
    validation_share: float,
    seed: int,
    separator: str | None = None,
) -> Path:
    """The directory with `train` and `validation` windows of the files, made now unless it is there.

    `separator` cuts {"text"} rows into prompt and answer.

    Raises DataError for a row that cannot be used: a malformed line, no assistant turn, longer than the window.
    """
    target = directory / fingerprint(stage, files, tokenizer, window, validation_share, seed, separator)
    if (target / MANIFEST).is_file():
        return target
    rows = list(read_rows(files, separator))
    if not rows:
        raise DataError(f"{', '.join(map(str, files))}: no rows; training needs at least one demonstration")
    held_out = choose_validation(len(rows), validation_share, seed)
    unfinished = directory / f".{target.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, part in (("train", [row for i, row in enumerate(rows) if i not in held_out]), ("validation", [rows[i] for i in sorted(held_out)])):
        (unfinished / name).mkdir(parents=True)
        for column, array in tokenise_and_pack(stage, part, tokenizer, window).items():
            np.save(unfinished / name / f"{column}.npy", array)
    manifest = {"files": [str(path) for path in files], "window": window, "rows": len(rows), "validation_rows": len(held_out), "seed": seed}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    unfinished.rename(target)  # whole or absent
    return target


def fingerprint(
    stage: Stage, files: Sequence[Path], tokenizer: PreTrainedTokenizerBase, window: int, validation_share: float, seed: int, separator: str | None
) -> str:
    """Hash of everything that the windows depend on."""
    settings = [stage.name, window, validation_share, seed, separator, BLOCK_ROWS, tokenizer.chat_template, tokenizer.eos_token]
    digest = hashlib.sha256(json.dumps(settings).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def choose_validation(num_rows: int, share: float, seed: int) -> set[int]:
    """Rows kept for the validation loss: the share, but at least one when it is not 0, and never all."""
    count = min(max(round(share * num_rows), share > 0), num_rows - 1)
    return {int(i) for i in np.random.default_rng([seed, 1]).permutation(num_rows)[:count]}


def tokenise_and_pack(stage: Stage, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, window: int) -> dict[str, np.ndarray]:
    """The columns of StoredWindows for these rows, block by block in their order, on all CPUs of the cluster."""
    if not rows:
        return describe(pack([], window))
    # Pickled: Arrow would take rows and ragged arrays apart.
    blocks = [{"rows": pickle.dumps(rows[i : i + BLOCK_ROWS])} for i in range(0, len(rows), BLOCK_ROWS)]
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # else its execution plans stand between a job's lines
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    shared = ray.put(tokenizer)

    def pack_block(block: dict[str, Any]) -> dict[str, Any]:
        return {"packed": pickle.dumps(_pack_block(stage, pickle.loads(block["rows"]), ray.get(shared), window))}

    results = ray.data.from_items(blocks, override_num_blocks=len(blocks)).map(pack_block).take_all()
    packed = [pickle.loads(result["packed"]) for result in results]
    for part in packed:
        if isinstance(part, DataError):
            raise part
    return {field.name: np.concatenate([part[field.name] for part in packed]) for field in fields(StoredWindows)}


def _pack_block(stage: Stage, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, window: int) -> dict[str, np.ndarray] | DataError:
    """One block's columns, or what is wrong with its first unusable row: raised here, it would arrive wrapped in a page of frames."""
    try:
        examples = [stage.encode(tokenizer, row) for row in rows]
        for row, example in zip(rows, examples, strict=True):
            if len(example.token_ids) > window:
                raise DataError(f"{row.place}: {len(example.token_ids)} tokens with the chat template, but window={window}; raise window or remove the row")
    except DataError as error:
        return error
    return describe(pack(examples, window))


def describe(windows: Windows) -> dict[str, np.ndarray]:
    """Windows and their counts, as the columns of StoredWindows.

    Assumes that the last token of every example is learnt, so that padding is what follows the last learnt token.
    """
    size = windows.token_ids.shape[1]
    ends = np.where(windows.loss_mask.any(1), size - windows.loss_mask[:, ::-1].argmax(1), 0)
    used = np.arange(size) < ends[:, None]
    return {
        "token_ids": windows.token_ids,
        "loss_mask": windows.loss_mask,
        "position_ids": windows.position_ids,
        "num_tokens": ends.astype(np.int64),
        "num_loss_tokens": windows.loss_mask.sum(1, dtype=np.int64),
        "num_pairs": np.where(used, windows.position_ids + 1, 0).sum(1, dtype=np.int64),
        "num_examples": (used & (windows.position_ids == 0)).sum(1, dtype=np.int64),
    }
