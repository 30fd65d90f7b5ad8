"""Preference pairs: what a row may hold, and what is refused with its place."""

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt_ray.data.pairs import Pair, read_pairs
from minigpt_ray.data.rows import DataError

USER = {"role": "user", "content": "1+1="}
TWO, THREE = ({"role": "assistant", "content": answer} for answer in ("2", "3"))


def only(tmp_path: Path, row: dict[str, Any]) -> Pair:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    (pair,) = read_pairs([tmp_path / "pairs.jsonl"])
    return pair


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
        {"prompt": "1+1=", "chosen": [USER, TWO], "rejected": "3"},
    ],
    ids=["text", "messages", "whole conversations"],
)
def test_text_and_messages_mean_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    assert only(tmp_path, row) == Pair((USER,), (TWO,), (THREE,), 0.0, "pairs", f"{tmp_path}/pairs.jsonl:1")


def test_margin_and_source_are_kept(tmp_path: Path) -> None:
    pair = only(tmp_path, {"prompt": "1+1=", "chosen": "2", "rejected": "3", "margin": 1, "source": "sums"})
    assert (pair.margin, pair.source) == (1.0, "sums")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rejected": None}, "field 'rejected' is null"),
        ({"chosen": ""}, "field 'chosen' is empty"),
        ({"chosen": []}, "field 'chosen' is an empty list; expected a list of messages"),
        ({"chosen": "3"}, "fields 'chosen' and 'rejected' are the same"),
        ({"prompt": [USER, TWO]}, "field 'prompt' ends with the assistant's turn"),
        ({"chosen": [{"role": "user", "content": "2+2="}, TWO]}, "field 'chosen' begins with other messages than the prompt"),
        ({"chosen": [USER]}, "field 'chosen' ends with the user; expected the assistant's answer"),
        ({"chosen": [{"role": "bot", "content": "2"}]}, "message 0 of field 'chosen' has the role 'bot'"),
        ({"margin": "much"}, "field 'margin' is 'much'; expected a number"),
    ],
)
def test_what_cannot_be_a_pair_is_refused_with_place_and_remedy(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError, match=rf"pairs\.jsonl:1: {sentence}"):
        only(tmp_path, {"prompt": "1+1=", "chosen": "2", "rejected": "3"} | change)


def test_a_missing_field_is_named_beside_those_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pairs\.jsonl:1: field 'rejected' is missing, found 'prompt', 'chosen'"):
        only(tmp_path, {"prompt": "1+1=", "chosen": "2"})
