"""Reading data files: every accepted format becomes a Row, every malformed line a sentence that says where and why.

A file is JSON Lines (UTF-8, one object a line), or one JSON array of objects. FORMATS lists what an object may hold;
a file keeps to the format of its first row. Files are read line by line, arrays in one piece.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = ("system", "user", "assistant")
FINAL_ANSWER = "#### "
"""What stands before the final answer in question and answer rows (GSM8K)."""

Object = dict[str, Any]
Message = dict[str, str]


class DataError(ValueError):
    """A data file cannot be used: one sentence with the place, what was found, what was expected and the remedy."""


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


@dataclass(frozen=True)
class Record:
    """One JSON object and where it stands."""

    value: Object
    place: str

    def text(self, name: str) -> str:
        """A field that must hold text which is not blank."""
        if name not in self.value:
            raise DataError(f"{self.place}: field {name!r} is missing, found {_names(self.value)}; add it to this row")
        return check_text(self.value[name], f"{self.place}: field {name!r}")


def read_rows(paths: Iterable[Path], separator: str | None = None) -> Iterator[Row]:
    """Rows of the files, one after the other. `separator` cuts {"text"} rows into prompt and answer. Raises DataError."""
    for path in paths:
        began: tuple[str, str] | None = None
        for record in read_records(path):
            if began is None:
                began = (recognise(record), record.place)
            format, place = began
            missing = [name for name in FORMATS[format][0] if name not in record.value]
            if missing or recognise(record) != format:
                found = f"field {missing[0]!r} is missing, found {_names(record.value)}" if missing else f"the row has the format {recognise(record)!r}"
                raise DataError(f"{record.place}: {found}; expected the format {format!r}, as the file began at {place}; keep one format to a file")
            yield read_row(record, path.stem, separator)


def recognise(record: Record) -> str:
    """Name of the first format whose fields the object has. Raises DataError when there is none."""
    for name, (required, _) in FORMATS.items():
        if record.value.keys() >= set(required):
            return name
    known = " or ".join("{" + ", ".join(required) + "}" for required, _ in FORMATS.values())
    raise DataError(f"{record.place}: the fields {_names(record.value)} are no known format; expected {known}; rename or add the missing field")


def read_row(record: Record, default_source: str, separator: str | None = None) -> Row:
    """The row that an object stands for. Raises DataError when a field is empty or has the wrong type."""
    messages, answer = FORMATS[recognise(record)][1](record, separator)
    if answer is not None and "metadata" in answer:
        default_source = answer["metadata"]["source_dataset"]
    source = record.text("source") if "source" in record.value else default_source
    return Row(tuple(messages), source, answer, record.place)


# ----------------------------------------------------------------------------------------------------- formats


def _messages(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    return conversation(record, "messages"), _answer(record)


def _prompt(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    if isinstance(record.value["prompt"], str):
        return [_user(record.text("prompt"))], _answer(record)
    messages = conversation(record, "prompt")
    if messages[-1]["role"] != "user":
        raise DataError(f"{record.place}: field 'prompt' ends with the assistant's turn; expected the user's; name the field 'messages' for a demonstration")
    return messages, _answer(record)


def _entry(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    answer = _answer(record)
    assert answer is not None
    return [_user(answer["question"])], answer


def _reasoning_gym(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    entry = check_entry({name: record.value[name] for name in ("question", "answer", "metadata")}, record.place)
    return [_user(entry["question"])], entry


def _alpaca(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    question = record.text("instruction")
    if record.value.get("input", "") != "":  # the format leaves it empty, or out, when the instruction says all
        question += "\n\n" + record.text("input")
    return [_user(question), _assistant(record.text("output" if "output" in record.value else "response"))], None


def _question_answer(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    solution = record.text("answer")
    _, marker, final = solution.rpartition(FINAL_ANSWER)
    if marker:
        check_text(final, f"{record.place}: the final answer behind {FINAL_ANSWER!r} in field 'answer'")
    answer = {"answer": final.strip(), "match": "number"} if marker else {"answer": solution.strip()}
    return [_user(record.text("question")), _assistant(solution)], answer


def _text(record: Record, separator: str | None) -> tuple[list[Message], Object | None]:
    text = record.text("text")
    if not separator:
        return [_user(text)], None
    prompt, _, rest = text.partition(separator)
    if not prompt.strip():
        raise DataError(
            f"{record.place}: field 'text' begins with the separator {separator!r}, which leaves no prompt; choose another separator or mend the row"
        )
    return [_user(prompt)] + ([_assistant(rest)] if rest.strip() else []), None


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record, str | None], tuple[list[Message], Object | None]]]] = {
    "messages": (("messages",), _messages),
    "prompt with entry": (("prompt", "entry"), _prompt),
    "prompt with answer": (("prompt", "answer"), _prompt),
    "prompt": (("prompt",), _prompt),
    "entry": (("entry",), _entry),
    "reasoning-gym entry": (("question", "answer", "metadata"), _reasoning_gym),
    "question and answer": (("question", "answer"), _question_answer),
    "alpaca": (("instruction", "output"), _alpaca),
    "alpaca with response": (("instruction", "response"), _alpaca),
    "text": (("text",), _text),
}
"""Format -> (required fields, how a row is read). The first whose fields are all there counts, so the richer ones come first."""


# ----------------------------------------------------------------------------------------------------- fields


_SURROGATE = re.compile("[\ud800-\udfff]")


def check_text(value: Any, what: str) -> str:
    """The value, if it is text that is not blank and can be encoded."""
    if not isinstance(value, str):
        raise DataError(f"{what} is {_kind(value)}; expected text; put it into quotes or mend the row")
    if not value.strip():
        raise DataError(f"{what} is empty; expected text; fill it in or remove the row")
    if _SURROGATE.search(value):
        raise DataError(f"{what} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character; expected valid Unicode; mend the escape")
    return value


def check_entry(value: Any, place: str) -> Object:
    """The value, if it is a reasoning-gym entry: `question`, `answer` (None where a task has no single one), `metadata`."""
    entry = Record(_object(value, f"{place}: field 'entry'"), place)
    entry.text("question")
    if entry.value.get("answer", "") is not None:
        entry.text("answer")
    metadata = _object(entry.value.get("metadata"), f"{place}: field 'metadata' of the entry")
    if not isinstance(metadata.get("source_dataset"), str):
        raise DataError(
            f"{place}: 'source_dataset' in the entry's metadata is {_kind(metadata.get('source_dataset'))}; expected the name of a reasoning-gym task, which scores the answer"
        )
    return entry.value


def _answer(record: Record) -> Object | None:
    if "entry" in record.value:
        return check_entry(record.value["entry"], record.place)
    return {"answer": record.text("answer")} if "answer" in record.value else None


def conversation(record: Record, name: str) -> list[Message]:
    """A field that must hold messages, a turn of the user among them."""
    turns = record.value[name]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{record.place}: field {name!r} is {_kind(turns)}; expected a list of messages, each with role and content")
    messages = []
    for index, turn in enumerate(turns):
        what = f"{record.place}: message {index} of field {name!r}"
        role = _object(turn, what).get("role")
        if role not in ROLES:
            raise DataError(f"{what} has the role {role!r}; expected one of {', '.join(ROLES)}; rename it")
        if role == "system" and index > 0:
            raise DataError(f"{what} has the role 'system'; expected it only as the first message; move it there")
        if "content" not in turn:
            raise DataError(f"{what} has no 'content', found {_names(turn)}; expected text; add it")
        messages.append({"role": role, "content": check_text(turn["content"], f"{what}: its content")})
    if messages[-1]["role"] == "system" or all(message["role"] != "user" for message in messages):
        raise DataError(f"{record.place}: field {name!r} has no turn of the user; expected at least one; add it")
    return messages


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _object(value: Any, what: str) -> Object:
    if not isinstance(value, dict):
        raise DataError(f"{what} is {_kind(value)}; expected a JSON object; mend the row")
    return value


_KINDS = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object", type(None): "null"}


def _kind(value: Any) -> str:
    kind = _KINDS[type(value)]
    return f"an empty {kind.split()[-1]}" if value in ("", [], {}) else f"{kind} ({json.dumps(value)[:40]})"


def _names(value: Object) -> str:
    return ", ".join(map(repr, value)) or "no field"


# ----------------------------------------------------------------------------------------------------- files


def read_records(path: Path) -> Iterator[Record]:
    """The JSON objects of a file and where they stand. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of a JSON Lines file")
    empty = True
    for record in _array(path) if _begins_with_bracket(path) else _lines(path):
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: the file is empty; expected a JSON object a line")


def _lines(path: Path) -> Iterator[Record]:
    blank = None
    with path.open("rb") as file:  # bytes, so that only \n ends a line and an undecodable one can be named
        for number, raw in enumerate(file, start=1):
            place = f"{path}:{number}"
            line = _decode(raw, place)
            if not line.strip():
                blank = blank or place
                continue
            if blank is not None:
                raise DataError(f"{blank}: the line is blank; expected a JSON object, blank lines only at the end; remove it")
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{place}: not JSON ({error}), found {line.strip()[:60]!r}; expected one JSON object a line; mend the line") from None
            yield Record(_object(value, f"{place}: the line"), place)


def _array(path: Path) -> Iterator[Record]:
    text = _decode(path.read_bytes(), f"{path}:1")
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _skip_space(text, at)
        line, counted = line + text.count("\n", counted, at), at
        place = f"{path}:{line}"
        if text[at : at + 1] == "]":
            if text[at + 1 :].strip():
                raise DataError(f"{place}: the JSON array ends here, but the file goes on; expected one array, or one object a line; remove the rest")
            return
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error}), found {text[at : at + 60]!r}; expected an array of JSON objects; mend it") from None
        yield Record(_object(value, f"{place}: the element"), place)
        at = _skip_space(text, at)
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            raise DataError(f"{place}: the element is followed by {text[at : at + 20]!r}; expected a comma or the end of the array; mend it")


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _begins_with_bracket(path: Path) -> bool:
    with path.open("rb") as file:
        for raw in file:
            if raw.strip(b" \t\r\n\xef\xbb\xbf"):
                return raw.strip(b" \t\r\n\xef\xbb\xbf").startswith(b"[")
    return False


def _decode(raw: bytes, place: str) -> str:
    try:
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place}: not UTF-8 (byte {raw[error.start]:#04x} at position {error.start}); expected UTF-8; convert the file, for example with iconv"
        ) from None
