"""Rows: every accepted format of conversations becomes a Row, every malformed line a sentence that says where and why.

records.py reads the files, formats.py recognises what a record is. A file keeps to the format of its first row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt_ray.data import formats
from minigpt_ray.data.formats import FINAL_ANSWER, FORMATS, Conversation, Format, Message, conversation, in_one_format
from minigpt_ray.data.records import DataError, Object, Record, read_records

__all__ = [
    "FINAL_ANSWER",
    "FORMATS",
    "DataError",
    "Message",
    "Object",
    "Record",
    "Row",
    "conversation",
    "read_records",
    "read_rows",
    "recognise",
    "rows_of",
    "source_of",
]


@dataclass(frozen=True)
class Row:
    """One conversation from a data file, whatever the format."""

    messages: tuple[Message, ...]
    """`{"role", "content"}`; ends with the user (a prompt) or the assistant (a demonstration)."""
    source: str
    """Where the row comes from; metrics are kept by source."""
    answer: Object | None
    """What a verifier needs: a reasoning-gym entry, `{"answer": text}`, `{"answer": text, "match": "number"}`, or None."""
    place: str
    """`file:line`, for messages."""

    @property
    def prompt(self) -> tuple[Message, ...]:
        """The conversation without the assistant's last turn."""
        return self.messages[:-1] if self.is_demonstration else self.messages

    @property
    def is_demonstration(self) -> bool:
        return self.messages[-1]["role"] == "assistant"


def read_rows(paths: Iterable[Path], separator: str | None = None) -> Iterator[Row]:
    """Rows of the files, one after the other. `separator` cuts {"text"} rows into prompt and answer. Raises DataError."""
    for path in paths:
        for record, format in in_one_format(read_records(path), FORMATS):
            yield from rows_of(record, FORMATS[format], path.stem, separator)


def recognise(record: Record) -> str:
    """Name of the format of conversations that a record has. Raises DataError when it has none."""
    return formats.recognise(record, FORMATS)


def rows_of(record: Record, format: Format[Conversation], default_source: str, separator: str | None = None) -> Iterator[Row]:
    """The rows that a record stands for. Raises DataError when a field is empty or has the wrong type."""
    for messages, answer in format.read(record, separator):
        named = default_source if answer is None or "metadata" not in answer else answer["metadata"]["source_dataset"]
        yield Row(tuple(messages), source_of(record, named), answer, record.place)


def source_of(record: Record, default: str) -> str:
    """Where a record says that it comes from."""
    return record.text("source") if "source" in record.value else default
