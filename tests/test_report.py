"""The report: one page that needs nothing else, with a panel for what was measured and none for what was not."""

import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from minigpt_ray.cli import write_resolved
from minigpt_ray.config import LoggingConfig, PPOConfig
from minigpt_ray.report import headline_rows, main, paired_answers, series, smooth, write_report
from minigpt_ray.tracking import Tracker


def sample(step, kind="train", prompt="2 + 2?", response="4", reward=1.0):
    return {"step": step, "kind": kind, "prompt": prompt, "response": response, "answer": "4", "reward": reward, "source": "chain_sum"}


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "demo"
    for stage in ("ppo", "sft"):
        with Tracker(directory / stage, stage, {}, LoggingConfig(), 50, console=Console(file=io.StringIO())) as tracker:
            for step in range(51):
                if stage == "ppo" and step % 25 == 0:
                    tracker.log(step, {"eval/accuracy": 0.4 + step / 200, "eval/mean_reward": 0.5, "eval/sampled_accuracy": 0.3})
                    tracker.samples(step, [sample(step, "eval", response=f"<b>{step}</b>", reward=math.nan)])
                if step and stage == "ppo":
                    tracker.log(
                        step,
                        {
                            "train/epoch": 1,
                            "train/reward": step / 50,
                            "train/kl_ref": math.nan,
                            "time/step_s": 2.0,
                            "time/rollout_s": 1.5,
                            "time/learn_s": 0.5,
                            "time/learn/publish_s": 0.1,
                        },
                    )
                    tracker.samples(step, [sample(step)])
                if step and stage == "sft":
                    tracker.log(step, {"train/epoch": 1, "train/loss": 3 / step, "time/step_s": 1.0})
    write_resolved(PPOConfig(run="demo"), directory / "ppo")
    return directory


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
    assert [name for name in page.text if name in ("sft", "ppo")] == ["sft", "ppo"]
    for title in ("Reward", "Held-out exact match", "Loss", "Where the time goes", "rollout 75%", "learn 25%"):
        assert title in page.text
    for title in ("KL to the reference", "Entropy", "Critic loss"):  # nan throughout, or never logged
        assert title not in page.text
    assert page.seen.count("svg") == 4


def test_answers_are_escaped_and_compared_between_first_and_last_evaluation(run):
    path = write_report(run)
    text = path.read_text()
    assert "answer at step 0" in text and "answer at step 50" in text
    assert "&lt;b&gt;50&lt;/b&gt;" in text and "<b>50" not in text


def test_headline_holds_the_models_of_evaluate_and_ppos_own_evaluations(run):
    (run / "evaluate").mkdir()
    (run / "evaluate/results.json").write_text(json.dumps({"sft": {"eval/accuracy": 0.4}, "ppo": {"eval/accuracy": 0.65, "eval/avg_response_len": 8.26}}))
    text = write_report(run).read_text()
    assert "65.0%" in text and "8.3" in text and "ppo, last evaluation (step 50)" in text
    rows = headline_rows({"ppo": [{"step": step, "eval/accuracy": value} for step, value in ((0, 0.5), (5, 0.7), (9, math.nan))]}, {})
    assert list(rows) == ["ppo, first evaluation (step 0)", "ppo, best evaluation (step 5)", "ppo, last evaluation (step 9)"]


def test_pairs_are_of_the_same_prompt():
    samples = [sample(0, "eval", "a"), sample(0, "eval", "b"), sample(3), sample(5, "eval", "b"), sample(9, "eval", "b", "x")]
    first, last, pairs = paired_answers(samples)
    assert (first, last) == (0, 9) and [(a["prompt"], b["response"]) for a, b in pairs] == [("b", "x")]
    assert paired_answers(samples[:3]) == (0, 0, [])


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
    done = subprocess.run([sys.executable, "-m", "minigpt_ray.report", str(run)], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == str(run / "report.html")


def test_curves_of_several_runs_are_a_plot_and_a_table(run, tmp_path, capsys):
    other = tmp_path / "second"
    (other / "ppo").mkdir(parents=True)
    (other / "ppo" / "metrics.jsonl").write_text('{"step": 0, "eval/accuracy": 0.1}\n')
    main(["--curves", str(tmp_path / "curves.svg"), str(run), str(other)])
    assert capsys.readouterr().out.splitlines() == [
        "| step | demo | second |",
        "| ---: | ---: | ---: |",
        "| 0 | 40.0% / 30.0% | 10.0% |",
        "| 25 | 52.5% / 30.0% |  |",
        "| 50 | 65.0% / 30.0% |  |",
    ]
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
