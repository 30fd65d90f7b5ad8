"""Held-out figures by hand, and the table that a person looks at."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from minigpt_ray.evaluation import evaluation_metrics, results_table
from minigpt_ray.rl.experience import Prompt, Rollout

NAN = math.nan


def rollout(source: str, tokens: int, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(0, ({"role": "user", "content": "?"},), np.array([1], np.int32), source, None)
    ids = np.zeros(tokens, np.int32)
    return Rollout(prompt, 0, ids, np.ones(tokens, bool), np.zeros(tokens, np.float32), ids, "", finish_reason)


ROLLOUTS = [rollout("sums", 2), rollout("sums", 4, "length"), rollout("words", 3), rollout("words", 7)]


def test_accuracy_counts_full_scores_of_prompts_with_an_answer() -> None:
    """Right, almost right, right, no answer."""
    metrics = evaluation_metrics(ROLLOUTS, verified=[1.0, 0.9, 1.0, NAN], rewards=[1.0, 0.9, 0.5, 0.0])
    assert metrics == {
        "eval/accuracy": pytest.approx(2 / 3),
        "eval/mean_reward": pytest.approx(0.6),
        "eval/avg_response_len": 4.0,
        "eval/truncated_fraction": 0.25,
        "eval/accuracy/sums": 0.5,
        "eval/accuracy/words": 1.0,
    }


def test_one_source_is_not_named_apart_and_the_prefix_is_free() -> None:
    metrics = evaluation_metrics(ROLLOUTS[:2], [1.0, 1.0], [1.0, 1.0], prefix="eval/sampled_")
    assert set(metrics) == {f"eval/sampled_{name}" for name in ("accuracy", "mean_reward", "avg_response_len", "truncated_fraction")}


def test_without_answers_accuracy_is_nan_and_the_rest_is_measured() -> None:
    metrics = evaluation_metrics(ROLLOUTS[:1], [NAN], [0.25])
    assert math.isnan(metrics["eval/accuracy"])
    assert (metrics["eval/mean_reward"], metrics["eval/avg_response_len"]) == (0.25, 2.0)


def test_the_table_has_a_row_for_each_model() -> None:
    greedy = evaluation_metrics(ROLLOUTS, [1.0, 0.0, 1.0, 1.0], [1.0] * 4)
    sampled = evaluation_metrics(ROLLOUTS, [0.0, 0.0, 1.0, 0.0], [1.0] * 4, "eval/sampled_")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table({"sft": greedy, "ppo": greedy | sampled}, num_prompts=4))
    sft, ppo = (line.split() for line in console.export_text().splitlines() if any(name in line for name in ("sft", "ppo")))
    assert [cell for cell in sft if cell.isalnum() or "." in cell] == ["sft", "75.0%", "1.000", "4.0"]
    assert [cell for cell in ppo if cell.isalnum() or "." in cell] == ["ppo", "75.0%", "25.0%", "1.000", "4.0"]
