"""Preference pairs: two answers to one prompt, and which of them is better.

A file is JSON Lines, or one JSON array, of `{"prompt", "chosen", "rejected"}`, with a `source` and a `margin` where there are any.
The prompt is text or messages; an answer is text, or messages: the answer alone, or the prompt's followed by it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt_ray.data.records import names_of
from minigpt_ray.data.rows import DataError, Message, Record, conversation, read_records, source_of

FIELDS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Pair:
    """Two ways in which a conversation goes on."""

    prompt: tuple[Message, ...]
    """Ends with the user."""
    chosen: tuple[Message, ...]
    """What follows the prompt; ends with the assistant."""
    rejected: tuple[Message, ...]
    margin: float
    """By how much the chosen answer is better, in the unit of rewards; 0 where the file does not say."""
    source: str
    place: str
    """`file:line`, for messages."""


def read_pairs(paths: Iterable[Path]) -> Iterator[Pair]:
    """The pairs of the files, one after the other. Raises DataError."""
    for path in paths:
        for record in read_records(path):
            yield read_pair(record, path.stem)


def read_pair(record: Record, default_source: str) -> Pair:
    """The pair that an object stands for. Raises DataError when a field is missing, empty or of the wrong type."""
    missing = [name for name in FIELDS if name not in record.value]
    if missing:
        raise DataError(
            f"{record.place}: field {missing[0]!r} is missing, found {names_of(record.value)}; expected prompt, chosen and rejected; add it to this row"
        )
    prompt = _prompt(record)
    chosen, rejected = (_answer(record, name, prompt) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise DataError(f"{record.place}: fields 'chosen' and 'rejected' are the same; expected two answers of which one is better; remove the row")
    return Pair(prompt, chosen, rejected, _margin(record), source_of(record, default_source), record.place)


def _prompt(record: Record) -> tuple[Message, ...]:
    if not isinstance(record.value["prompt"], list):
        return ({"role": "user", "content": record.text("prompt")},)
    messages = conversation(record, "prompt")
    if messages[-1]["role"] != "user":
        raise DataError(f"{record.place}: field 'prompt' ends with the assistant's turn; expected the user's; move it into chosen and rejected")
    return tuple(messages)


def _answer(record: Record, name: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    turns = record.value[name]
    if not isinstance(turns, list):
        return ({"role": "assistant", "content": record.text(name)},)
    if turns and isinstance(turns[0], dict) and turns[0].get("role") == "assistant":
        turns = [*prompt, *turns]
    messages = tuple(conversation(Record({name: turns}, record.place), name))
    if messages[: len(prompt)] != prompt:
        raise DataError(
            f"{record.place}: field {name!r} begins with other messages than the prompt; expected the prompt's or the assistant's first; mend the row"
        )
    if messages[-1]["role"] != "assistant" or len(messages) == len(prompt):
        raise DataError(f"{record.place}: field {name!r} ends with the user; expected the assistant's answer; add it or remove the row")
    return messages[len(prompt) :]


def _margin(record: Record) -> float:
    margin = record.value.get("margin")
    if isinstance(margin, bool) or not isinstance(margin, int | float | None):
        raise DataError(f"{record.place}: field 'margin' is {margin!r}; expected a number; mend or remove it")
    return float(margin or 0)
