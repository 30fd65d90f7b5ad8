"""`python -m jobs.evaluate` as a user runs it: two models, one after the other, on the same held-out prompts."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.evaluate import run
from jobs.prepare_data import main as prepare_data
from minigpt_ray.cli import ConfigError, read_config
from minigpt_ray.config import EvaluateConfig
from minigpt_ray.models import build_causal, export
from minigpt_ray.tokenizer import load_tokenizer, train_tokenizer
from tests.test_metrics_doc import documented

CHECKOUT = Path(__file__).parents[2]


REWARD = """
def codes(rollouts):
    return [sum(map(ord, r.text)) / 1000 for r in rollouts]
"""


def environment(path: str) -> dict[str, str]:
    """That of a user who starts a job on one machine, with modules of their own in `path`."""
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"COLUMNS": "120", "PYTHONPATH": path}


def evaluate(*overrides: str, path: str = "", timeout: float = 500) -> subprocess.CompletedProcess[str]:
    """The job; `path`: where else modules are found."""
    command = [sys.executable, "-m", "jobs.evaluate", "configs/debug/evaluate.yaml", *overrides]
    return subprocess.run(command, cwd=CHECKOUT, env=environment(path), capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two models of random weights and no metrics of any stage, as when both came from elsewhere."""
    directory = tmp_path_factory.mktemp("home")
    assert prepare_data([str(CHECKOUT / "configs/debug/prepare_data.yaml"), f"output_dir={directory}"]) == 0
    debug = directory / "debug"
    tokenizer = load_tokenizer(debug / "prepare_data" / "tokenizer")
    for name, seed in (("sft", 0), ("ppo", 1)):
        export(build_causal("nano", tokenizer, seed=seed), tokenizer, debug / name / "model")
    (directory / "a_users_rewards.py").write_text(REWARD)
    return directory


@pytest.fixture(scope="module")
def finished(home: Path) -> subprocess.CompletedProcess[str]:
    """By the engine that starts sooner; the README's evaluation generates with vLLM."""
    source = ["generator.backend=transformers", "rewards.codes.kind=function", "rewards.codes.function=a_users_rewards:codes"]
    done = evaluate(f"output_dir={home}", *source, "pass_at=[1,2]", "pass_samples=3", "baseline=sft", "judge=codes", path=str(home))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_both_models_have_all_figures(home: Path, finished: subprocess.CompletedProcess[str]) -> None:
    results = json.loads((home / "debug" / "evaluate" / "results.json").read_text())
    assert list(results) == ["sft", "ppo"]
    main = ("accuracy", "mean_reward", "avg_response_len", "truncated_fraction", "verifier_score", "reward/verifier", "reward/codes")
    names = {*(f"eval/{prefix}{name}" for prefix in ("", "sampled_") for name in main), "eval/pass_at_1", "eval/pass_at_2"}
    for model, figures in results.items():
        wins = {"eval/win_rate/sft"} if model == "ppo" else set()
        assert set(figures) == {name + end for name in names | wins for end in ("", "_low", "_high")}
        assert all(math.isfinite(value) for value in figures.values()) and all(documented(name) for name in figures)
        assert all(figures[f"{name}_low"] <= figures[name] <= figures[f"{name}_high"] for name in names | wins)
        assert all(0 <= figures[name] <= 1 for name in names | wins if not name.endswith(("len", "reward", "codes")))
        assert 1 <= figures["eval/avg_response_len"] <= 16
    assert results["sft"]["eval/sampled_mean_reward"] != results["ppo"]["eval/sampled_mean_reward"]  # each wrote answers of its own


@pytest.mark.slow
def test_a_table_and_a_report_are_left(home: Path, finished: subprocess.CompletedProcess[str]) -> None:
    assert "20 held-out prompts" in finished.stdout
    rows = [line for line in finished.stdout.splitlines() if line.count("%") >= 4]
    assert ["sft" in rows[0], "ppo" in rows[1], len(rows)] == [True, True, 2]
    assert rows[1].count("%") == 5  # exact match twice, pass@k twice, and how often it wins against sft
    assert str(home / "debug" / "report.html") in finished.stdout and (home / "debug" / "report.html").is_file()
    config = yaml.safe_load((home / "debug" / "evaluate" / "config.yaml").read_text())
    assert config["models"] == ["sft", "ppo"] and config["sampling"]["temperature"] == 0


def test_what_is_named_and_not_there_is_refused() -> None:
    for given, sentence in (
        (["pass_at=[1,32]"], "pass_at=[1, 32] asks for more answers than pass_samples=16 draws"),
        (["baseline=dpo"], "baseline=dpo is none of the models sft, ppo"),
        (["baseline=sft", "judge=taste"], "judge=taste is none of the rewards verifier"),
        (["judge=verifier"], "there is none; set baseline"),
    ):
        with pytest.raises(ConfigError, match=re.escape(sentence)):
            read_config(EvaluateConfig, given)


def test_a_reward_model_has_to_share_the_vocabulary_of_every_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = shutil.copytree(home / "debug" / "sft" / "model", home / "other")
    train_tokenizer(["hello hello"] * 9, 262).save_pretrained(other)
    given = [f"output_dir={home}", "run=debug", f"models=[sft,{other}]", "rewards.rm={kind: model, init_from: sft}"]
    with pytest.raises(SystemExit, match="2"):
        run(read_config(EvaluateConfig, given))
    said = capsys.readouterr().err
    assert said.startswith(f"rewards.rm: the reward model {home}/debug/sft/model has another vocabulary than {other}, whose token ids it would read;")


def test_answers_that_a_model_cannot_hold_are_refused(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(read_config(EvaluateConfig, [f"output_dir={home}", "run=debug", "sampling.max_tokens=500"]))
    said = capsys.readouterr().err
    assert re.match(r"sft: the model .*/sft/model reads 512 tokens, but the longest prompt has \d+ and sampling.max_tokens=500 come after it; lower", said)


def test_help_and_a_mistake() -> None:
    assert "python -m jobs.evaluate" in evaluate("--help").stdout
    done = evaluate("modelz=[sft]")
    assert done.returncode == 2 and "modelz: unknown field, did you mean models?" in done.stderr
