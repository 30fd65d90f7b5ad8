"""Logprobs of the frozen model of a preference stage: computed once by the stage's own workers, kept beside the stored windows.

    parts = with_reference(parts, ready.reference, config, alive)        # every rank; collective

What is kept is found again by a hash of the model, so a run that goes on, or is tried with another beta, computes nothing; nor does one
that was interrupted on the way compute again what was there, piece by piece.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from actors.dataset import Column, StoredWindows
from minigpt_ray.config import SupervisedConfig
from minigpt_ray.data.prepared import sha256_of
from minigpt_ray.models import TokenLogprobs, load_causal
from minigpt_ray.stages import REFERENCE, Batch

PIECE = 128
"""Most windows whose logprobs become a file at a time, and what an interruption costs at most on each rank."""


def with_reference(
    parts: Mapping[Path, StoredWindows], model: str, config: SupervisedConfig, alive: Callable[[], object] = lambda: None
) -> dict[Path, StoredWindows]:
    """The same windows, by where they are stored, with the reference's logprobs of the tokens that the loss counts among their numbers. Collective.

    `alive` is called after every batch.
    """
    agreed = [_files(parts, model, config.engine.dtype) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(agreed)
    files = agreed[0]
    missing = [directory for directory, (_, is_there) in files.items() if not is_there]
    if missing:
        reference = TokenLogprobs(load_causal(model, config.engine.dtype)).eval().requires_grad_(False)
        if torch.cuda.is_available():
            reference.cuda()
        for directory in missing:
            _compute(reference, parts[directory], files[directory][0], max(1, config.engine.micro_batch_tokens // config.window), alive)
    found = {directory: np.load(file, mmap_mode="r") for directory, (file, _) in files.items()}
    return {directory: replace(part, numbers={**part.numbers, REFERENCE: found[directory]}) for directory, part in parts.items()}


def _files(directories: Iterable[Path], model: str, dtype: str) -> dict[Path, tuple[Path, bool]]:
    """For each directory its file of logprobs, and whether it is there."""
    name = f"{REFERENCE}-{_fingerprint(model, dtype)}.npy"
    return {directory: (directory / name, (directory / name).is_file()) for directory in directories}


def _fingerprint(model: str, dtype: str) -> str:
    """Hash of a model directory's weights and shape; of its name, where it is a hub id."""
    digest = hashlib.sha256(dtype.encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix == ".safetensors" or p.name == "config.json"):
        digest.update(sha256_of(path).encode())
    if not Path(model).is_dir():
        digest.update(model.encode())
    return digest.hexdigest()[:16]


def _compute(reference: TokenLogprobs, windows: StoredWindows, target: Path, rows: int, alive: Callable[[], object]) -> None:
    """Every rank its share of the pieces that are not there, each whole or absent; rank 0 joins them."""
    rank, world = dist.get_rank(), dist.get_world_size()
    directory = target.with_name(f".{target.stem}")
    size = max(1, min(PIECE, -(-len(windows) // world)))
    stretches = [range(begin, min(begin + size, len(windows))) for begin in range(0, len(windows), size)]
    pieces = {directory / f"{places.start}-{places.stop}.npy": places for places in stretches}
    directory.mkdir(exist_ok=True)
    there = set(directory.iterdir())  # a network file system may remember that a file, asked for by its name, was not there
    agreed = [[piece for piece in pieces if piece not in there]]
    dist.broadcast_object_list(agreed)
    for piece in agreed[0][rank::world]:
        places, partial = pieces[piece], piece.with_name(f".{piece.name}")
        np.save(partial, np.concatenate([_logprobs(reference, windows, places[i : i + rows], alive) for i in range(0, len(places), rows)]))
        os.replace(partial, piece)
    dist.barrier()
    if rank == 0:
        partial = target.with_name(f".{target.name}")
        with Column(partial) as whole:
            whole.append(np.zeros((0, windows.token_ids.shape[1]), np.float32))
            for piece in pieces:
                whole.append(np.load(piece, mmap_mode="r"))
        os.replace(partial, target)
        shutil.rmtree(directory)
    dist.barrier()


def _logprobs(reference: TokenLogprobs, windows: StoredWindows, places: range, alive: Callable[[], object]) -> np.ndarray:
    """(windows at these places, W), in one batch."""
    batch = Batch.of(windows.take(np.arange(places.start, places.stop)), next(reference.parameters()).device)
    logprobs = reference(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0].float().cpu().numpy()
    alive()
    return logprobs
