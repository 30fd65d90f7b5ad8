"""What a run began from: its models and data files by their content, so that a resumed run to which others would be given is refused."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt_ray.checkpoint import write_json_atomic
from minigpt_ray.data.prepared import sha256_of

INPUTS = "inputs.json"
"""In a stage's directory, from the beginning of the run."""
OF_A_MODEL = (".safetensors", ".json", ".jinja", ".model", ".txt")
"""Files of a model directory that a model or its tokenizer is read from."""
PIECES, PIECE_BYTES = 32, 1 << 17


@dataclass(frozen=True)
class Inputs:
    """Models and data files, and their fingerprints, by the name that a user knows them by."""

    paths: Mapping[str, Path]
    fingerprints: Mapping[str, str]

    @classmethod
    def of(cls, models: Mapping[str, str], files: Sequence[Path]) -> "Inputs":
        """`models`: what resolve_model found; those on the hub are left out, since nothing of them need be here yet."""
        directories = {name: Path(path) for name, path in models.items() if Path(path).is_dir()}
        data = {f"data file {number}": path for number, path in enumerate(files, start=1)}
        made = {name: fingerprint_of_model(path) for name, path in directories.items()} | {name: sha256_of(path) for name, path in data.items()}
        return cls(directories | data, made)

    def keep(self, directory: Path) -> None:
        """Write what a run that begins now begins from."""
        write_json_atomic(directory / INPUTS, dict(self.fingerprints))

    def refuse_others(self, directory: Path, start: Path) -> None:
        """Raises ValueError unless these are what the run in `directory`, of which `start` is a checkpoint, began from; without INPUTS that is not known."""
        if not (directory / INPUTS).is_file():
            return
        before = json.loads((directory / INPUTS).read_text(encoding="utf-8"))
        changed = [f"{name}: {self.paths[name]}" for name, now in self.fingerprints.items() if before.get(name, now) != now]
        if changed:
            raise ValueError(
                f"cannot resume from {start}, what it began from has changed since ({', '.join(changed)}); "
                f"undo that, choose another run=, or remove {directory} to begin again from what is there now"
            )


def fingerprint_of_model(directory: Path) -> str:
    """Hash of the names and contents of a model directory's files, not of their dates or their place.

    Weights, which may be many GB on a file system that is shared, count by their size and PIECES evenly spaced pieces of each file, the first
    with its header of names and shapes: training moves weights everywhere, and what is changed by hand between two pieces is not noticed.
    """
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in OF_A_MODEL:
            digest.update(f"{path.name} {_sample(path) if path.suffix == '.safetensors' else sha256_of(path)}\n".encode())
    return digest.hexdigest()


def _sample(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for piece in range(PIECES):
            file.seek(max(0, size - PIECE_BYTES) * piece // (PIECES - 1))
            digest.update(file.read(PIECE_BYTES))
    return digest.hexdigest()
