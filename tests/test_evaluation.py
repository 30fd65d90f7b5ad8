"""Held-out figures by hand, and the table that a person looks at."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from minigpt_ray.evaluation import Judged, evaluation_metrics, figures, pass_figures, results_table, win_rate
from minigpt_ray.rl.experience import Prompt, Rollout

NAN = math.nan


def rollout(source: str, tokens: int, finish_reason: str = "stop", serial: int = 0) -> Rollout:
    prompt = Prompt(serial, ({"role": "user", "content": "?"},), np.array([1], np.int32), source, None)
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


def judged(verified: list[float], rewards: list[float], failed: list[bool] | None = None, n: int = 1, sources: str = "ab") -> Judged:
    """n answers to each prompt, whose sources alternate; one reward source of weight 1."""
    rollouts = [rollout(sources[i // n % len(sources)], 3, serial=i // n) for i in range(len(verified))]
    return Judged(rollouts, verified, rewards, {"codes": rewards}, failed or [False] * len(verified))


def test_figures_are_the_metrics_with_the_ends_of_their_intervals() -> None:
    answers = judged([1.0, 0.5, 1.0, NAN], [1.0, 0.5, 1.0, 2.0])
    found = figures(answers, seed=0)
    metrics = evaluation_metrics(answers.rollouts, answers.verified, answers.rewards)
    assert {name: found[name] for name in metrics} == pytest.approx(metrics)
    assert found["eval/verifier_score"] == pytest.approx(2.5 / 3) and found["eval/reward/codes"] == 1.125
    for name in [name for name in found if not name.endswith(("_low", "_high"))]:
        assert found[f"{name}_low"] <= found[name] <= found[f"{name}_high"]
    assert (found["eval/accuracy_low"], found["eval/accuracy_high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)  # Wilson's of 2 in 3


def test_what_there_was_nothing_to_measure_of_is_left_out() -> None:
    found = figures(judged([NAN, NAN], [0.0, 0.0], failed=[True, True]), seed=0)
    assert not [name for name in found if "accuracy" in name or "verifier" in name or "codes" in name] and found["eval/mean_reward"] == 0


def test_several_answers_to_a_prompt_do_not_narrow_the_interval_as_prompts_do() -> None:
    """The same answer drawn four times says no more than drawn once."""
    one, four = judged([1.0, 0.0] * 8, [1.0, 0.0] * 8), judged(np.repeat([1.0, 0.0] * 8, 4).tolist(), np.repeat([1.0, 0.0] * 8, 4).tolist(), n=4)
    assert figures(four, 0)["eval/mean_reward_low"] == figures(one, 0)["eval/mean_reward_low"]
    width = [figures(answers, 0)["eval/accuracy_high"] - figures(answers, 0)["eval/accuracy_low"] for answers in (one, four)]
    assert width[1] > 0.8 * width[0]


def test_pass_at_k_is_a_mean_over_prompts_that_carry_an_answer() -> None:
    """Of four answers two, none and all are right: pass@2 is 1 - 1/6, 0 and 1."""
    found = pass_figures(judged([1.0, 0.0, 1.0, 0.9, *[0.0] * 4, *[1.0] * 4, *[NAN] * 4], [0.0] * 16, n=4), n=4, ks=(1, 2), seed=0)
    assert (found["eval/pass_at_1"], found["eval/pass_at_2"]) == pytest.approx((0.5, (5 / 6 + 0 + 1) / 3))
    assert found["eval/pass_at_1_low"] <= found["eval/pass_at_1"] <= found["eval/pass_at_1_high"]
    assert pass_figures(judged([NAN] * 4, [0.0] * 4, n=4), 4, (1,), 0) == {}


def test_win_rate_compares_answers_to_the_same_prompt_and_halves_ties() -> None:
    ours, theirs = judged([NAN] * 4, [1.0, 0.0, 2.0, 9.0], [False, False, False, True]), judged([NAN] * 4, [0.0, 1.0, 2.0, 0.0])
    found = win_rate(ours, theirs, judge=None, name="sft", seed=0)
    assert found["eval/win_rate/sft"] == 0.5 and win_rate(theirs, ours, "codes", "ppo", 0)["eval/win_rate/ppo"] == 0.5
    assert win_rate(judged([NAN], [5.0]), judged([NAN], [4.0]), None, "sft", 0)["eval/win_rate/sft"] == 1.0


def test_the_table_shows_intervals_pass_at_k_and_win_rates() -> None:
    answers = judged([1.0, 0.0] * 50, [1.0, 0.0] * 50, sources="a")
    ppo = figures(answers, 0) | pass_figures(answers, 1, (1,), 0) | win_rate(answers, answers, None, "sft", 0)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(results_table({"sft": figures(answers, 0), "ppo": ppo}, num_prompts=100))
    text = console.export_text()
    assert "pass@1" in text and "wins against sft" in text and "[40.4, 59.6]" in text and "in brackets: 95 % confidence" in text
