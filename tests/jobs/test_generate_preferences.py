"""`python -m jobs.generate_preferences` as a user runs it: a nano model's own answers become pairs that agree with their scores."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from jobs.generate_preferences import run
from minigpt_ray.cli import read_config
from minigpt_ray.config import GeneratePreferencesConfig
from minigpt_ray.data.verification import verify
from tests.jobs.starts import random_start
from tests.jobs.test_evaluate import CHECKOUT, REWARD, environment

NUM_PROMPTS, NUM_ANSWERS = 24, 4


def generate(*overrides: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """The job; `path`: where else modules are found."""
    command = [sys.executable, "-m", "jobs.generate_preferences", "configs/debug/generate_preferences.yaml", *overrides]
    return subprocess.run(command, cwd=CHECKOUT, env=environment(path), capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a model of random weights."""
    directory = tmp_path_factory.mktemp("home")
    random_start(directory, "debug")
    (directory / "a_users_rewards.py").write_text(REWARD)
    return directory


def killed_in_the_middle(directory: Path, *overrides: str, path: str) -> str:
    """The job, whose driver is killed once it has kept the pairs of some prompts; what it said."""
    command = [sys.executable, "-m", "jobs.generate_preferences", "configs/debug/generate_preferences.yaml", *overrides]
    with subprocess.Popen(command, cwd=CHECKOUT, env=environment(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        kept = directory / ".generate_preferences.jsonl"
        while not (kept.is_file() and 1 < len(kept.read_text().splitlines()) < 1 + NUM_PROMPTS):
            assert job.poll() is None
            time.sleep(0.002)
        (driver,) = [child for child in psutil.Process(job.pid).children() if "jobs.generate_preferences" in child.cmdline()]
        driver.kill()
        said = job.communicate(timeout=400)[0]
    assert job.returncode == 0, said
    return said


@pytest.mark.ray
@pytest.mark.slow
def test_answers_become_pairs_although_the_driver_is_killed_and_a_second_call_finds_them(home: Path) -> None:
    arguments = [f"output_dir={home}", "generator.backend=transformers", "rewards.codes.kind=function", "rewards.codes.function=a_users_rewards:codes"]
    said = killed_in_the_middle(home / "debug", *arguments, "prompts_per_batch=4", path=str(home))
    assert re.search(r"the driver \(process \d+\) was killed by SIGKILL; restart 1 of 3, with the prompts that are left", said)
    assert re.search(rf"\d+ of {NUM_PROMPTS} prompts were answered and scored before; the job goes on with the others", said)
    directory = home / "debug" / "generate_preferences"
    rows = {name: [json.loads(line) for line in (directory / f"{name}.jsonl").read_text().splitlines()] for name in ("preferences", "held_out")}
    pairs = rows["preferences"] + rows["held_out"]
    counts = json.loads((directory / "manifest.json").read_text())["became_of"]
    assert (counts["prompts"], counts["answers"], counts["pairs"]) == (NUM_PROMPTS, NUM_PROMPTS * NUM_ANSWERS, len(pairs))
    assert rows["preferences"] and rows["held_out"] and f"{len(pairs)}" in said

    entries = [json.loads(line) for line in (home / "debug" / "prepare_data" / "prompts.jsonl").read_text().splitlines()[:NUM_PROMPTS]]
    by_question = {entry["question"]: entry for entry in (row.get("entry", row) for row in entries)}
    right = 0
    for pair in pairs:
        entry = by_question[pair["prompt"][-1]["content"]]
        for side in ("chosen", "rejected"):  # both sources scored it, the right answer too
            text = pair[side][0]["content"]
            assert pair[f"{side}_score"] == pytest.approx(verify(entry, text) + sum(map(ord, text)) / 1000, rel=1e-6)
        if pair["chosen"][0]["content"] == entry["answer"]:
            right += 1
            assert verify(entry, pair["rejected"][0]["content"]) < 1
        else:
            assert pair["chosen_score"] > pair["rejected_score"]
    assert right == counts["prompts with a right answer"] == NUM_PROMPTS  # random weights are never right
    assert len(pairs) <= 3 * NUM_PROMPTS and (directory / "config.yaml").is_file()

    again = generate(*arguments, path=str(home))  # starts no process
    assert again.returncode == 0 and "nothing to do" in again.stdout
    refused = generate(*arguments, "min_margin=0.5", path=str(home))
    assert refused.returncode == 2 and "min_margin: 0.0 then, 0.5 now" in refused.stderr and "Traceback" not in refused.stderr


def test_answers_that_the_model_cannot_hold_are_refused(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(home / "debug", tmp_path / "debug", ignore=shutil.ignore_patterns("generate_preferences"))
    with pytest.raises(SystemExit, match="2"):
        run(read_config(GeneratePreferencesConfig, [f"output_dir={tmp_path}", "run=debug", "sampling.max_tokens=500"]))
    assert "sft: the model" in (said := capsys.readouterr().err) and "reads 512 tokens" in said and "sampling.max_tokens=500" in said
