"""Versions are those that are imported, and the commit is the checkout's."""

import subprocess
from pathlib import Path

import ray
import torch
import transformers

from minigpt_ray.versions import PACKAGES, _commit, versions


def test_versions_are_those_of_the_libraries() -> None:
    found = versions()
    assert found["torch"] == torch.__version__ and found["transformers"] == transformers.__version__ and found["ray"] == ray.__version__
    assert [name for name in PACKAGES if found[name] is None] == []


def test_the_commit_is_told_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    assert _commit(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    git("tag", "v1")
    assert _commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert _commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"
