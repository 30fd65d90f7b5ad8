"""Documents for pretraining, read in parallel: files are cut into stretches of bytes, each of which is read by itself.

    stretches = cut([Path("documents.jsonl")])          # in the driver, which reads no document
    for document in read(stretches[0]): ...             # in some worker

A JSON Lines file has a `{"text", "source"}` object a line; a document is of the stretch in which its line begins. A plain
text file (.txt, .md) has no documents of its own: every stretch of it, whole lines, is one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minigpt_ray.data.records import DataError, parse_line
from minigpt_ray.data.rows import source_of

SMALLEST, LARGEST, STRETCHES = 1 << 13, 1 << 20, 256
"""Bytes of a stretch, and how many are aimed at between these bounds: enough of them to keep a small share for validation."""
PLAIN_TEXT = (".txt", ".md")


@dataclass(frozen=True)
class Stretch:
    """The lines of a file that begin in [start, end)."""

    path: Path
    start: int
    """Bytes from the beginning of the file."""
    end: int
    only: str | None = None
    """Source of the documents that are wanted; None: all."""

    @property
    def place(self) -> str:
        return f"{self.path}, bytes {self.start:,} to {self.end:,}"


@dataclass(frozen=True)
class Document:
    """One text and where it comes from."""

    text: str
    source: str


def cut(paths: Sequence[Path], only: str | None = None) -> list[Stretch]:
    """All stretches of the files, in order; their size depends on nothing but the sizes of the files."""
    sizes = [path.stat().st_size for path in paths]
    length = min(LARGEST, max(SMALLEST, sum(sizes) // STRETCHES))
    return [Stretch(path, start, min(start + length, size), only) for path, size in zip(paths, sizes, strict=True) for start in range(0, size, length)]


def read(stretch: Stretch) -> Iterator[Document]:
    """The documents of a stretch. Raises DataError with file and line."""
    with stretch.path.open("rb") as file:
        lines = _lines(file, stretch)
        if stretch.path.suffix in PLAIN_TEXT:
            whole = b"".join(line for _, line in lines)
            documents = iter([Document(_decode(stretch, stretch.start, whole), stretch.path.stem)] if whole.strip() else [])
        else:
            documents = (_parse(stretch, at, line) for at, line in lines)
        yield from (document for document in documents if stretch.only in (None, document.source))


def _lines(file: BinaryIO, stretch: Stretch) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of every line that begins in the stretch."""
    if stretch.start:
        file.seek(stretch.start - 1)
        file.readline()  # the rest of a line that began before, or the line end before this one
    at = file.tell()
    while at < stretch.end and (line := file.readline()):
        yield at, line
        at += len(line)


def _parse(stretch: Stretch, at: int, line: bytes) -> Document:
    try:
        return _document(line, stretch.path, "")
    except DataError:  # said again with the place, for which the file has to be read up to here
        return _document(line, stretch.path, _place(stretch, at))


def _document(line: bytes, path: Path, place: str) -> Document:
    record = parse_line(line, place)
    return Document(record.text("text"), source_of(record, path.stem))


def _decode(stretch: Stretch, at: int, raw: bytes) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        place = _place(stretch, at + error.start)
        raise DataError(f"{place}: not UTF-8 (byte {raw[error.start]:#04x}); expected UTF-8; convert the file, for example with iconv") from None


def _place(stretch: Stretch, at: int) -> str:
    """`file:line` of an offset."""
    line, left = 1, at
    with stretch.path.open("rb") as file:
        while left and (block := file.read(min(left, 1 << 20))):
            line, left = line + block.count(b"\n"), left - len(block)
    return f"{stretch.path}:{line}"
