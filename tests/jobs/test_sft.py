"""python -m jobs.sft as a user runs it: two workers, killed on the way, and what it leaves behind."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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


def test_without_data_it_says_which_command_makes_it(tmp_path):
    done = sft("run=none", f"output_dir={tmp_path}")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "run python -m jobs.prepare_data run=none" in done.stderr


def test_a_wrong_field_is_refused_before_anything_is_imported():
    done = sft("stepz=3")
    assert done.returncode == 2 and "stepz" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_the_debug_run_learns_and_leaves_a_model(output_dir):
    done = sft("run=r", f"output_dir={output_dir}", "num_workers=2", "engine.zero_stage=2", "steps=12", "checkpoint.every=5")
    assert done.returncode == 0, done.stderr
    stage = output_dir / "r" / "sft"
    lines = done.stdout.splitlines()
    assert lines[-1] == f"the model is in {stage / 'model'}"
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


COURSE = ["configs/debug/sft.yaml", "steps=200", "checkpoint.every=10", "checkpoint.resume=auto"]


@pytest.fixture(scope="module")
def whole(output_dir):
    """What a run of 200 steps says about learning."""
    (output_dir / "whole").mkdir()
    (output_dir / "whole" / "prepare_data").symlink_to(output_dir / "r" / "prepare_data")
    course = course_of(start(output_dir, "whole"), output_dir / "whole" / "sft")
    assert [row["step"] for row in course if "train/loss" in row] == list(range(1, 201))
    return course


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_course_is_as_if_it_had_not_been(output_dir, whole):
    (output_dir / "killed").mkdir()
    (output_dir / "killed" / "prepare_data").symlink_to(output_dir / "r" / "prepare_data")
    job = start(output_dir, "killed")
    wait_for_rows(job, output_dir / "killed" / "sft", 25)
    next(p for p in psutil.Process(job.pid).children(recursive=True) if "RayTrainWorker" in p.name() + "".join(p.cmdline())).kill()
    assert course_of(job, output_dir / "killed" / "sft", "workers were lost; new ones go on after step") == whole


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_saves_the_step_ends_with_0_and_the_same_command_goes_on(output_dir, whole):
    (output_dir / "ended").mkdir()
    (output_dir / "ended" / "prepare_data").symlink_to(output_dir / "r" / "prepare_data")
    job = start(output_dir, "ended")
    wait_for_rows(job, output_dir / "ended" / "sft", 25)
    job.send_signal(signal.SIGTERM)
    course = course_of(job, output_dir / "ended" / "sft", "SIGTERM: step ")
    assert 20 < course[-1]["step"] < 200 and not (output_dir / "ended" / "sft" / "model").exists()
    assert course_of(start(output_dir, "ended"), output_dir / "ended" / "sft", f"sft goes on after step {course[-1]['step']}") == whole


def start(output_dir, run, *more):
    command = [sys.executable, "-m", "jobs.sft", *COURSE, f"run={run}", f"output_dir={output_dir}", *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_rows(job, stage, number):
    metrics = stage / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= number):
        time.sleep(0.05)


def course_of(job, stage, said=""):
    """The rows of a job once it has ended well, without what the clock decides."""
    output = job.communicate(timeout=500)[0]
    assert job.returncode == 0 and said in output, output
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "validation/loss")
    return [{name: row[name] for name in names if name in row} for row in read_metrics(stage / "metrics.jsonl")]
