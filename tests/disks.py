"""A disk that is full, for tests with the fixture `small_disk`."""

from contextlib import suppress
from pathlib import Path


def fill(disk: Path) -> Path:
    """Leave no room; returns the file to remove for some."""
    filler = disk / "filler"
    with suppress(OSError), filler.open("ab", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return filler
