"""Checkpoints: directories that are either whole or not there.

    checkpoints = Checkpoints(config.stage_dir("ppo") / "checkpoint", config.checkpoint.keep)
    directory = checkpoints.begin(step)        # .step-000100.partial; every rank writes below it
    checkpoints.save_state(directory, {...})
    checkpoints.commit(step)                   # step-000100, with manifest.json: files, sizes, hashes

A process may be killed, or a disk fill up, between any two of these lines: what `latest` gives is the last checkpoint
that was committed. On a cluster the directory must be one that all nodes see; `begin` and `commit` belong to the driver.
"""

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STATE = "state.json"


class Checkpoints:
    """The checkpoints of one stage of a run."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep

    def begin(self, step: int) -> Path:
        """An empty directory to write the checkpoint of `step` into; what killed processes left of this or other steps is removed."""
        partial = self.directory / f".{_name(step)}.partial"
        with naming(partial):
            for left in [*self.directory.glob(".step-*.partial"), *self.directory.glob(".step-*.replaced")]:
                shutil.rmtree(left)
            partial.mkdir(parents=True)
        return partial

    def commit(self, step: int) -> Path:
        """Declare the checkpoint of `step` complete, then remove those beyond `keep`; returns its directory.

        Those of later steps go as well: a run that commits `step` has given up what came after it.
        """
        partial, final = self.directory / f".{_name(step)}.partial", self.directory / _name(step)
        replaced = self.directory / f".{_name(step)}.replaced"
        with naming(partial):
            files = {path.relative_to(partial).as_posix(): _entry(path) for path in sorted(partial.rglob("*")) if path.is_file()}
            for path in partial.rglob("*"):
                _sync(path)
            write_json_atomic(partial / MANIFEST, {"step": step, "files": files})
            shutil.rmtree(replaced, ignore_errors=True)
            if final.exists():  # a damaged one, or one whose steps were taken again
                final.rename(replaced)
            partial.rename(final)
            _sync(self.directory)
        shutil.rmtree(replaced, ignore_errors=True)
        steps = self.steps()
        kept = [old for old in steps if old <= step][-self.keep :]
        for old in steps:
            if old not in kept:
                shutil.rmtree(self.directory / _name(old))
        return final

    def steps(self) -> list[int]:
        """Steps whose checkpoint was committed, in order; not yet verified."""
        matches = [re.fullmatch(r"step-(\d{6,})", path.name) for path in self.directory.glob("step-*")]
        return sorted(int(match[1]) for match in matches if match)

    def step_of(self, path: Path) -> int:
        """The step of a committed checkpoint."""
        return int(path.name.removeprefix("step-"))

    def latest(self) -> Path | None:
        """The newest checkpoint whose files are as they were written; a damaged one is reported and passed over."""
        steps = self.steps()
        for step in reversed(steps):
            path = self.directory / _name(step)
            fault = find_fault(path)
            if fault is None:
                return path
            logger.warning("checkpoint %s is damaged (%s); %s", path, fault, "taking the one before it" if step != steps[0] else "there is none before it")
        return None

    def save_state(self, directory: Path, state: Mapping[str, Any]) -> None:
        """Keep `state` (JSON values; floats stay exact) with the checkpoint begun at `directory`."""
        with naming(directory):
            write_json_atomic(directory / STATE, state)

    def load_state(self, path: Path) -> dict[str, Any]:
        """What save_state kept with the checkpoint at `path`."""
        return json.loads((path / STATE).read_text(encoding="utf-8"))


def find_fault(path: Path) -> str | None:
    """How the checkpoint at `path` differs from its manifest, or None. Reads every file."""
    try:
        files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    for name, expected in files.items():
        try:
            found = _entry(path / name)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected:
            return f"{name} has {found['bytes']} bytes and hash {found['xxh3_128']}, the manifest {expected['bytes']} and {expected['xxh3_128']}"
    return None


def write_json_atomic(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either the old content or all of the new one."""
    part = path.with_name(f".{path.name}.partial")
    with part.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync(path.parent)


def batch_path(directory: Path, step: int) -> Path:
    """Where save_batch writes the batch of a step."""
    return directory / f"{_name(step)}.safetensors"


def save_batch(directory: Path, step: int, arrays: Mapping[str, np.ndarray], about: Mapping[str, str], keep: int = 3) -> None:
    """Keep what a step was made of, with `about` as the file's metadata; `keep` batches stay, none of a later step, which has been given up."""
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f".{_name(step)}.partial"
    save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, part, dict(about))
    os.replace(part, batch_path(directory, step))
    found = sorted(directory.glob("step-*.safetensors"))
    newest = found.index(batch_path(directory, step))
    for path in found[: max(0, newest + 1 - keep)] + found[newest + 1 :]:
        path.unlink()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _entry(path: Path) -> dict[str, Any]:
    """Size and hash of a file, as the manifest has them."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return {"bytes": path.stat().st_size, "xxh3_128": digest.hexdigest()}


def _sync(path: Path) -> None:
    """Have the disk hold a file's content, or a directory's entries, before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class CheckpointError(OSError):
    """A checkpoint could not be written: one sentence with the reason, the place and the remedy."""


@contextmanager
def naming(directory: Path) -> Iterator[None]:
    """Say which checkpoint an error of writing is about, and that the ones before it are whole; raises CheckpointError.

    torch's own writer has a RuntimeError for a full disk, without a path.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        number, reason, filename = (error.errno, error.strerror, error.filename) if isinstance(error, OSError) else (errno.EIO, str(error).split("\n")[0], None)
        sentence = f"{reason} while writing the checkpoint {directory}; earlier checkpoints are untouched: make room, and go on with checkpoint.resume=auto"
        raise CheckpointError(number, sentence, filename) from error
