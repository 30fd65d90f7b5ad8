"""Checking an answer by rule: reasoning-gym's own score, exact text, or the number at the end.

verify(prompt.answer, rollout.text)  ->  1.0 right, 0.0 wrong, between: reasoning-gym's partial credit
"""

import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any

from minigpt_ray.data.rows import FINAL_ANSWER

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

TASK_OPTIONS = "task_options"
"""Key in an entry's metadata for the options it was generated with: some tasks score by them."""

_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def verify(answer: dict[str, Any], text: str) -> float:
    """Score in [0, 1] of `text` against a prompt's answer.

    A reasoning-gym entry is scored by its task (`metadata["source_dataset"]`). `{"answer": text}` asks for the same text,
    white space around it aside; with `"match": "number"` for the same final number. Raises ValueError for an unknown task.
    """
    if "metadata" in answer:
        return score_entry(answer, text)
    return float(MATCHES[answer.get("match", "exact")](answer["answer"], text))


def score_entry(entry: dict[str, Any], text: str) -> float:
    """reasoning-gym's `score_answer` for an entry, which may have been through JSON."""
    metadata = entry["metadata"]
    task = metadata["source_dataset"]
    options = metadata.get(TASK_OPTIONS, {})
    if task in _COMPARES_TUPLES:
        entry = {**entry, "metadata": _tuples(metadata)}
    return float(_dataset(task, json.dumps(options, sort_keys=True)).score_answer(text.strip(), entry))


def same_text(expected: str, text: str) -> bool:
    """Equal, white space around them aside."""
    return expected.strip() == text.strip()


def same_number(expected: str, text: str) -> bool:
    """The number behind the last `#### `, or without one the last number of the text, equals the expected: 1,000 is 1000.0."""
    _, _, tail = text.rpartition(FINAL_ANSWER)
    numbers = _NUMBER.findall(tail)
    wanted = _NUMBER.findall(expected)
    if len(wanted) != 1:  # a final answer that is no number
        return same_text(expected, tail)
    chosen = numbers[:1] if tail != text else numbers[-1:]
    return bool(chosen) and _decimal(chosen[0]) == _decimal(wanted[0])


MATCHES: dict[str, Callable[[str, str], bool]] = {"exact": same_text, "number": same_number}

# These compare boards of tuples by ==, and JSON gave lists back.
_COMPARES_TUPLES = ("arc_agi", "rearc")


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


@cache
def _dataset(task: str, options: str) -> "ProceduralDataset":
    from minigpt_ray.data.reasoning import create  # reasoning-gym takes seconds to import, and only entries need it

    return create(task, json.loads(options), seed=0, size=1)
