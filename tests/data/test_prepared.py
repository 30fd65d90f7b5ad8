"""Which prepared data a stage used."""

from pathlib import Path

from minigpt_ray.data.prepared import MANIFEST, commit, provenance, sha256_of, unfinished


def test_provenance_names_each_manifest_once_with_its_hash_and_other_files_as_they_are(tmp_path: Path) -> None:
    directory, other = tmp_path / "prepare_data", tmp_path / "other.jsonl"
    with unfinished(directory) as written:
        for name in ("a.jsonl", "b.jsonl"):
            (written / name).write_text(name)
        commit(written, directory, {})
    manifest = directory / MANIFEST
    assert provenance([directory / "a.jsonl", other, directory / "b.jsonl"]) == f"{other}, {manifest} (sha256 {sha256_of(manifest)[:12]})"
