"""Logprobs of the frozen model of a preference stage: computed once by the stage's own workers, kept beside the stored windows.

    parts = with_reference(parts, directories, ready.reference, config)        # every rank; collective

What is kept is found again by a hash of the model, so a run that goes on, or is tried with another beta, computes nothing.
"""

import hashlib
import os
from collections.abc import Mapping
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


def with_reference(parts: Mapping[str, StoredWindows], directories: Mapping[str, Path], model: str, config: SupervisedConfig) -> dict[str, StoredWindows]:
    """The same windows with the reference's logprobs of the tokens that the loss counts among their numbers. Collective."""
    files = {name: directory / f"{REFERENCE}-{_fingerprint(model, config.engine.dtype)}.npy" for name, directory in directories.items()}
    missing = [name for name, file in files.items() if not file.is_file()]
    agreed = [missing]
    dist.broadcast_object_list(agreed)
    if agreed[0]:
        reference = TokenLogprobs(load_causal(model, config.engine.dtype)).eval().requires_grad_(False)
        if torch.cuda.is_available():
            reference.cuda()
        for name in agreed[0]:
            _compute(reference, parts[name], files[name], max(1, config.engine.micro_batch_tokens // config.window))
    return {name: replace(part, numbers={**part.numbers, REFERENCE: np.load(files[name], mmap_mode="r")}) for name, part in parts.items()}


def _fingerprint(model: str, dtype: str) -> str:
    """Hash of a model directory's weights and shape; of its name, where it is a hub id."""
    digest = hashlib.sha256(dtype.encode())
    for path in sorted(p for p in Path(model).glob("*") if p.suffix == ".safetensors" or p.name == "config.json"):
        digest.update(sha256_of(path).encode())
    if not Path(model).is_dir():
        digest.update(model.encode())
    return digest.hexdigest()[:16]


def _compute(reference: TokenLogprobs, windows: StoredWindows, target: Path, rows: int) -> None:
    """Every rank its stretch of the windows, into a file of its own; rank 0 joins the files."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(reference.parameters()).device
    pieces = [target.with_name(f".{target.stem}-{index}.npy") for index in range(world)]
    with Column(pieces[rank]) as column:
        column.append(np.zeros((0, windows.token_ids.shape[1]), np.float32))
        mine = np.array_split(np.arange(len(windows)), world)[rank]
        for begin in range(0, len(mine), rows):
            batch = Batch.of(windows.take(mine[begin : begin + rows]), device)
            logprobs, _ = reference(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)
            column.append(logprobs.float().cpu().numpy())
    dist.barrier()
    if rank == 0:
        partial = target.with_name(f".{target.name}")
        with Column(partial) as whole:
            for piece in pieces:
                whole.append(np.load(piece, mmap_mode="r"))
                piece.unlink()
        os.replace(partial, target)
    dist.barrier()
