"""Sampled conversations: the same held-out questions early, midway and late, and training samples through the run."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from minigpt_ray.report.drawing import table

Sample = Mapping[str, Any]
"""A row of samples.jsonl."""

SHOWN = 10
"""Conversations of each kind."""


def compared_answers(samples: Sequence[Sample]) -> tuple[list[int], list[list[Sample]]]:
    """Steps of the first, the middle and the last evaluation, and the answers of these to the same prompts, one list for each prompt.

    Of two evaluations there are two columns; of fewer there is nothing to compare: ([], []).
    """
    evaluated = [row for row in samples if row["kind"] == "eval"]
    steps = sorted({row["step"] for row in evaluated})
    if len(steps) < 2:
        return [], []
    half = (steps[0] + steps[-1]) / 2
    chosen = sorted({steps[0], min(steps, key=lambda step: (abs(step - half), step)), steps[-1]})
    answers = [{row["prompt"]: row for row in evaluated if row["step"] == step} for step in chosen]
    return chosen, [[by_prompt[prompt] for by_prompt in answers] for prompt in answers[0] if all(prompt in by_prompt for by_prompt in answers)]


def spread(samples: Sequence[Sample], number: int) -> list[Sample]:
    """So many of them at equal distances, the first and the last included."""
    if len(samples) <= number:
        return list(samples)
    return [samples[round(place * (len(samples) - 1) / (number - 1))] for place in range(number)]


def answer_tables(samples: Sequence[Sample]) -> Iterator[str]:
    """HTML of both kinds, as far as there are some."""
    steps, prompts = compared_answers(samples)
    if prompts:
        header = ["question", "expected", *(title for step in steps for title in (f"answer at step {step}", "reward"))]
        cells = [[rows[0]["prompt"], rows[0]["answer"], *(cell for row in rows for cell in (row["response"], _reward(row)))] for rows in prompts[:SHOWN]]
        yield f"<h3>Held-out questions, early and late</h3>{table(header, cells, 'samples')}"
    trained = spread([row for row in samples if row["kind"] == "train"], SHOWN)
    if trained:
        cells = [[row["step"], row["prompt"], row["answer"], row["response"], _reward(row)] for row in trained]
        yield f"<h3>Training samples, from the first step to the last</h3>{table(['step', 'question', 'expected', 'answer', 'reward'], cells, 'samples')}"


def _reward(row: Sample) -> str:
    return "–" if row["reward"] is None else f"{row['reward']:.2f}"
