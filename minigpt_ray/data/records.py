"""Files -> records: the objects of a data file, one after the other, and the place of each.

    data.jsonl  data.json     an object a line, or one array of objects
    data.txt  data.md         plain text: {"text"} records
    data.parquet              a record a row
    data.jsonl.gz  ....zst    any of the above but Parquet, compressed

Files are streamed: memory holds one record, one batch of Parquet rows, or one block of text.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Object = dict[str, Any]

BLOCK = 1 << 20
LARGEST_ELEMENT = 64 * BLOCK
"""An element of an array that is not complete after so many characters is not JSON."""
PARQUET_ROWS = 512
TEXT_SUFFIXES = (".txt", ".md")
PACKED_SUFFIXES = (".gz", ".zst")


class DataError(ValueError):
    """A data file cannot be used: one sentence with the place, what was found, what was expected and the remedy."""


@dataclass(frozen=True)
class Record:
    """One object and where it stands."""

    value: Object
    place: str

    def text(self, name: str) -> str:
        """A field that must hold text which is not blank."""
        if name not in self.value:
            raise DataError(f"{self.place}: field {name!r} is missing, found {names_of(self.value)}; add it to this row")
        return check_text(self.value[name], f"{self.place}: field {name!r}")


def read_records(path: Path, cut_at: str | None = None, at_least: int = 1, watch: Callable[[int], object] = lambda position: None) -> Iterator[Record]:
    """The records of a file. Raises DataError.

    Plain text is one document, or is cut where `cut_at` stands; pieces are joined until a document has `at_least`
    characters. `watch` is told the position in the file, in bytes.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a file of JSON Lines, JSON, text or Parquet")
    kind = Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix
    empty = True
    with path.open("rb") as raw, _unpacked(raw, path) as file:
        records = _of_kind(kind, raw, file, path, cut_at, at_least)
        while True:
            try:
                record = next(records, None)
            except (EOFError, zlib.error, OSError) as error:
                raise DataError(f"{path}: cannot be read to its end ({error}); expected a whole {path.suffix} file; fetch it again") from None
            if record is None:
                break
            empty = False
            watch(raw.tell())
            yield record
    if empty:
        raise DataError(f"{path}: the file is empty; expected {'text' if kind in TEXT_SUFFIXES else 'a JSON object a line'}")


def _of_kind(kind: str, raw: io.BufferedIOBase, file: io.BufferedIOBase, path: Path, cut_at: str | None, at_least: int) -> Iterator[Record]:
    if kind == ".parquet":
        yield from _parquet(raw, path)
    elif kind in TEXT_SUFFIXES:
        yield from _documents(file, path, cut_at, at_least)
    else:
        yield from _array(file, path) if _begins_with_bracket(path) else _lines(file, path)


@contextmanager
def _unpacked(raw: io.BufferedIOBase, path: Path) -> Iterator[io.BufferedIOBase]:
    """The file's bytes before they were compressed."""
    if path.suffix == ".gz":
        with gzip.GzipFile(fileobj=raw) as packed, io.BufferedReader(packed, BLOCK) as file:
            yield file
    elif path.suffix == ".zst":
        import pyarrow as pa  # knows the format, and takes a moment to import

        with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as packed:
            yield io.BufferedReader(packed, BLOCK)  # type: ignore[type-var]
    else:
        yield raw


# ----------------------------------------------------------------------------------------------------- shapes


def _lines(file: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    blank = None
    for number, raw in enumerate(file, start=1):  # bytes, so that only \n ends a line and an undecodable one can be named
        place = f"{path}:{number}"
        if not raw.strip():
            blank = blank or place
            continue
        if blank is not None:
            raise DataError(f"{blank}: the line is blank; expected a JSON object, blank lines only at the end; remove it")
        yield parse_line(raw, place)


def parse_line(raw: bytes, place: str) -> Record:
    """The object of a line. Raises DataError with the place."""
    line = _decode(raw, place)
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}), found {line.strip()[:60]!r}; expected one JSON object a line; mend the line") from None
    return Record(check_object(value, f"{place}: the line"), place)


def _array(file: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    text, decoder = _Text(file, path), json.JSONDecoder()
    text.skip("[")
    while True:
        following = text.peek()
        place = f"{path}:{text.line}"
        if following == "]":
            text.skip("]")
            if text.peek():
                raise DataError(f"{place}: the JSON array ends here, but the file goes on; expected one array, or one object a line; remove the rest")
            return
        yield Record(check_object(text.decode(decoder, place), f"{place}: the element"), place)
        following = text.peek()
        if following == ",":
            text.skip(",")
        elif following != "]":
            raise DataError(f"{place}: the element is followed by {text.ahead(20)!r}; expected a comma or the end of the array; mend it")


class _Text:
    """The characters of a file, a window of them at a time, and the line where the window begins."""

    def __init__(self, file: io.BufferedIOBase, path: Path):
        self.line = 1
        self._file, self._path = file, path
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._window, self._at, self._counted, self._ended = "", 0, 0, False

    def peek(self) -> str:
        """The next character that is no white space, which now begins the window; empty at the end."""
        while True:
            while self._at < len(self._window) and self._window[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._window) or not self._more():
                self.line += self._window.count("\n", self._counted, self._at)
                self._counted = self._at
                return self._window[self._at : self._at + 1]

    def skip(self, character: str) -> None:
        assert self.peek() == character
        self._at += 1

    def ahead(self, size: int) -> str:
        return self._window[self._at : self._at + size]

    def decode(self, decoder: json.JSONDecoder, place: str) -> Any:
        """The JSON value that begins the window."""
        while True:
            try:
                value, self._at = decoder.raw_decode(self._window, self._at)
                return value
            except (ValueError, RecursionError) as error:
                if isinstance(error, ValueError) and len(self._window) - self._at < LARGEST_ELEMENT and self._more():
                    continue
                raise DataError(f"{place}: not JSON ({error}), found {self.ahead(60)!r}; expected an array of JSON objects; mend it") from None

    def _more(self) -> bool:
        """Read on, as much again as the window holds; False at the end of the file."""
        if self._ended:
            return False
        rest = self._window[self._at :]
        self.line += self._window.count("\n", self._counted, self._at)
        raw = self._file.read(max(BLOCK, len(rest)))
        self._ended = not raw
        try:
            self._window, self._at, self._counted = rest + self._decoder.decode(raw, final=self._ended), 0, 0
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path}: {_not_utf8(error)}, somewhere behind line {self.line}; {_CONVERT}") from None
        return True


def _documents(file: io.BufferedIOBase, path: Path, cut_at: str | None, at_least: int) -> Iterator[Record]:
    """Plain text, cut where a separator stands."""
    document, line, number = "", 1, 1
    for piece in _pieces(file, path, cut_at):
        if not document:
            number = line
        document += piece
        line += piece.count("\n")
        if cut_at and len(document) >= at_least and document.strip():
            yield Record({"text": document.strip("\r\n")}, f"{path}:{number + _blank_lines(document)}")
            document = ""
    if document.strip():
        yield Record({"text": document.strip("\r\n")}, f"{path}:{number + _blank_lines(document)}")


def _pieces(file: io.BufferedIOBase, path: Path, cut_at: str | None) -> Iterator[str]:
    """Text up to and with each separator; all of it is each block when there is none."""
    decoder, rest = codecs.getincrementaldecoder("utf-8-sig")(), ""
    while True:
        raw = file.read(BLOCK)
        try:
            rest += decoder.decode(raw, final=not raw)
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: {_not_utf8(error)}; {_CONVERT}") from None
        *whole, rest = rest.split(cut_at) if cut_at else (rest, "")
        yield from (piece + (cut_at or "") for piece in whole)
        if not raw:
            yield rest
            return


def _blank_lines(document: str) -> int:
    return document[: len(document) - len(document.lstrip("\r\n"))].count("\n")


def _parquet(file: io.BufferedIOBase, path: Path) -> Iterator[Record]:
    """Rows of a Parquet file. A column that is null in a row is a field that the row does not have."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        number = 0
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=PARQUET_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield Record(without_nulls(row), f"{path}:row {number}")
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not Parquet ({error}); expected a whole Parquet file; fetch it again or mend its name") from None


def without_nulls(row: Object) -> Object:
    return {name: value for name, value in row.items() if value is not None}


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as raw, _unpacked(raw, path) as file:
        while block := file.read(512):
            if begin := block.strip(b" \t\r\n\xef\xbb\xbf"):
                return begin.startswith(b"[")
    return False


_CONVERT = "expected UTF-8; convert the file, for example with iconv"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte {error.object[error.start]:#04x} at position {error.start})"


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: {_not_utf8(error)}; {_CONVERT}") from None


# ----------------------------------------------------------------------------------------------------- fields

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(value: Any, what: str) -> str:
    """The value, if it is text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {kind_of(value)}; expected text; put it into quotes or mend the row")
    if not value.strip():
        raise DataError(f"{what} is empty; expected text; fill it in or remove the row")
    if _SURROGATE.search(value):
        raise DataError(f"{what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; expected valid Unicode; mend the escape")
    return value


def check_object(value: Any, what: str) -> Object:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {kind_of(value)}; expected a JSON object; mend the row")
    return value


_KINDS = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


def kind_of(value: Any) -> str:
    """What a value is, in words, and its beginning."""
    if type(value) not in _KINDS:  # of Parquet
        return f"a {type(value).__name__}"
    kind = _KINDS[type(value)]
    return f"an empty {kind.split()[-1]}" if value in ("", [], {}) else f"{kind} ({json.dumps(value, default=str)[:40]})"


def names_of(value: Object) -> str:
    return ", ".join(map(repr, value)) or "no field"
