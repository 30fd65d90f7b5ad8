"""Pairs of a better and a worse answer are recognised in every shape, and refused with place and reason."""

from typing import Any

import pytest

from minigpt_ray.data.formats import PAIR_FORMATS, PairOfAnswers, recognise
from minigpt_ray.data.records import DataError, Record

Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
Q2 = {"role": "user", "content": "q2"}


def read(value: Any) -> list[PairOfAnswers]:
    record = Record(value, "here:1")
    return PAIR_FORMATS[recognise(record, PAIR_FORMATS)].read(record, None)


# format, object, prompt; chosen is A, rejected B
ACCEPTED = [
    ("prompt, chosen and rejected", {"prompt": "q", "chosen": "a", "rejected": "b"}, [Q]),
    ("prompt, chosen and rejected", {"prompt": [Q, A, Q2], "chosen": [A], "rejected": [B]}, [Q, A, Q2]),
    ("prompt, chosen and rejected", {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]}, [Q]),
    ("chosen and rejected", {"chosen": [Q, A], "rejected": [Q, B]}, [Q]),
    ("chosen and rejected", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, [Q]),
    (
        "chosen and rejected",
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: q2\n\nAssistant: b"},
        [Q, A, Q2],
    ),
    ("prompt with scored responses", {"prompt": "q", "responses": ["c", "a", "b"], "scores": [2, 3.5, 1]}, [Q]),
    ("prompt with scored responses", {"prompt": [Q], "responses": [{"text": "b", "score": 1}, {"text": "a", "score": 2}]}, [Q]),
    ("instruction with scored completions", {"instruction": "q", "completions": [{"response": t, "overall_score": s} for t, s in (("a", 9), ("b", 2))]}, [Q]),
    ("prompt with scored completions", {"prompt": "q", "completions": [{"content": "a", "rating": 9}, {"content": "b", "rating": 2}]}, [Q]),
    ("instruction with scored responses", {"instruction": "q", "responses": ["b", "a"], "scores": [0, 1]}, [Q]),
]


@pytest.mark.parametrize(("format", "value", "prompt"), ACCEPTED)
def test_every_format_of_pairs_is_recognised_by_its_fields(format: str, value: Any, prompt: Any) -> None:
    assert recognise(Record(value, "here"), PAIR_FORMATS) == format
    assert read(value) == [PairOfAnswers(prompt, A, B)]


def test_the_table_above_has_every_format() -> None:
    assert {format for format, *_ in ACCEPTED} == PAIR_FORMATS.keys()


@pytest.mark.parametrize(
    "value",
    [
        {"prompt": "q", "chosen": "a", "rejected": " a "},
        {"chosen": [Q, A], "rejected": [Q, A]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1.0]},
        {"prompt": "q", "responses": ["a", "a"], "scores": [1, 2]},
    ],
)
def test_answers_that_are_equally_good_make_no_pair(value: Any) -> None:
    assert read(value) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "field 'chosen' is empty; expected text"),
        ({"prompt": "q", "chosen": [Q2, A], "rejected": [Q2, B]}, "field 'chosen' holds turns before its last that are not those of 'prompt'"),
        ({"prompt": "q", "chosen": [Q], "rejected": [B]}, "field 'chosen' does not end with an answer of the assistant"),
        ({"prompt": [Q, A], "chosen": "a", "rejected": "b"}, "field 'prompt' ends with the assistant's turn"),
        ({"chosen": [Q, A], "rejected": [Q2, B]}, "'chosen' and 'rejected' differ before their last turn"),
        ({"chosen": "a", "rejected": "b"}, r"field 'chosen' begins with 'a'; expected a transcript that begins with '\\n\\nHuman:'"),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, "field 'chosen' does not end with an answer"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: ", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "message 1 of field 'chosen': its content is empty"),
        ({"prompt": "q", "responses": ["a"], "scores": [1]}, "expected a list of two or more scored answers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "expected a list of 2 numbers, one for each of 'responses'"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "2"]}, r"answer 1 of field 'responses': its score is text \(\"2\"\)"),
        (
            {"prompt": "q", "responses": [{"text": "a"}, {"text": "b"}]},
            "answer 0 of field 'responses': its score is null .null., found 'text'; expected a number",
        ),
        ({"prompt": "q"}, "the fields 'prompt' are no known format; expected {prompt, chosen, rejected} or"),
    ],
)
def test_malformed_pairs_are_refused(value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        read(value)
    assert str(refusal.value).startswith("here:1: ") and "\n" not in str(refusal.value)
