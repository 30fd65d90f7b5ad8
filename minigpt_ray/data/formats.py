"""Recognising what a record is by its fields: a conversation, or a pair of a better and a worse answer.

FORMATS are conversations, PAIR_FORMATS pairs. A file keeps to the format of its first record.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from minigpt_ray.data.records import DataError, Object, Record, check_object, check_text, kind_of, names_of

ROLES = ("system", "user", "assistant")
FINAL_ANSWER = "#### "
"""What stands before the final answer in question and answer rows (GSM8K)."""
MATCHES = ("exact", "number")
"""How an answer is compared; minigpt_ray/data/verification.py does it."""

Message = dict[str, str]
Conversation = tuple[list[Message], Object | None]
"""Messages, and what a verifier needs."""
T = TypeVar("T")


@dataclass(frozen=True)
class PairOfAnswers:
    """A conversation up to the user's last turn, and two ways to go on, each one turn of the assistant."""

    prompt: list[Message]
    chosen: Message
    rejected: Message


@dataclass(frozen=True)
class Format(Generic[T]):
    """A shape that records come in."""

    required: tuple[str, ...]
    """Fields that make it this format."""
    read: Callable[[Record, str | None], list[T]]
    """What a record holds: mostly one, none in a record of answers that are equally good. The text separates prompt and answer of {"text"}."""


def in_one_format(records: Iterable[Record], formats: Mapping[str, Format[Any]]) -> Iterator[tuple[Record, str]]:
    """Each record with its format's name, which is that of the first record. Raises DataError for a record of another."""
    began: tuple[str, str] | None = None
    for record in records:
        began = began or (recognise(record, formats), record.place)
        expect(record, *began, formats)
        yield record, began[0]


def expect(record: Record, format: str, place: str, formats: Mapping[str, Format[Any]]) -> None:
    """Raises DataError unless the record has the format with which the file began at `place`."""
    missing = [name for name in formats[format].required if name not in record.value]
    if missing or recognise(record, formats) != format:
        found = f"field {missing[0]!r} is missing, found {names_of(record.value)}" if missing else f"the row has the format {recognise(record, formats)!r}"
        raise DataError(f"{record.place}: {found}; expected the format {format!r}, as the file began at {place}; keep one format to a file")


def recognise(record: Record, formats: Mapping[str, Format[Any]]) -> str:
    """Name of the first format whose fields the record has. Raises DataError when there is none."""
    for name, format in formats.items():
        if record.value.keys() >= set(format.required):
            return name
    known = " or ".join("{" + ", ".join(format.required) + "}" for format in formats.values())
    raise DataError(f"{record.place}: the fields {names_of(record.value)} are no known format; expected {known}; rename or add the missing field")


# ----------------------------------------------------------------------------------------------- conversations


def _messages(record: Record, separator: str | None) -> list[Conversation]:
    return [(conversation(record, "messages"), _answer(record))]


_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
}


def _sharegpt(record: Record, separator: str | None) -> list[Conversation]:
    turns = record.value["conversations"]
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{record.place}: field 'conversations' is {kind_of(turns)}; expected a list of turns, each with from and value")
    messages = []
    for index, turn in enumerate(turns):
        what = f"{record.place}: turn {index} of field 'conversations'"
        speaker = check_object(turn, what).get("from")
        if speaker not in _SHAREGPT_ROLES:
            raise DataError(f"{what} is from {speaker!r}; expected one of {', '.join(_SHAREGPT_ROLES)}; rename it")
        if "value" not in turn:
            raise DataError(f"{what} has no 'value', found {names_of(turn)}; expected text; add it")
        messages.append({"role": _SHAREGPT_ROLES[speaker], "content": turn["value"]})
    return [(_with_user(_checked(messages, record, "conversations"), record, "conversations"), _answer(record))]


def _prompt(record: Record, separator: str | None) -> list[Conversation]:
    return [(_prompt_messages(record, "prompt"), _answer(record))]


def _entry(record: Record, separator: str | None) -> list[Conversation]:
    answer = _answer(record)
    assert answer is not None
    return [([_user(answer["question"])], answer)]


def _reasoning_gym(record: Record, separator: str | None) -> list[Conversation]:
    entry = check_entry({name: record.value[name] for name in ("question", "answer", "metadata")}, record.place)
    return [([_user(entry["question"])], entry)]


def _alpaca(record: Record, separator: str | None) -> list[Conversation]:
    question = _instruction(record.text("instruction"), record)
    return [([_user(question), _assistant(record.text("output" if "output" in record.value else "response"))], None)]


def _self_instruct(record: Record, separator: str | None) -> list[Conversation]:
    instruction, instances = record.text("instruction"), record.value["instances"]
    if not isinstance(instances, list) or not instances:
        raise DataError(f"{record.place}: field 'instances' is {kind_of(instances)}; expected a list of objects, each with input and output")
    places = [f"{record.place}, instance {index}" for index in range(len(instances))]
    inner = [Record(check_object(value, place), place) for value, place in zip(instances, places, strict=True)]
    return [([_user(_instruction(instruction, instance)), _assistant(instance.text("output"))], None) for instance in inner]


def _question_answer(record: Record, separator: str | None) -> list[Conversation]:
    solution = record.text("answer")
    _, marker, final = solution.rpartition(FINAL_ANSWER)
    if marker:
        check_text(final, f"{record.place}: the final answer behind {FINAL_ANSWER!r} in field 'answer'")
    answer = {"answer": final.strip(), "match": "number"} if marker else {"answer": solution.strip()}
    return [([_user(record.text("question")), _assistant(solution)], answer)]


def _text(record: Record, separator: str | None) -> list[Conversation]:
    text = record.text("text")
    if not separator:
        return [([_user(text)], None)]
    prompt, _, rest = text.partition(separator)
    if not prompt.strip():
        raise DataError(
            f"{record.place}: field 'text' begins with the separator {separator!r}, which leaves no prompt; choose another separator or mend the row"
        )
    return [([_user(prompt)] + ([_assistant(rest)] if rest.strip() else []), None)]


FORMATS: dict[str, Format[Conversation]] = {
    "messages": Format(("messages",), _messages),
    "ShareGPT": Format(("conversations",), _sharegpt),
    "prompt with entry": Format(("prompt", "entry"), _prompt),
    "prompt with answer": Format(("prompt", "answer"), _prompt),
    "prompt": Format(("prompt",), _prompt),
    "entry": Format(("entry",), _entry),
    "reasoning-gym entry": Format(("question", "answer", "metadata"), _reasoning_gym),
    "question and answer": Format(("question", "answer"), _question_answer),
    "self-instruct": Format(("instruction", "instances"), _self_instruct),
    "alpaca": Format(("instruction", "output"), _alpaca),
    "alpaca with response": Format(("instruction", "response"), _alpaca),
    "text": Format(("text",), _text),
}
"""Conversations. The first format whose fields are all there counts, so the richer ones come first."""


# ------------------------------------------------------------------------------------------------------- pairs


def _pair(record: Record, separator: str | None) -> list[PairOfAnswers]:
    prompt = _prompt_messages(record, "prompt")
    answers = [_answer_to(prompt, record, name) for name in ("chosen", "rejected")]
    return _unless_equal(prompt, *answers)


def _pair_of_conversations(record: Record, separator: str | None) -> list[PairOfAnswers]:
    """Both sides are whole conversations, as messages or as transcripts, that differ in the last answer."""
    chosen, rejected = (
        _transcript(record, name) if isinstance(record.value[name], str) else _with_last_answer(conversation(record, name), record, name)
        for name in ("chosen", "rejected")
    )
    if chosen[:-1] != rejected[:-1]:
        raise DataError(
            f"{record.place}: fields 'chosen' and 'rejected' differ before their last turn; expected one conversation with two last answers; remove the row"
        )
    return _unless_equal(chosen[:-1], chosen[-1], rejected[-1])


def _answer_to(prompt: list[Message], record: Record, name: str) -> Message:
    """The assistant's turn of a field that holds it as text, as messages, or at the end of the whole conversation."""
    if not isinstance(record.value[name], list):
        return _assistant(record.text(name))
    messages = _with_last_answer(_checked(record.value[name], record, name), record, name)
    if messages[:-1] not in ([], prompt):
        raise DataError(
            f"{record.place}: field {name!r} holds turns before its last that are not those of 'prompt'; expected one answer to the prompt; mend the row"
        )
    return messages[-1]


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _transcript(record: Record, name: str) -> list[Message]:
    r"""A conversation as one text: "\n\nHuman: ...\n\nAssistant: ...", as in HH-RLHF (arXiv:2204.05862)."""
    begin, *parts = _TURN.split(record.text(name))
    if begin.strip() or not parts:
        raise DataError(
            f"{record.place}: field {name!r} begins with {record.value[name][:40]!r}; expected a transcript that begins with '\\n\\nHuman:', or a list of messages; "
            "put what both have in common into a field 'prompt'"
        )
    turns = [(_assistant if speaker == "Assistant" else _user)(content.strip()) for speaker, content in zip(parts[::2], parts[1::2], strict=True)]
    return _with_last_answer(_with_user(_checked(turns, record, name), record, name), record, name)


_SCORES = ("overall_score", "score", "rating")
_TEXTS = ("response", "text", "content")


def _scored(record: Record, separator: str | None) -> list[PairOfAnswers]:
    """The best and the worst of several scored answers; nothing when they are equally good."""
    question, answers = next((question, answers) for question, answers in _SCORED_FIELDS if {question, answers} <= record.value.keys())
    scored = _scored_answers(record, answers)
    best, worst = max(scored, key=lambda pair: pair[1]), min(scored, key=lambda pair: pair[1])
    if best[1] == worst[1]:
        return []
    return _unless_equal(_prompt_messages(record, question), _assistant(best[0]), _assistant(worst[0]))


def _scored_answers(record: Record, name: str) -> list[tuple[str, float]]:
    """(answer, score) of a list of objects, or of a list of texts beside a list `scores`."""
    values = record.value[name]
    if not isinstance(values, list) or len(values) < 2:
        raise DataError(f"{record.place}: field {name!r} is {kind_of(values)}; expected a list of two or more scored answers")
    if "scores" in record.value:
        scores = record.value["scores"]
        if not isinstance(scores, list) or len(scores) != len(values):
            raise DataError(f"{record.place}: field 'scores' is {kind_of(scores)}; expected a list of {len(values)} numbers, one for each of {name!r}")
        values = [{"text": value, "score": score} for value, score in zip(values, scores, strict=True)]
    found = []
    for index, value in enumerate(values):
        what = f"{record.place}: answer {index} of field {name!r}"
        fields = check_object(value, what)
        text, score = (next((fields[field] for field in names if field in fields), None) for names in (_TEXTS, _SCORES))
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise DataError(f"{what}: its score is {kind_of(score)}, found {names_of(fields)}; expected a number named {' or '.join(_SCORES)}; add it")
        found.append((check_text(text, f"{what}: its text ({' or '.join(_TEXTS)})"), float(score)))
    return found


_SCORED_FIELDS = (("prompt", "responses"), ("instruction", "completions"), ("prompt", "completions"), ("instruction", "responses"))

PAIR_FORMATS: dict[str, Format[PairOfAnswers]] = {
    "prompt, chosen and rejected": Format(("prompt", "chosen", "rejected"), _pair),
    "chosen and rejected": Format(("chosen", "rejected"), _pair_of_conversations),
} | {f"{question} with scored {answers}": Format((question, answers), _scored) for question, answers in _SCORED_FIELDS}
"""A better and a worse answer to the same prompt."""


def _unless_equal(prompt: list[Message], chosen: Message, rejected: Message) -> list[PairOfAnswers]:
    return [] if chosen["content"].strip() == rejected["content"].strip() else [PairOfAnswers(prompt, chosen, rejected)]


# ------------------------------------------------------------------------------------------------------ fields


def check_entry(value: Any, place: str) -> Object:
    """The value, if it is a reasoning-gym entry: `question`, `answer` (None where a task has no single one), `metadata`."""
    entry = Record(check_object(value, f"{place}: field 'entry'"), place)
    entry.text("question")
    if entry.value.get("answer", "") is not None:
        entry.text("answer")
    metadata = check_object(entry.value.get("metadata"), f"{place}: field 'metadata' of the entry")
    if not isinstance(metadata.get("source_dataset"), str):
        raise DataError(
            f"{place}: 'source_dataset' in the entry's metadata is {kind_of(metadata.get('source_dataset'))}; expected the name of a reasoning-gym task, which scores the answer"
        )
    return entry.value


def _answer(record: Record) -> Object | None:
    """What a verifier needs: an entry, a text, or an object that says how the text is compared."""
    if "entry" in record.value:
        return check_entry(record.value["entry"], record.place)
    if "answer" not in record.value:
        return None
    answer = record.value["answer"]
    if not isinstance(answer, dict):
        return {"answer": record.text("answer")}
    if "metadata" in answer:
        return check_entry(answer, record.place)
    text = check_text(answer.get("answer"), f"{record.place}: 'answer' of field 'answer'")
    if answer.get("match", "exact") not in MATCHES:
        raise DataError(f"{record.place}: 'match' of field 'answer' is {kind_of(answer['match'])}; expected one of {', '.join(MATCHES)}")
    return {"answer": text, **({"match": answer["match"]} if "match" in answer else {})}


def _instruction(instruction: str, record: Record) -> str:
    """The instruction, and what it is about, which the formats leave empty, or out, when the instruction says all."""
    return instruction if record.value.get("input", "") == "" else f"{instruction}\n\n{record.text('input')}"


def _prompt_messages(record: Record, name: str) -> list[Message]:
    if isinstance(record.value[name], str):
        return [_user(record.text(name))]
    messages = conversation(record, name)
    if messages[-1]["role"] != "user":
        raise DataError(f"{record.place}: field {name!r} ends with the assistant's turn; expected the user's; name the field 'messages' for a demonstration")
    return messages


def conversation(record: Record, name: str) -> list[Message]:
    """A field that must hold messages, a turn of the user among them."""
    return _with_user(_checked(record.value[name], record, name), record, name)


def _checked(turns: Any, record: Record, name: str) -> list[Message]:
    """The value of a field, if it is a list of messages."""
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{record.place}: field {name!r} is {kind_of(turns)}; expected a list of messages, each with role and content")
    messages = []
    for index, turn in enumerate(turns):
        what = f"{record.place}: message {index} of field {name!r}"
        role = check_object(turn, what).get("role")
        if role not in ROLES:
            raise DataError(f"{what} has the role {role!r}; expected one of {', '.join(ROLES)}; rename it")
        if role == "system" and index > 0:
            raise DataError(f"{what} has the role 'system'; expected it only as the first message; move it there")
        if "content" not in turn:
            raise DataError(f"{what} has no 'content', found {names_of(turn)}; expected text; add it")
        messages.append({"role": role, "content": check_text(turn["content"], f"{what}: its content")})
    return messages


def _with_user(messages: list[Message], record: Record, name: str) -> list[Message]:
    if messages[-1]["role"] == "system" or all(message["role"] != "user" for message in messages):
        raise DataError(f"{record.place}: field {name!r} has no turn of the user; expected at least one; add it")
    return messages


def _with_last_answer(messages: list[Message], record: Record, name: str) -> list[Message]:
    if messages[-1]["role"] != "assistant" or (len(messages) > 1 and messages[-2]["role"] != "user"):
        raise DataError(f"{record.place}: field {name!r} does not end with an answer of the assistant to the user; expected one; mend or remove the row")
    return messages


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}
