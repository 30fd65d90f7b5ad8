"""Sources of a mix -> examples: what is written of a record, and the texts that it is judged by."""

import glob
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from minigpt_ray.config import AnySource, FileSource, HubSource, TaskSource
from minigpt_ray.data.formats import FORMATS, PAIR_FORMATS, Conversation, Format, Message, PairOfAnswers, expect, recognise
from minigpt_ray.data.reasoning import check_scores, distinct
from minigpt_ray.data.records import DataError, Object, Record, names_of, read_records, without_nulls
from minigpt_ray.data.rows import source_of

Watch = Callable[[str, int, int], object]
"""Told what is read, how much of it is done, and how much it is."""

ALL_FORMATS: dict[str, Format[Any]] = {**PAIR_FORMATS, **FORMATS}
OPTIONAL = ("input", "source")
"""Fields that a mapping may name though some records do not have them."""


@dataclass(frozen=True)
class Example:
    """One row of a data set that is made."""

    value: Object
    """What is written."""
    text: str
    """All that is in it, for filters."""
    said: str
    """The same without the system's turn, which many rows may have in common: what makes two rows duplicates."""
    opening: str
    """The user's first turn, or a whole document: what must not be on both sides of the split."""
    place: str


@dataclass(frozen=True)
class Unusable:
    """A record of which no row is made."""

    reason: str
    """`malformed`, or `tie` when its answers are equally good."""
    sentence: str


def read_source(kind: str, name: str, source: AnySource, size: int, seed: int, watch: Watch) -> Iterator[Example | Unusable]:
    """What the records of a source become; `kind` is what is made of them, `size` how many questions a task is asked for.

    Raises DataError for what cannot be read, and for a malformed record where the source refuses those.
    """
    file, began = None, ("", "")
    for now, raw in _records(f"{kind}.sources.{name}", source, size, seed, watch):
        try:
            record = _mapped(raw, source.fields)
            if now != file:
                file, began = now, (recognise(record, ALL_FORMATS), record.place)
            expect(record, *began, ALL_FORMATS)
            read = ALL_FORMATS[began[0]].read(record, source.separator)
            made = [MAKE[kind](item, source_of(record, name), record.place) for item in read]
        except DataError as error:
            if source.malformed == "refuse":
                raise
            yield Unusable("malformed", str(error))
            continue
        yield from made
        if not made:
            yield Unusable("tie", f"{record.place}: its answers are equally good")


# ----------------------------------------------------------------------------------------------------- reading


def _records(at: str, source: AnySource, size: int, seed: int, watch: Watch) -> Iterator[tuple[str, Record]]:
    """Records, each with the file that it is from."""
    if isinstance(source, TaskSource):
        return _task(at, source, size, seed, watch)
    return islice(_hub(at, source, watch) if isinstance(source, HubSource) else _stored(at, source, watch), source.first)


def _stored(at: str, source: FileSource, watch: Watch) -> Iterator[tuple[str, Record]]:
    for path in paths(at, source):
        for record in read_records(path, source.cut_at, source.document_characters, partial(_told, watch, str(path), path.stat().st_size)):
            yield str(path), record


def _told(watch: Watch, what: str, total: int, done: int) -> None:
    watch(what, done, total)


def paths(at: str, source: FileSource) -> list[Path]:
    """The files of a source, patterns resolved, in order. Raises DataError when there are none."""
    found: list[Path] = []
    for pattern in source.files:
        found += [Path(match) for match in sorted(glob.glob(pattern, recursive=True))] if glob.has_magic(pattern) else [Path(pattern)]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        raise DataError(f"{at}.files: {missing[0] if missing else ', '.join(source.files)}: no such file; fetch it, or mend the path")
    return found


def _hub(at: str, source: HubSource, watch: Watch) -> Iterator[tuple[str, Record]]:
    try:
        import datasets  # not needed by anything else
    except ImportError:
        raise DataError(f"{at}: kind=hub needs the package datasets, which is not installed; pip install datasets, or fetch files and use kind=file") from None
    try:
        rows = datasets.load_dataset(source.id, source.subset, split=source.split, revision=source.revision, streaming=True)
        for number, row in enumerate(rows, start=1):
            watch(source.id, number, source.first or 0)
            yield source.id, Record(without_nulls(row), f"{source.id}[{source.split}]:row {number}")
    except (OSError, ValueError, httpx.HTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"{at}: {source.id} cannot be read from the hub ({type(error).__name__}: {reason}); mend its name, or fetch files and use kind=file"
        ) from None


def _task(at: str, source: TaskSource, size: int, seed: int, watch: Watch) -> Iterator[tuple[str, Record]]:
    """Questions of a task; others for every kind and source."""
    drawn = int(np.random.SeedSequence([seed, zlib.crc32(at.encode())]).generate_state(1)[0])
    for number, entry in enumerate(distinct(source.task, source.options, size, drawn), start=1):
        check_scores(entry)
        watch(source.task, number, size)
        yield source.task, Record(entry, f"{source.task}:question {number}")


def _mapped(record: Record, fields: dict[str, str]) -> Record:
    """The record with those fields only that are named, found under their paths."""
    if not fields:
        return record
    value = {}
    for name, path in fields.items():
        inner: Any = record.value
        for part in path.split("."):
            inner = inner.get(part) if isinstance(inner, dict) else None
        if inner is not None:
            value[name] = inner
        elif name not in OPTIONAL:
            raise DataError(f"{record.place}: field {path!r}, which fields.{name} names, is missing, found {names_of(record.value)}; mend fields or the row")
    return Record(value, record.place)


# ------------------------------------------------------------------------------------------------------ making


def _document(item: Conversation | PairOfAnswers, source: str, place: str) -> Example:
    text = _text(_answered(item))
    return Example({"text": text, "source": source}, text, text, text, place)


def _demonstration(item: Conversation | PairOfAnswers, source: str, place: str) -> Example:
    messages = _answered(item)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{place}: the row has no answer of the assistant, which demonstrations need; use it for prompts or documents, or name the answer in fields"
        )
    return _example({"messages": messages, "source": source}, messages, place)


def _preference(item: Conversation | PairOfAnswers, source: str, place: str) -> Example:
    if not isinstance(item, PairOfAnswers):
        raise DataError(f"{place}: the row has one answer, but preferences need a better and a worse one; name both in fields as chosen and rejected")
    value = {"prompt": item.prompt, "chosen": [item.chosen], "rejected": [item.rejected], "source": source}
    return _example(value, [*item.prompt, item.chosen, item.rejected], place)


def _prompt(item: Conversation | PairOfAnswers, source: str, place: str) -> Example:
    messages, answer = (item.prompt, None) if isinstance(item, PairOfAnswers) else item
    messages = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    prompt = messages[0]["content"] if len(messages) == 1 else messages
    return _example({"prompt": prompt, **({"answer": answer} if answer else {}), "source": source}, messages, place)


def _example(value: Object, messages: Sequence[Message], place: str) -> Example:
    said = [message for message in messages if message["role"] != "system"]
    opening = next(message["content"] for message in messages if message["role"] == "user")
    return Example(value, _text(messages), _text(said), opening, place)


MAKE: dict[str, Callable[[Conversation | PairOfAnswers, str, str], Example]] = {
    "documents": _document,
    "demonstrations": _demonstration,
    "preferences": _preference,
    "prompts": _prompt,
}
"""What is made -> how, from an item, the name of its source, and its place."""


def _answered(item: Conversation | PairOfAnswers) -> list[Message]:
    """The conversation with its answer: the better one of two, the reference answer of a reasoning-gym entry."""
    if isinstance(item, PairOfAnswers):
        return [*item.prompt, item.chosen]
    messages, answer = item
    if messages[-1]["role"] == "user" and answer is not None and "metadata" in answer and answer["answer"] is not None:
        return [*messages, {"role": "assistant", "content": answer["answer"]}]
    return messages


def _text(messages: Sequence[Message]) -> str:
    return "\n\n".join(message["content"] for message in messages)
