"""Sets of questions that share none, and their verification."""

import json

import numpy as np
import pytest

from minigpt_ray.data.reasoning import apportion, content, create, distinct, generate, split
from minigpt_ray.data.rows import DataError
from minigpt_ray.data.verification import verify

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SIZES = {"demonstrations": 30, "prompts": 50, "held_out": 20}


def test_no_question_is_in_two_sets_or_twice_in_one() -> None:
    sets = split({"chain_sum": (1.0, SUMS), "spell_backward": (3.0, {})}, SIZES, seed=0)
    assert {name: len(entries) for name, entries in sets.items()} == SIZES
    questions = [content(entry) for entries in sets.values() for entry in entries]
    assert len(set(questions)) == len(questions)


def test_sets_are_mixed_by_weight() -> None:
    sets = split({"chain_sum": (1.0, SUMS), "spell_backward": (3.0, {})}, {"a": 40, "b": 20}, seed=0)
    for entries, sums in ((sets["a"], 10), (sets["b"], 5)):
        kinds = [entry["metadata"]["source_dataset"] for entry in entries]
        assert kinds.count("chain_sum") == sums
        assert "spell_backward" in kinds[:sums] or "chain_sum" in kinds[sums:]  # shuffled


def test_the_same_seed_gives_the_same_sets_and_the_next_seed_others() -> None:
    tasks = {"chain_sum": (1.0, {})}
    first, again, other = (split(tasks, SIZES, seed) for seed in (0, 0, 1))
    assert first == again
    asked = [{content(entry) for entries in sets.values() for entry in entries} for sets in (first, other)]
    assert len(asked[0] & asked[1]) < 20  # with seeds used as they are, all but one would be shared


def test_sets_are_equally_hard() -> None:
    sets = split({"chain_sum": (1.0, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2})}, {"a": 400, "b": 400}, seed=0)
    digits = [np.mean([entry["metadata"]["num_digits"] for entry in entries]) for entries in sets.values()]
    assert abs(digits[0] - digits[1]) < 0.15


def test_a_set_may_have_easier_questions_of_its_own_and_shares_none() -> None:
    easier = {("demonstrations", "spell_backward"): {"max_word_len": 5}}
    sets = split({"spell_backward": (1.0, {"min_word_len": 3, "max_word_len": 9})}, SIZES, seed=0, differing=easier)
    lengths = {name: [entry["metadata"]["word_len"] for entry in entries] for name, entries in sets.items()}
    assert max(lengths["demonstrations"]) == 5 and max(lengths["prompts"]) == 9 and min(lengths["prompts"]) <= 5
    questions = [content(entry) for entries in sets.values() for entry in entries]
    assert len(set(questions)) == len(questions)


def test_a_task_that_runs_out_is_named_with_what_it_gave() -> None:
    with pytest.raises(DataError, match=r"tasks.chain_sum: 4000 draws gave (19\d|200) distinct questions, but the sets need 300"):
        distinct("chain_sum", SUMS, 300, seed=0)


def test_unknown_task_and_options_are_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"tasks.chain_sums: reasoning-gym has no such task; expected one of chain_sum"):
        create("chain_sums", {}, 0, 1)
    with pytest.raises(DataError, match=r"tasks.chain_sum.options=.*'max_term'"):
        create("chain_sum", {"max_term": 3}, 0, 1)
    with pytest.raises(DataError, match="min_terms must be positive"):
        create("chain_sum", {"min_terms": 0}, 0, 1)
    with pytest.raises(DataError, match=r"tasks.chain_sum.options.seed is chosen by the split"):
        create("chain_sum", {"seed": 3}, 0, 1)


@pytest.mark.parametrize(
    ("total", "weights", "shares"), [(10, [1.0, 1.0], [5, 5]), (10, [1.0, 2.0], [3, 7]), (3, [1.0, 1.0], [2, 1]), (1, [1.0, 9.0], [0, 1]), (7, [0.5], [7])]
)
def test_shares_are_whole_and_add_up(total: int, weights: list[float], shares: list[int]) -> None:
    assert apportion(total, weights) == shares


@pytest.mark.parametrize("task", ["chain_sum", "spell_backward", "arc_agi", "rearc", "time_intervals", "puzzle24", "word_ladder"])
def test_an_entry_scores_its_own_answer_in_full_after_json(task: str) -> None:
    for entry in generate(task, {}, 2, seed=3):
        assert verify(json.loads(json.dumps(entry)), entry["answer"]) == 1.0
        assert verify(json.loads(json.dumps(entry)), "no idea") < 0.5


def test_entries_are_scored_with_the_options_they_were_made_with() -> None:
    """word_ladder knows the words of its default length only, unless it is told."""
    (entry,) = generate("word_ladder", {"min_word_length": 3, "max_word_length": 3}, 1, seed=0)
    assert verify(entry, entry["answer"]) == 1.0
    without = {**entry, "metadata": {k: v for k, v in entry["metadata"].items() if k != "task_options"}}
    with pytest.raises(KeyError):
        verify(without, entry["answer"])


def test_white_space_around_an_answer_does_not_count() -> None:
    (entry,) = generate("chain_sum", {}, 1, seed=0)
    assert verify(entry, f" {entry['answer']}\n") == 1.0


def test_partial_credit_is_reasoning_gym_s_own() -> None:
    (entry,) = generate("spell_backward", {"min_word_len": 5, "max_word_len": 5}, 1, seed=0)
    wrong = "#" + entry["answer"][1:]
    assert verify(entry, wrong) == pytest.approx(0.8)


def test_entry_of_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="reasoning-gym has no such task"):
        verify({"question": "q", "answer": "a", "metadata": {"source_dataset": "no_such"}}, "a")


@pytest.mark.parametrize(
    ("answer", "text", "score"),
    [
        ({"answer": "Paris"}, " Paris\n", 1.0),
        ({"answer": "Paris"}, "paris", 0.0),
        ({"answer": "4"}, "2 + 2 = 4", 0.0),
        ({"answer": "4", "match": "number"}, "2 + 2 = 4", 1.0),
        ({"answer": "4", "match": "number"}, "2 + 2 = 4.", 1.0),
        ({"answer": "4", "match": "number"}, "4 or 5", 0.0),
        ({"answer": "4", "match": "number"}, "so\n#### 4\nand 5", 1.0),
        ({"answer": "4", "match": "number"}, "4\n#### 5", 0.0),
        ({"answer": "1,000", "match": "number"}, "$1000.00", 1.0),
        ({"answer": "-3", "match": "number"}, "3", 0.0),
        ({"answer": "4", "match": "number"}, "none", 0.0),
        ({"answer": "4", "match": "number"}, "", 0.0),
        ({"answer": "4", "match": "number"}, "4\n#### ", 0.0),
        ({"answer": "4", "match": "number"}, "Four, ", 0.0),
    ],
)
def test_plain_answers(answer: dict[str, str], text: str, score: float) -> None:
    assert verify(answer, text) == score
