"""A directory of prepared data: written whole or not at all, and found again with the config and the hashes that it was made from."""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt_ray.config import JobConfig
from minigpt_ray.data.records import DataError

MANIFEST = "manifest.json"
REMEDY = "choose another run=, or remove the directory to make it anew"


@contextmanager
def unfinished(directory: Path) -> Iterator[Path]:
    """An empty directory beside the one that is to be, until it is committed; what a killed run left there is removed."""
    path = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)  # it has moved away when all went well


def commit(written: Path, directory: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, with the hash of every file, and move the directory into its place."""
    hashes = {str(path.relative_to(written)): sha256_of(path) for path in sorted(written.rglob("*")) if path.is_file()}
    (written / MANIFEST).write_text(json.dumps({**manifest, "sha256": hashes}, indent=2) + "\n", encoding="utf-8")
    written.rename(directory)  # whole or absent


def check_unchanged(directory: Path, config: JobConfig, inputs: Mapping[str, str], indifferent: Collection[str] = ()) -> None:
    """Raises DataError unless the directory was written by this config from these inputs, and its files are as they were.

    `inputs`: path, or what it is -> hash; `indifferent`: fields of the config that the data does not depend on.
    """
    if not (directory / MANIFEST).is_file():
        raise DataError(f"{directory} exists without a {MANIFEST}, so it was not written by this job; {REMEDY}")
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    before, now = _leaves(manifest["config"]), _leaves(relevant(config, indifferent))
    differences = [
        f"{path}: {_quoted(before.get(path))} then, {_quoted(now.get(path))} now" for path in sorted(before | now) if before.get(path) != now.get(path)
    ]
    if differences:
        raise DataError(f"{directory} was made by another config ({'; '.join(differences)}); {REMEDY}")
    for name, digest in inputs.items():
        if manifest["inputs"].get(name) != digest:
            raise DataError(f"{name} is not what it was when {directory} was made from it; {REMEDY}")
    for name, digest in manifest["sha256"].items():
        path = directory / name
        if not path.is_file() or sha256_of(path) != digest:
            raise DataError(f"{path} is {'changed' if path.is_file() else 'missing'} since it was written; {REMEDY}")


def provenance(files: Iterable[Path]) -> str:
    """The manifests of the directories that files were prepared in, each with the beginning of its hash; a file of another origin by its name."""
    manifests = {path.with_name(MANIFEST) if path.with_name(MANIFEST).is_file() else path for path in files}
    return ", ".join(f"{path} (sha256 {sha256_of(path)[:12]})" if path.name == MANIFEST else str(path) for path in sorted(manifests))


def relevant(config: JobConfig, indifferent: Collection[str] = ()) -> dict[str, Any]:
    """The part of the config that the data depends on: not where it is written, nor what is indifferent, a field, or one of a section, `section.field`."""
    tree = config.model_dump(mode="json", exclude={"run", "output_dir"})
    for name in indifferent:
        section, _, field = name.rpartition(".")
        (tree[section] if section else tree).pop(field)
    return tree


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {leaf: value for key, branch in tree.items() for leaf, value in _leaves(branch, f"{path}.{key}" if path else key).items()}


def _quoted(value: Any) -> Any:
    """A text in which no line ends."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and not value.isprintable() else value
