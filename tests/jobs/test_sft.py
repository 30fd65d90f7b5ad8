"""python -m jobs.sft as a user runs it: two workers, and what they leave behind; tests/jobs/test_midtrain.py interrupts such a run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt_ray.tokenizer import train_tokenizer
from minigpt_ray.tracking import read_metrics

ROOT = Path(__file__).parents[2]
SHARED_NAMES = [
    "train/loss",
    "train/perplexity",
    "train/lr",
    "train/grad_norm",
    "train/epoch",
    "train/global_step",
    "train/tokens_per_second",
    "train/samples_per_second",
    "train/steps_per_second",
    "train/num_tokens_seen",
    "train/mfu_percent",
    "train/eta_minutes",
    "system/epoch_time",
]


def sft(*arguments):
    return subprocess.run([sys.executable, "-m", "jobs.sft", "configs/debug/sft.yaml", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("outputs")
    stage = directory / "r" / "prepare_data"
    stage.mkdir(parents=True)
    train_tokenizer(["a"], 260).save_pretrained(stage / "tokenizer")
    rows = [{"messages": [{"role": "user", "content": f"spell {i}"}, {"role": "assistant", "content": " ".join(str(i))}]} for i in range(1000, 1200)]
    (stage / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.ray
@pytest.mark.slow
def test_the_debug_run_learns_and_leaves_a_model(output_dir):
    command = ("run=r", f"output_dir={output_dir}", "num_workers=2", "engine.zero_stage=2", "steps=12", "checkpoint.every=5")
    done = sft(*command)
    assert done.returncode == 0, done.stderr
    stage = output_dir / "r" / "sft"
    lines = done.stdout.splitlines()
    assert lines[-1] == f"the model is in {stage / 'model'}"
    assert f"data: {output_dir / 'r' / 'prepare_data' / 'demonstrations.jsonl'}" in lines
    assert any(line.startswith("Epoch:[") and "](10/12) loss:" in line for line in lines), "console lines carry no prefix of Ray's"

    rows = read_metrics(stage / "metrics.jsonl")
    training = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 13))
    assert all(name in row for row in training for name in SHARED_NAMES)
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 1
    assert [row["step"] for row in rows if "validation/loss" in row] == [10, 12]
    assert sorted(p.name for p in (stage / "checkpoint").iterdir()) == ["step-000010", "step-000012"]
    assert (stage / "config.yaml").is_file() and not (stage / "ray_train").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(stage / "model")
    assert AutoTokenizer.from_pretrained(stage / "model").chat_template

    again = sft("run=r", f"output_dir={output_dir}")
    assert again.returncode == 2 and "is there from an earlier run" in again.stderr.splitlines()[-1]

    demonstrations = output_dir / "r" / "prepare_data" / "demonstrations.jsonl"
    demonstrations.write_text(demonstrations.read_text().replace("spell", "write"))
    again = sft(*command, "checkpoint.resume=auto")
    assert again.returncode == 2 and f"what it began from has changed since (data file 1: {demonstrations})" in again.stderr.splitlines()[-1]


@pytest.mark.ray
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_a_sentence(output_dir):
    """Whatever a full disk does, a file in place of the directory does too."""
    stage = output_dir / "full" / "sft"
    stage.mkdir(parents=True)
    (output_dir / "full" / "prepare_data").symlink_to(output_dir / "r" / "prepare_data")
    (stage / "checkpoint").touch()
    done = sft("run=full", f"output_dir={output_dir}", "num_workers=2", "steps=2", "checkpoint={every: 1, resume: auto}")
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "while writing the checkpoint" in last and "make room, and go on with checkpoint.resume=auto" in last
    assert done.stderr.count("Error in training function") == 1


@pytest.mark.ray
@pytest.mark.slow
def test_workers_that_no_node_may_hold_are_refused_with_what_is_there(output_dir):
    (output_dir / "nowhere").mkdir()
    (output_dir / "nowhere" / "prepare_data").symlink_to(output_dir / "r" / "prepare_data")
    done = sft("run=nowhere", f"output_dir={output_dir}", "labels_per_worker={role: learner}", "wait_seconds=0")
    assert done.returncode == 2 and "sft has room for 0 of 1 ranks on any node" in done.stderr
    assert re.search(r"sft +1 x 1 CPU, 0 GPU, role=learner; room for 0", done.stderr)
