"""Every format becomes the same Row, and every malformed line says where and why."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from minigpt_ray.data.rows import FORMATS, DataError, Record, Row, read_rows, recognise

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ENTRY = {"question": "q", "answer": "a", "metadata": {"source_dataset": "chain_sum"}}


def rows_of(tmp_path: Path, *lines: Any, separator: str | None = None) -> list[Row]:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines))
    return list(read_rows([path], separator))


# format, object, messages, source, answer
ACCEPTED = [
    ("messages", {"messages": [Q, A]}, (Q, A), "data", None),
    ("messages", {"messages": [{"role": "system", "content": "s"}, Q], "source": "x"}, ({"role": "system", "content": "s"}, Q), "x", None),
    ("messages", {"messages": [Q, A], "answer": "a"}, (Q, A), "data", {"answer": "a"}),
    ("prompt", {"prompt": "q"}, (Q,), "data", None),
    ("prompt", {"prompt": [Q, A, Q]}, (Q, A, Q), "data", None),
    ("prompt with answer", {"prompt": "q", "answer": "a"}, (Q,), "data", {"answer": "a"}),
    ("prompt with entry", {"prompt": "q", "entry": ENTRY}, (Q,), "chain_sum", ENTRY),
    ("prompt with entry", {"prompt": "q", "entry": {**ENTRY, "answer": None}, "source": "x"}, (Q,), "x", {**ENTRY, "answer": None}),
    ("entry", {"entry": ENTRY}, (Q,), "chain_sum", ENTRY),
    ("reasoning-gym entry", ENTRY, (Q,), "chain_sum", ENTRY),
    ("prompt with answer", {"prompt": "q", "answer": {"answer": "4", "match": "number"}}, (Q,), "data", {"answer": "4", "match": "number"}),
    ("prompt with answer", {"prompt": "q", "answer": ENTRY, "source": "x"}, (Q,), "x", ENTRY),
    ("ShareGPT", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "answer": "a"}, (Q, A), "data", {"answer": "a"}),
    (
        "ShareGPT",
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "q"}]},
        ({"role": "system", "content": "s"}, Q),
        "data",
        None,
    ),
    ("self-instruct", {"instruction": "q", "instances": [{"input": "i", "output": "a"}]}, ({**Q, "content": "q\n\ni"}, A), "data", None),
    ("question and answer", {"question": "q", "answer": "2+2\n#### 4"}, (Q, {**A, "content": "2+2\n#### 4"}), "data", {"answer": "4", "match": "number"}),
    ("question and answer", {"question": "q", "answer": "a"}, (Q, A), "data", {"answer": "a"}),
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, (Q, A), "data", None),
    ("alpaca", {"instruction": "q", "input": "i", "output": "a"}, ({**Q, "content": "q\n\ni"}, A), "data", None),
    ("alpaca", {"instruction": "q", "output": "a"}, (Q, A), "data", None),
    ("alpaca with response", {"instruction": "q", "input": "", "response": "a"}, (Q, A), "data", None),
    ("text", {"text": "q", "source": "x"}, (Q,), "x", None),
]


@pytest.mark.parametrize(("format", "value", "messages", "source", "answer"), ACCEPTED)
def test_every_format_is_recognised_by_its_fields(tmp_path: Path, format: str, value: Any, messages: Any, source: str, answer: Any) -> None:
    assert recognise(Record(value, "here")) == format
    assert rows_of(tmp_path, value) == [Row(messages, source, answer, f"{tmp_path / 'data.jsonl'}:1")]


def test_the_table_above_has_every_format() -> None:
    assert {format for format, *_ in ACCEPTED} == FORMATS.keys()


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("q\na\nb", [Q, {**A, "content": "a\nb"}]),  # cut at the first occurrence
        ("q", [Q]),
        ("q\n", [Q]),
    ],
)
def test_separator_cuts_text_into_prompt_and_answer(tmp_path: Path, text: str, messages: Any) -> None:
    (row,) = rows_of(tmp_path, {"text": text}, separator="\n")
    assert list(row.messages) == messages
    assert row.prompt == (Q,)


def test_separator_that_leaves_no_prompt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'text' begins with the separator '\\n'"):
        rows_of(tmp_path, {"text": "\na"}, separator="\n")


REFUSED = [
    ([b"{broken"], r":1: not JSON .* found '\{broken'; expected one JSON object a line"),
    ([{"prompt": "q"}, b"{broken"], r":2: not JSON"),
    ([b"[" * 5], "not JSON"),
    ([b'"text"'], r":1: the line is text \(\"text\"\); expected a JSON object"),
    ([b"3"], ":1: the line is a number"),
    ([{"prompt": "q"}, b"", {"prompt": "q"}], ":2: the line is blank; .* remove it"),
    ([{"prompt": "q"}, b'{"prompt": "\xff"}'], r":2: not UTF-8 \(byte 0xff at position 12\)"),
    ([{"chosen": "a", "rejected": "b"}], ":1: the fields 'chosen', 'rejected' are no known format; expected {messages} or"),
    ([{}], "the fields no field are no known format"),
    ([{"prompt": "q"}, {"promt": "q"}], r":2: field 'prompt' is missing, found 'promt'; expected the format 'prompt', as the file began at .*:1"),
    ([{"prompt": "q"}, {"messages": [Q]}], r":2: field 'prompt' is missing, found 'messages'"),
    ([{"prompt": "q", "answer": "a"}, {"prompt": "q"}], ":2: field 'answer' is missing"),
    ([{"prompt": "q"}, {"prompt": "q", "answer": "a"}], ":2: the row has the format 'prompt with answer'; expected the format 'prompt'"),
    ([{"prompt": 3}], "field 'prompt' is a number"),
    ([{"prompt": " "}], "field 'prompt' is empty; expected text"),
    ([{"prompt": None}], "field 'prompt' is null"),
    ([{"prompt": []}], "field 'prompt' is an empty list; expected a list of messages"),
    ([{"prompt": [Q, A]}], "field 'prompt' ends with the assistant's turn"),
    ([{"prompt": "q", "answer": 4}], r"field 'answer' is a number \(4\); expected text; put it into quotes"),
    ([{"prompt": "q", "source": ""}], "field 'source' is empty"),
    ([b'{"prompt": "\\ud800"}'], "half of a surrogate pair"),
    ([{"messages": "q"}], "field 'messages' is text"),
    ([{"messages": ["q"]}], r"message 0 of field 'messages' is text \(\"q\"\); expected a JSON object"),
    ([{"messages": [{"role": "human", "content": "q"}]}], "message 0 of field 'messages' has the role 'human'; expected one of system, user, assistant"),
    ([{"messages": [Q, {"role": "assistant"}]}], "message 1 of field 'messages' has no 'content', found 'role'"),
    ([{"messages": [Q, {"role": "assistant", "content": ""}]}], "message 1 of field 'messages': its content is empty"),
    ([{"messages": [Q, {"role": "system", "content": "s"}]}], "expected it only as the first message"),
    ([{"messages": [A]}], "has no turn of the user"),
    ([{"instruction": "q", "output": ""}], "field 'output' is empty"),
    ([{"instruction": "q", "input": 3, "output": "a"}], "field 'input' is a number"),
    ([{"question": "q", "answer": "work\n#### "}], "the final answer behind '#### ' in field 'answer' is empty"),
    ([{"prompt": "q", "entry": "a"}], "field 'entry' is text"),
    ([{"prompt": "q", "entry": {"question": "q", "answer": "a"}}], "field 'metadata' of the entry is null"),
    ([{"prompt": "q", "entry": {**ENTRY, "metadata": {"x": 1}}}], "'source_dataset' in the entry's metadata is null"),
    ([{"prompt": "q", "answer": {"match": "number"}}], "'answer' of field 'answer' is null"),
    ([{"prompt": "q", "answer": {"answer": "4", "match": "close"}}], r"'match' of field 'answer' is text \(\"close\"\); expected one of exact, number"),
    ([{"conversations": []}], "field 'conversations' is an empty list; expected a list of turns, each with from and value"),
    ([{"conversations": [{"from": "robot", "value": "q"}]}], "turn 0 of field 'conversations' is from 'robot'; expected one of system, human"),
    ([{"conversations": [{"from": "human"}]}], "turn 0 of field 'conversations' has no 'value', found 'from'"),
    ([{"conversations": [{"from": "gpt", "value": "a"}]}], "field 'conversations' has no turn of the user"),
    ([{"instruction": "q", "instances": {}}], "field 'instances' is an empty object; expected a list of objects"),
    ([{"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": ""}]}], ":1, instance 1: field 'output' is missing"),
    ([], "data.jsonl: the file is empty"),
]


@pytest.mark.parametrize(("lines", "message"), REFUSED)
def test_malformed_lines_are_refused_with_place_and_remedy(tmp_path: Path, lines: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        rows_of(tmp_path, *lines)
    assert str(refusal.value).startswith(str(tmp_path / "data.jsonl"))
    assert "\n" not in str(refusal.value)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.jsonl: no such file"):
        list(read_rows([tmp_path / "nowhere.jsonl"]))


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, b'\xef\xbb\xbf{"prompt": "q"}', b"", b"  ")
    assert row.messages == (Q,)


def test_line_separators_inside_a_string_end_no_line(tmp_path: Path) -> None:
    first, second = rows_of(tmp_path, '{"prompt": "a\u2028b\x85c"}'.encode(), {"prompt": "q"})
    assert first.messages[0]["content"] == "a\u2028b\x85c"
    assert second.place.endswith(":2")


def test_rows_are_read_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "q"}\n{broken\n')
    rows = read_rows([path])
    assert next(rows).messages == (Q,)
    with pytest.raises(DataError):
        next(rows)


def test_files_may_differ_in_format(tmp_path: Path) -> None:
    for name, value in (("a.jsonl", {"prompt": "q"}), ("b.jsonl", {"text": "q"})):
        (tmp_path / name).write_text(json.dumps(value))
    assert [row.source for row in read_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])] == ["a", "b"]


def test_a_json_array_is_read_with_the_line_of_every_element(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"prompt": "q"}, {"prompt": "r]"}], indent=2))
    rows = list(read_rows([path]))
    assert [(row.messages[0]["content"], row.place) for row in rows] == [("q", f"{path}:2"), ("r]", f"{path}:5")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"prompt": "q"}', ":1: the element is followed by ''; expected a comma"),
        ('[{"prompt": "q"}\n{"prompt": "q"}]', ":1: the element is followed by"),
        ('[{"prompt": "q"},\n3]', ":2: the element is a number"),
        ('[{"prompt": "q"},\n{broken]', ":2: not JSON"),
        ('[{"prompt": "q"}]\n{"prompt": "q"}', "the JSON array ends here, but the file goes on"),
        ("[]", "the file is empty"),
    ],
)
def test_malformed_arrays_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_rows([path]))


def test_every_instance_of_a_seed_task_is_a_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"instruction": "q", "instances": [{"input": "", "output": "a"}, {"input": "i", "output": "b"}]})
    assert [(row.messages[0]["content"], row.messages[1]["content"]) for row in rows] == [("q", "a"), ("q\n\ni", "b")]


def test_data_error_travels_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("a.jsonl:3: found x")))
    assert (type(error), str(error)) == (DataError, "a.jsonl:3: found x")
