"""A mix: filters, duplicates, a split that nothing leaks across, amounts, order."""

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt_ray.cli import read_config
from minigpt_ray.config import FileSource, FiltersConfig, MixConfig
from minigpt_ray.data.duplicates import MARGIN, normalised
from minigpt_ray.data.mix import HELD_OUT, Choice, Tally, choose, sides, take, tally
from minigpt_ray.data.records import DataError
from minigpt_ray.data.spool import Filters, Spool, origins
from tests.data.test_duplicates import prose, windows


def quiet(what: str, done: int, total: int) -> None:
    pass


def file(path: Path, rows: list[Any]) -> dict[str, Any]:
    """A source of rows."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "file", "files": [str(path)]}


def made(directory: Path, number: int = 0, **fields: Any) -> tuple[dict[str, list[Any]], dict[str, Tally], Choice]:
    """What a mix writes, by file; what became of the rows, by kind and source."""
    config = MixConfig.model_validate(fields)
    spool = Spool(directory / f"spool{number}", config)
    spool.read(quiet)
    choice, written = choose(spool, config), {}
    for kind in choice.train:
        for name, rows in ((kind, choice.train[kind]), (HELD_OUT[kind], choice.held_out[kind])):
            counts = spool.write(rows, directory / "out.jsonl")
            written[name] = [json.loads(line) for line in (directory / "out.jsonl").read_text().splitlines()]
            assert counts == dict(sorted(Counter(row["source"] for row in written[name]).items()))
    return written, {f"{of.kind}.{of.name}": of for of in tally(spool, choice)}, choice


def texts(count: int, begin: int = 0) -> list[dict[str, str]]:
    return [{"text": prose(80, begin + n)} for n in range(count)]


# --------------------------------------------------------------------------------------------------------- filters


@pytest.mark.parametrize(
    ("config", "text", "reason"),
    [
        ({"min_characters": 3}, "ab", "too_short"),
        ({"min_characters": 3}, "äöü", None),
        ({"max_characters": 3}, "abcd", "too_long"),
        ({"max_repetition": 0.3}, "the same words again and again, " * 20, "repetitive"),
        ({"max_repetition": 0.3}, prose(600, 0), None),
        ({"keep": ["[0-9]", "x"]}, "x1", None),
        ({"keep": ["[0-9]", "x"]}, "x", "pattern"),
        ({"drop": ["https?://"]}, "see http://a", "pattern"),
        ({"drop": ["https?://", "(?i)buy now"]}, "see", None),
    ],
)
def test_a_row_is_left_out_for_one_reason(config: Any, text: str, reason: str | None) -> None:
    assert Filters(FiltersConfig.model_validate(config)).reason(text, normalised(text)) == reason


# ------------------------------------------------------------------------------------------------------------ kinds


Q, A, B = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("documents", {"text": "t"}, {"text": "t"}),
        ("documents", {"question": "q", "answer": "a"}, {"text": "q\n\na"}),
        ("demonstrations", {"question": "q", "answer": "a"}, {"messages": [Q, A]}),
        ("demonstrations", PAIR, {"messages": [Q, A]}),
        ("preferences", PAIR, {"prompt": [Q], "chosen": [A], "rejected": [B]}),
        ("prompts", {"prompt": "q"}, {"prompt": "q"}),
        ("prompts", {"messages": [Q, A, Q, B]}, {"prompt": [Q, A, Q]}),
        ("prompts", PAIR, {"prompt": "q"}),
        ("prompts", {"question": "q", "answer": "2\n#### 2"}, {"prompt": "q", "answer": {"answer": "2", "match": "number"}}),
    ],
)
def test_what_is_made_of_a_row(tmp_path: Path, kind: str, row: Any, expected: Any) -> None:
    written, _, _ = made(tmp_path, held_out=0, **{kind: {"sources": {"s": file(tmp_path / "a.jsonl", [row])}}})
    assert written[kind] == [{**expected, "source": "s"}]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        ("demonstrations", [{"prompt": "q"}], "a.jsonl:1: the row has no answer of the assistant, which demonstrations need"),
        ("preferences", [{"text": "t"}], "a.jsonl:1: the row has one answer, but preferences need a better and a worse one"),
        ("documents", [{"text": "t"}, {"prompt": "t"}], "a.jsonl:2: field 'text' is missing, found 'prompt'; expected the format 'text', as the file began at"),
        ("documents", [{"text": "t"}, {"text": ""}], "a.jsonl:2: field 'text' is empty"),
        ("documents", [{"x": "t"}], "a.jsonl:1: the fields 'x' are no known format; expected {prompt, chosen, rejected} or"),
    ],
)
def test_rows_that_do_not_fit_are_refused_with_their_place(tmp_path: Path, kind: str, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(tmp_path, **{kind: {"sources": {"s": file(tmp_path / "a.jsonl", rows)}}})


def test_malformed_rows_and_ties_are_dropped_counted_and_named_where_that_is_asked_for(tmp_path: Path) -> None:
    rows = [PAIR, {**PAIR, "chosen": ""}, {**PAIR, "rejected": "a"}, {"prompt": "q"}]
    source = {**file(tmp_path / "a.jsonl", rows), "malformed": "drop"}
    _, tallies, _ = made(tmp_path, held_out=0, preferences={"sources": {"s": source}})
    found = tallies["preferences.s"]
    assert (found.read, found.train, found.dropped["malformed"], found.dropped["tie"]) == (4, 1, 2, 1)
    assert "a.jsonl:2: field 'chosen' is empty" in found.first_malformed


def test_fields_are_found_under_other_names_and_within_objects(tmp_path: Path) -> None:
    rows = [{"id": 1, "task": {"problem": "q"}, "solution": "a", "origin": "x"}, {"id": 2, "task": {"problem": "q2"}, "solution": "a2"}]
    source = {**file(tmp_path / "a.jsonl", rows), "fields": {"question": "task.problem", "answer": "solution", "source": "origin"}}
    written, _, _ = made(tmp_path, held_out=0, demonstrations={"sources": {"s": source}})
    assert {(row["messages"][0]["content"], row["source"]) for row in written["demonstrations"]} == {("q", "x"), ("q2", "s")}
    with pytest.raises(DataError, match=r"a.jsonl:1: field 'task.text', which fields.question names, is missing, found 'id', 'task'"):
        made(tmp_path, 1, demonstrations={"sources": {"s": {**source, "fields": {"question": "task.text", "answer": "solution"}}}})


def test_a_task_gives_demonstrations_and_prompts_with_answers(tmp_path: Path) -> None:
    task = {"kind": "task", "task": "chain_sum", "count": 30}
    written, _, _ = made(tmp_path, held_out=0.2, demonstrations={"sources": {"sums": task}}, prompts={"sources": {"sums": task}})
    assert len(written["prompts"]) + len(written["held_out"]) == 30
    assert all(row["answer"]["metadata"]["source_dataset"] == "chain_sum" for row in written["prompts"])
    assert all(row["messages"][1]["role"] == "assistant" for row in written["demonstrations"])


def test_prompts_with_and_without_answers_are_refused_unless_answers_are_dropped(tmp_path: Path) -> None:
    sources = {"a": file(tmp_path / "a.jsonl", [{"prompt": "q", "answer": "a"}]), "b": file(tmp_path / "b.jsonl", [{"prompt": "r"}])}
    with pytest.raises(DataError, match=r"b.jsonl:1: the prompt has no answer to verify, but that of .*a.jsonl:1 has; set prompts.answers=drop"):
        made(tmp_path, prompts={"sources": sources})
    written, _, _ = made(tmp_path, 1, held_out=0, prompts={"sources": sources, "answers": "drop"})
    assert sorted(written["prompts"], key=lambda row: row["prompt"]) == [{"prompt": "q", "source": "a"}, {"prompt": "r", "source": "b"}]


def test_first_files_and_patterns(tmp_path: Path) -> None:
    for name in ("b", "a"):
        file(tmp_path / f"{name}.jsonl", texts(3, ord(name) * 10))
    source = {"kind": "file", "files": [str(tmp_path / "*.jsonl")], "first": 4}
    _, tallies, _ = made(tmp_path, documents={"sources": {"s": source}})
    assert tallies["documents.s"].read == 4
    with pytest.raises(DataError, match=r"documents.sources.s.files: .*nothing-\*: no such file"):
        made(tmp_path, 1, documents={"sources": {"s": {"kind": "file", "files": [str(tmp_path / "nothing-*")]}}})


def test_the_hub_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"documents.sources.s: kind=hub needs the package datasets, which is not installed; pip install datasets"):
        made(tmp_path, documents={"sources": {"s": {"kind": "hub", "id": "a/b"}}})


# ------------------------------------------------------------------------------------------------------ duplicates


def test_exact_duplicates_are_dropped_within_a_kind_and_the_first_source_keeps_its_row(tmp_path: Path) -> None:
    one, other = file(tmp_path / "a.jsonl", [{"text": "A  b"}, {"text": "a b"}]), file(tmp_path / "b.jsonl", [{"text": "a\nB"}, {"text": "c"}])
    written, tallies, _ = made(tmp_path, held_out=0, documents={"sources": {"x": one, "y": other}}, prompts={"sources": {"z": one}})
    assert sorted(row["text"] for row in written["documents"]) == ["A  b", "c"]
    assert (tallies["documents.x"].dropped["duplicate"], tallies["documents.y"].dropped["duplicate"]) == (1, 1)
    assert len(written["prompts"]) == 1


def test_near_duplicates_are_dropped_unless_their_source_is_templated(tmp_path: Path) -> None:
    rows = [{"text": prose(1000, 0) + str(n)} for n in range(5)]
    source = file(tmp_path / "a.jsonl", rows)
    for number, (fields, left) in enumerate((({}, 1), ({"near_duplicates": None}, 5))):
        assert made(tmp_path, number, documents={"sources": {"s": source}}, **fields)[1]["documents.s"].dropped["near_duplicate"] == 5 - left
    assert not made(tmp_path, 2, documents={"sources": {"s": {**source, "templated": True}}})[1]["documents.s"].dropped["near_duplicate"]


def noisy(text: str, seed: int) -> str:
    """The text with a few letters replaced."""
    random, letters = np.random.default_rng(seed), list(text)
    for place in random.integers(0, len(letters), random.integers(0, 5)):
        letters[place] = "#"
    return "".join(letters)


def test_nothing_leaks_across_the_split(tmp_path: Path) -> None:
    """Two rows of any kinds, one trained on and one held out, never have the same prompt, nor nearly the same."""
    prompts = [noisy(prose(600, n // 4), n) for n in range(160)]
    questions = [{"question": prompt, "answer": prose(300, 5000 + n)} for n, prompt in enumerate(prompts)]
    pairs = [{"prompt": noisy(prompt, 7 * n), "chosen": prose(90, n), "rejected": prose(90, -n % 999)} for n, prompt in enumerate(prompts)]
    written, _, _ = made(
        tmp_path,
        held_out=0.3,
        demonstrations={"sources": {"s": file(tmp_path / "a.jsonl", questions)}},
        preferences={"sources": {"s": file(tmp_path / "b.jsonl", pairs)}},
        prompts={"sources": {"s": file(tmp_path / "c.jsonl", [{"prompt": noisy(prompt, 9 * n)} for n, prompt in enumerate(prompts)])}},
    )

    def prompts_of(*names: str) -> list[str]:
        return [
            row["messages"][0]["content"] if "messages" in row else row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]
            for name in names
            for row in written[name]
        ]

    trained, held_out = prompts_of("demonstrations", "preferences", "prompts"), prompts_of("held_out_demonstrations", "held_out_preferences", "held_out")
    assert len(trained) > 150 and len(held_out) > 40
    assert largest_similarity(trained, held_out) < 0.8


def test_a_dialogue_that_was_cut_at_several_turns_is_on_one_side(tmp_path: Path) -> None:
    turns = [{"role": role, "content": prose(60, n)} for n in range(300) for role in ("user", "assistant")]
    dialogues = [[{**turn, "content": f"{turn['content']} {d}"} for turn in turns[6 * d : 6 * d + 6]] for d in range(100)]
    rows = [{"messages": dialogue[: 2 * depth]} for dialogue in dialogues for depth in (1, 2, 3)]
    written, _, _ = made(tmp_path, held_out=0.3, demonstrations={"sources": {"s": file(tmp_path / "a.jsonl", rows)}})
    openings = [{row["messages"][0]["content"] for row in written[name]} for name in ("demonstrations", "held_out_demonstrations")]
    assert len(openings[0]) + len(openings[1]) == 100 and min(map(len, openings)) > 10 and not openings[0] & openings[1]


def test_a_system_turn_that_all_have_makes_no_duplicates(tmp_path: Path) -> None:
    system = {"role": "system", "content": prose(3000, 0)}
    rows = [{"messages": [system, {"role": "user", "content": prose(40, n)}, {"role": "assistant", "content": prose(40, 100 + n)}]} for n in range(1, 50)]
    _, tallies, _ = made(tmp_path, demonstrations={"sources": {"s": file(tmp_path / "a.jsonl", rows)}})
    assert not tallies["demonstrations.s"].dropped["near_duplicate"] and tallies["demonstrations.s"].held_out < 10


def largest_similarity(some: list[str], others: list[str]) -> float:
    """Of a text of the one list and a text of the other, as they are compared: white space and case aside."""
    left, right = ([windows(normalised(text)) for text in set(texts)] for texts in (some, others))
    return max(len(one & other) / len(one | other) for one, other in itertools.product(left, right) if one is not other)


def test_kept_rows_are_hardly_near_duplicates_of_each_other(tmp_path: Path) -> None:
    rows = [{"text": noisy(prose(500, n // 3), n)} for n in range(90)]
    written, _, _ = made(tmp_path, held_out=0, documents={"sources": {"s": file(tmp_path / "a.jsonl", rows)}})
    kept = [row["text"] for row in written["documents"]]
    assert len(kept) < 60 and all(largest_similarity([text], [other for other in kept if other != text]) < 0.8 + MARGIN for text in kept)


def test_a_cluster_that_makes_the_split_uneven_is_told(tmp_path: Path) -> None:
    rows = [{"question": "the same" if n < 40 else prose(90, n), "answer": prose(90, 1000 + n)} for n in range(120)]
    _, _, choice = made(tmp_path, demonstrations={"sources": {"s": file(tmp_path / "a.jsonl", rows)}})
    assert choice.notes[0].startswith("demonstrations: 33% of the rows begin in the same or nearly the same way")


def test_a_source_that_holds_the_others_back_is_told(tmp_path: Path) -> None:
    sources = {name: file(tmp_path / f"{name}.jsonl", texts(count, begin)) | {"weight": 1} for name, count, begin in (("book", 3, 0), ("web", 90, 10))}
    _, _, choice = made(tmp_path, 1, held_out=0, documents={"sources": sources})
    assert choice.notes == [
        "documents: 6 of the 93 rows of the sources with a weight are taken, because documents.sources.book ends after 3; "
        "set its repeat=true, lower its weight=1, or say how many are wanted with documents.rows"
    ]
    sources["book"]["repeat"] = True
    assert not made(tmp_path, 2, held_out=0, documents={"sources": sources})[2].notes
    assert not made(tmp_path, 3, held_out=0, documents={"sources": sources | {"book": sources["book"] | {"repeat": False}}, "rows": 6})[2].notes


# ----------------------------------------------------------------------------------------------- split and amounts


def test_the_share_of_clusters_is_held_out_and_other_rows_do_not_move_them() -> None:
    prompts, labels = np.random.default_rng(0).integers(0, 2**63, 20000).astype(np.uint64), np.arange(20000)
    held_out = sides(prompts, labels, 0.1, seed=0)
    assert abs(held_out.mean() - 0.1) < 0.01
    assert (sides(prompts[::-1][:100], np.arange(100), 0.1, seed=0) == held_out[::-1][:100]).all()
    assert not (sides(prompts, labels, 0.1, seed=1) == held_out).all()
    assert (held_out <= sides(prompts, labels, 0.2, seed=0)).all() and not sides(prompts, labels, 0.0, seed=0).any()
    together = sides(prompts, labels // 2 * 2, 0.1, seed=0)
    assert (together[::2] == together[1::2]).all()


def amounts(available: list[int], rows: int | None = None, **sources: dict[str, Any]) -> list[int]:
    given = {name: FileSource.model_validate({"files": ["x"], **source}) for name, source in sources.items()}
    return take(origins(MixConfig.model_validate({"documents": {"sources": given, "rows": rows}})), available)


def test_what_each_source_gives() -> None:
    assert amounts([7, 9], a={}, b={"count": 4}) == [7, 4]
    assert amounts([100, 30], a={"weight": 1}, b={"weight": 1}) == [30, 30]
    assert amounts([100, 30], a={"weight": 3}, b={"weight": 1}) == [90, 30]
    assert amounts([100, 30], a={"weight": 3}, b={"weight": 1, "repeat": True}) == [100, 33]
    assert amounts([100, 30, 5], rows=45, a={"weight": 3}, b={"weight": 1}, c={}) == [30, 10, 5]
    assert amounts([3, 4], rows=40, a={"weight": 1, "repeat": True}, b={"count": 10, "repeat": True}) == [30, 10]


@pytest.mark.parametrize(
    ("available", "rows", "sources", "message"),
    [
        ([7], None, {"a": {"count": 8}}, "documents.sources.a: 8 rows are asked for, but it has 7 that are not dropped; ask for fewer, or set its repeat=true"),
        ([7, 90], 20, {"a": {"weight": 1}, "b": {"weight": 1}}, "documents.sources.a: 10 rows are asked for, but it has 7"),
        ([7, 90], 20, {"a": {"weight": 1}, "b": {}}, "documents.rows=20, but the sources without a weight give 90 rows already; raise it"),
        ([0], None, {"a": {"count": 1, "repeat": True}}, "but it has 0"),
    ],
)
def test_too_little_is_refused(available: list[int], rows: int | None, sources: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        amounts(available, rows, **sources)


def test_a_mix_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    source = {**file(tmp_path / "a.jsonl", texts(3)), "filters": {"min_characters": 1000}}
    with pytest.raises(DataError, match="documents: of 0 rows that the filters let through none is left to train on, 0 are held out; loosen"):
        made(tmp_path, documents={"sources": {"s": source}})


def test_repeated_rows_are_held_out_once(tmp_path: Path) -> None:
    source = {**file(tmp_path / "a.jsonl", texts(40)), "count": 100, "repeat": True}
    written, tallies, _ = made(tmp_path, held_out=0.3, documents={"sources": {"s": source}})
    held_out = [row["text"] for row in written["held_out_documents"]]
    assert len(set(held_out)) == len(held_out) == tallies["documents.s"].held_out > 0
    assert not set(held_out) & {row["text"] for row in written["documents"]}
    assert max(Counter(row["text"] for row in written["documents"]).values()) == 3


def test_the_order_and_the_choice_depend_on_the_seed_alone(tmp_path: Path) -> None:
    mix = {"documents": {"sources": {"a": {**file(tmp_path / "a.jsonl", texts(60)), "count": 30}, "b": file(tmp_path / "b.jsonl", texts(20, 500))}}}
    first, again, other = made(tmp_path, 0, **mix)[0], made(tmp_path, 1, **mix)[0], made(tmp_path, 2, seed=1, **mix)[0]
    assert first == again != other
    assert [row["source"] for row in first["documents"]] != sorted(row["source"] for row in first["documents"])


# ---------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", "no source is given; set one of documents.sources"),
        ("documents.sources={a: {kind: file, files: [x], weight: 1, count: 2}}", "documents.sources.a: weight=1.0 and count=2 both say how much is taken"),
        ("documents={sources: {a: {kind: file, files: [x]}}, rows: 3}", "documents: rows=3 is shared by the sources with a weight, but none has one"),
        ("documents.sources={a: {kind: task, task: chain_sum}}", "documents: sources.a: a task has no end; set its count"),
        ("documents.sources={a: {kind: task, task: chain_sum, weight: 1}}", "documents: sources.a has a weight, but a task has no end; set rows"),
        ("preferences.sources={a: {kind: task, task: chain_sum, count: 1}}", "preferences: sources.a.kind=task gives one answer to a question"),
        ("documents.sources={a: {kind: file, files: [x], filters: {drop: ['(']}}}", r"documents.sources.a.filters.drop: '\(' is no regular expression"),
        ("documents.sources={a: {kind: web}}", "documents.sources.a.kind=web: unknown; one of file, hub, task is needed"),
        ("documents.sources={a: {kind: file, files: []}}", "documents.sources.a.files="),
    ],
)
def test_a_mix_that_cannot_be_is_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(MixConfig, [override])
