"""Runs beside each other: what each ended with, in which settings they differ, and every curve in one plot."""

import re
import shutil

import pytest

from jobs.compare import main
from minigpt_ray.cli import write_resolved
from minigpt_ray.config import PPOConfig
from minigpt_ray.report import Comparison
from minigpt_ray.report.drawing import COLORS
from tests.report.example import write_run
from tests.report.test_page import parse


@pytest.fixture
def runs(tmp_path):
    """Two runs with SFT and PPO, the second with another learning rate and a PPO that ended after 25 steps."""
    first, second = write_run(tmp_path / "first"), write_run(tmp_path / "second")
    metrics = second / "ppo" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:27]))
    config = PPOConfig(run="second")
    optimizer = config.policy.optimizer.model_copy(update={"lr": 0.5})
    write_resolved(config.model_copy(update={"policy": config.policy.model_copy(update={"optimizer": optimizer})}), second / "ppo")
    return first, second


def test_each_stage_of_each_run_has_a_row_with_what_it_ended_with(runs):
    header, cells = Comparison(runs).outcomes()
    assert header == ["stage", "run", "steps", "exact match", "sampled", "reward", "loss"]
    assert [row[:4] for row in cells] == [
        ["sft", "first", "50", "–"],
        ["sft", "second", "50", "–"],
        ["ppo", "first", "50", "65.0%"],
        ["ppo", "second", "25", "52.5%"],
    ]
    assert cells[2][5] == "0.960" and cells[0][6] == "0.063"  # the mean of the last five steps


def test_settings_that_differ_are_named_with_both_values(runs):
    comparison = Comparison(runs)
    assert comparison.differences("ppo") == [["policy.optimizer.lr", "1e-06", "0.5"]] and comparison.differences("sft") == []


def test_the_page_lays_the_runs_over_each_other_and_needs_no_network(runs, tmp_path, capsys):
    main([*map(str, runs), "--output", str(tmp_path / "both.html")])
    page = parse(tmp_path / "both.html")
    assert page.text.count("Held-out exact match") == 1 and "first, greedy" in page.text and "second, greedy" in page.text
    text = re.sub(r'xmlns(:\w+)?="[^"]*"', "", (tmp_path / "both.html").read_text())
    assert not re.search(r"<(script|link|img|iframe)\b|@import|(src|href)=\"(?!#)", text)
    printed = capsys.readouterr().out
    assert "65.0%" in printed and "52.5%" in printed and str(tmp_path / "both.html") in printed


def test_a_stage_of_one_run_alone_is_shown_as_that_runs(runs):
    shutil.rmtree(runs[0] / "sft")
    text = Comparison(runs).html()
    assert "Only in second." in text
    assert COLORS[1] in text.split('<h2 id="sft">')[1].split("</figure>")[0]  # the colour that the run has everywhere


def test_what_cannot_be_compared_is_one_sentence(runs, tmp_path, capsys):
    for given, sentence in (([tmp_path], "no <stage>/metrics.jsonl with a row in it"), ([runs[0], runs[0]], "a run is given twice")):
        with pytest.raises(SystemExit) as caught:
            main([*map(str, given)])
        assert caught.value.code == 2 and sentence in capsys.readouterr().err


def test_runs_of_the_same_name_are_told_by_their_paths(tmp_path):
    runs = [write_run(tmp_path / place / "demo") for place in ("a", "b")]
    assert Comparison(runs).names == [str(run) for run in runs]


def test_curves_of_several_runs_are_a_plot_and_a_table(runs, tmp_path, capsys):
    main(["--curves", str(tmp_path / "curves.svg"), *map(str, runs)])
    assert capsys.readouterr().out.splitlines()[:5] == [
        "| step | first | second |",
        "| ---: | ---: | ---: |",
        "| 0 | 40.0% / 30.0% | 40.0% / 30.0% |",
        "| 25 | 52.5% / 30.0% | 52.5% / 30.0% |",
        "| 50 | 65.0% / 30.0% |  |",
    ]
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
