"""The report: one page that needs nothing else, with a panel for what was measured and none for what was not."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jobs.report import main
from minigpt_ray.cli import write_resolved
from minigpt_ray.config import PPOConfig
from minigpt_ray.report import write_report
from minigpt_ray.report.answers import compared_answers, spread
from minigpt_ray.report.curves import draw_panel, series, smooth
from minigpt_ray.report.page import REWARDS_DIFFER, headline_rows
from minigpt_ray.report.panels import PANELS
from tests.report.example import sample, write_run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


class Wellformed(HTMLParser):
    """Counts elements and refuses a close without its open."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def parse(path):
    page = Wellformed()
    page.feed(path.read_text())
    assert not page.open
    return page


def test_the_page_is_whole_and_needs_no_network(run):
    path = write_report(run)
    assert path == run / "report.html"
    parse(path)
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", path.read_text())
    assert not re.search(r"<(script|link|img|iframe)\b|@import|(src|href)=\"(?!#)", text)


def test_panels_show_what_was_measured_and_stages_come_in_order(run):
    page = parse(write_report(run))
    assert [name for name in page.text if name in ("sft", "ppo")] == ["sft", "ppo"] * 2  # links, then chapters
    for title in ("Reward", "Held-out exact match", "Loss", "Where the time goes", "rollout 75%", "learn 25%"):
        assert title in page.text
    for title in ("KL to the reference", "Entropy", "Critic loss"):  # nan throughout, or never logged
        assert title not in page.text
    assert page.seen.count("svg") == 6  # the two of sft: loss and time


def test_answers_are_escaped_and_compared_between_first_and_last_evaluation(run):
    path = write_report(run)
    text = path.read_text()
    assert "answer at step 0" in text and "answer at step 50" in text
    assert "&lt;b&gt;50&lt;/b&gt;" in text and "<b>50" not in text


def test_headline_holds_the_models_of_evaluate_and_ppos_own_evaluations(run):
    (run / "evaluate").mkdir()
    (run / "evaluate/results.json").write_text(json.dumps({"sft": {"eval/accuracy": 0.4}, "ppo": {"eval/accuracy": 0.65, "eval/avg_response_len": 8.26}}))
    text = write_report(run).read_text()
    assert "65.0%" in text and "8.3" in text and "ppo, last evaluation (step 50)" in text and REWARDS_DIFFER in text
    rows = headline_rows({"ppo": [{"step": step, "eval/accuracy": value} for step, value in ((0, 0.5), (5, 0.7), (9, math.nan))]}, {})
    assert list(rows) == ["ppo, first evaluation (step 0)", "ppo, best evaluation (step 5)", "ppo, last evaluation (step 9)"]


def test_answers_to_the_same_prompt_stand_side_by_side():
    samples = [sample(0, "eval", "a"), sample(0, "eval", "b"), sample(3), *(sample(step, "eval", "b", f"{step}") for step in (2, 5, 9))]
    steps, rows = compared_answers(samples)
    assert steps == [0, 5, 9] and [[row["response"] for row in prompt] for prompt in rows] == [["4", "5", "9"]]
    assert compared_answers(samples[:4])[0] == [0, 2]  # of two evaluations, no middle
    assert compared_answers(samples[:3]) == ([], [])


def test_training_samples_are_spread_from_the_first_to_the_last():
    assert spread([sample(step) for step in range(101)], 11) == [sample(step) for step in range(0, 101, 10)]
    assert spread([sample(0)], 11) == [sample(0)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_is_shorter_than_the_window_is_smoothed_too(size):
    """A run of two steps has a report."""
    smoothed = smooth(np.arange(size), 5)
    assert len(smoothed) == size and smoothed.mean() == pytest.approx((size - 1) / 2)


def test_smoothing_keeps_a_constant_and_series_leaves_out_what_is_not_finite():
    assert smooth(np.full(7, 3.0), 3) == pytest.approx(np.full(7, 3.0))
    assert smooth(np.array([0.0, 3.0, 6.0]), 3) == pytest.approx([1.5, 3.0, 4.5])
    steps, values = series([{"step": 1, "a": 2.0}, {"step": 2, "a": math.nan}, {"step": 3}], "a")
    assert (steps.tolist(), values.tolist()) == ([1.0], [2.0])


def test_a_directory_without_a_run_is_refused_in_one_sentence(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2 and "no <stage>/metrics.jsonl with a row in it" in capsys.readouterr().err


@pytest.mark.slow
def test_it_runs_as_a_module(run):
    done = subprocess.run([sys.executable, "-m", "jobs.report", str(run)], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=True)
    assert done.stdout.strip() == str(run / "report.html")


def test_a_run_that_is_going_has_a_report(run):
    """Its configuration asks for more steps, its newest lines are half written, and a stage has only begun."""
    write_resolved(PPOConfig(run="demo", steps=200), run / "ppo")
    for name in ("metrics.jsonl", "samples.jsonl"):
        with (run / "ppo" / name).open("a") as file:
            file.write('{"step": 51, "train/rew')
    (run / "dpo").mkdir()
    (run / "dpo" / "metrics.jsonl").write_text('{"step": 1')
    page = parse(write_report(run))
    assert any("50 of 200 steps" in text for text in page.text) and "dpo" not in page.text


def test_configuration_and_versions_are_told(run):
    text = write_report(run).read_text()
    assert "Configuration of ppo" in text and "Versions that ppo ran with" in text
    assert json.loads((run / "ppo" / "versions.json").read_text())["torch"] in text


def test_intervals_stand_behind_the_figures(run):
    (run / "evaluate").mkdir()
    (run / "evaluate/results.json").write_text(json.dumps({"sft": {"eval/accuracy": 0.4, "eval/accuracy_low": 0.35, "eval/accuracy_high": 0.452}}))
    assert "40.0% (35.0% to 45.2%)" in write_report(run).read_text()


def test_preference_stages_have_their_curves(run):
    """A reward model that has measured training and validation, and DPO on its way."""
    rows = [
        {"step": s, "train/loss": 0.6, "train/accuracy": 0.8, "train/margin": 1.0, "train/chosen_reward": 0.7, "train/rejected_reward": -0.3} for s in (1, 2, 3)
    ]
    for stage, validation in (("reward_model", [{"step": 3, "validation/loss": 0.65, "validation/accuracy": 0.75}]), ("dpo", [])):
        (run / stage).mkdir()
        (run / stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *validation]))
    page = parse(write_report(run))
    assert [name for name in page.text if name in ("sft", "reward_model", "dpo", "ppo")][4:] == ["sft", "reward_model", "dpo", "ppo"]
    for title, times in (("Accuracy", 2), ("Reward margin", 2), ("Chosen and rejected", 2), ("Perplexity", 0)):
        assert page.text.count(title) == times


@pytest.mark.parametrize(("signal", "drawn"), [(0, False), (3, True)])
def test_zeros_that_say_nothing_are_not_drawn(signal, drawn):
    """With one answer to a prompt no group has two rewards that differ."""
    (panel,) = [panel for panel in PANELS if panel.title == "Groups with signal"]
    rows = [{"step": step, "groups/with_signal": signal * step, "groups/drawn": 8} for step in range(1, 4)]
    assert (draw_panel(panel, {"run": rows}) is not None) == drawn
