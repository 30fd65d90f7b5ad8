"""A supervised stage, here one that mixes sources, as a user runs it: wounded, stopped and killed on the way, and gone on with by the same command."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from minigpt_ray.models import build_causal, export
from minigpt_ray.status import look, status_table
from minigpt_ray.tokenizer import train_tokenizer
from minigpt_ray.tracking import read_metrics
from tests.jobs.runs import title

ROOT = Path(__file__).parents[2]
MIX = "mix={sums: {weight: 3, final_weight: 1}, words: {weight: 1, final_weight: 3}}"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    """Runs of one beginning: documents of two sources and a model under the name of the stage pretrain."""
    directory = tmp_path_factory.mktemp("outputs")
    tokenizer = train_tokenizer(["a"], 260)
    texts = [(f"{i} and {i} make {2 * i}.", "sums") if i % 2 else (f"word {i} " * (1 + i % 40), "words") for i in range(2, 600)]
    for run in ("whole", "broken", "early", "two", "two_broken"):
        (directory / run / "prepare_data").mkdir(parents=True)
        rows = "".join(json.dumps({"text": text, "source": source}) + "\n" for text, source in texts)
        (directory / run / "prepare_data" / "documents.jsonl").write_text(rows)
        export(build_causal("llama-nano", tokenizer, seed=0), tokenizer, directory / run / "pretrain" / "model")
    return directory


def start(output_dir, run, *more):
    arguments = [
        "configs/debug/midtrain.yaml",
        MIX,
        "steps=150",
        "hang_after_s=10",
        "checkpoint={every: 10, resume: auto}",
        f"run={run}",
        f"output_dir={output_dir}",
        *more,
    ]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.midtrain", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def course_of(job, stage):
    """What a job said that has ended well, and what its rows say about learning and reading."""
    output = job.communicate(timeout=500)[0]
    assert job.returncode == 0, output
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "train/num_tokens_seen/sums", "train/num_tokens_seen/words", "validation/loss")
    return output, [{name: row[name] for name in names if name in row} for row in read_metrics(stage / "metrics.jsonl")]


def wait_for_rows(job, stage, number):
    metrics = stage / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= number):
        time.sleep(0.05)
    assert job.poll() is None, job.communicate()[0]


def worker_of(job):
    return next(p for p in psutil.Process(job.pid).children(recursive=True) if "RayTrainWorker" in title(p.pid))


def pid_of(stage, rank):
    """Of a worker that is at work."""
    return json.loads((stage / "processes.json").read_text())["roles"]["workers"][rank]["pid"]


def kill_all(job):
    """The driver first, so that nobody replaces anything; some end by themselves when it is gone."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)
    job.communicate()


@pytest.fixture(scope="module")
def whole(output_dir):
    """The course of a run that nothing happened to."""
    output, rows = course_of(start(output_dir, "whole"), output_dir / "whole" / "midtrain")
    assert "midtrain starts:" in output
    return rows


@pytest.mark.ray
@pytest.mark.slow
def test_the_shares_of_a_mix_move_from_the_first_weights_to_the_last(whole):
    training = [row for row in whole if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 151))
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 1
    shares = [row["train/num_tokens_seen/words"] / (row["train/num_tokens_seen/words"] + row["train/num_tokens_seen/sums"]) for row in training]
    assert shares[29] < 0.45 < shares[-1]  # from a quarter of the windows to three, in a straight line


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_that_lost_a_worker_was_stopped_and_killed_has_the_course_of_one_that_was_not(output_dir, whole):
    """A worker hangs, is killed and replaced; SIGTERM saves the step and ends with 0; what goes on is killed whole; then workers may not be
    replaced, so another driver follows when one is killed, and ends."""
    stage = output_dir / "broken" / "midtrain"
    job = start(output_dir, "broken")
    wait_for_rows(job, stage, 25)
    worker_of(job).suspend()  # it stands still, and does not end
    wait_for_rows(job, stage, 60)
    job.send_signal(signal.SIGTERM)
    output, course = course_of(job, stage)
    stopped = course[-1]["step"]
    assert re.search(r"midtrain worker \d of \d \(process \d+ on [\d.]+, stopped\) has been in a step for 10 s and counts as dead", output)
    assert "workers were lost; new ones go on after step" in output and "SIGTERM: step " in output
    assert 50 < stopped < 110 and not (stage / "model").exists()

    job = start(output_dir, "broken")
    wait_for_rows(job, stage, len(course) + 15)
    kill_all(job)
    killed = read_metrics(stage / "metrics.jsonl")[-1]["step"]
    assert stopped + 10 <= killed < 150 and not (stage / "model").exists()

    job = start(output_dir, "broken", "worker_restarts=0")
    wait_for_rows(job, stage, (stage / "metrics.jsonl").read_text().count("\n") + 5)
    worker_of(job).kill()
    output, resumed = course_of(job, stage)
    role, rank, _, pid, *_, restarts = [list(column.cells) for column in status_table(look(output_dir / "broken")).columns]
    assert (role, rank, restarts) == (["workers"], ["0"], ["0"]) and int(pid[0]) > 0
    assert re.search(r"the driver \(process \d+\) lost Ray, or a role \(code 1\); restart 1 of 3, from the newest checkpoint", output)
    assert [row["restarts/driver"] for row in read_metrics(stage / "metrics.jsonl") if "restarts/driver" in row][-1] == 1
    assert "midtrain goes on after step" in output and f"goes on after step {stopped}:" not in output
    assert resumed == whole
    weights = [load_file(output_dir / run / "midtrain" / "model" / "model.safetensors") for run in ("whole", "broken")]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_before_the_first_step_ends_the_job_with_143(output_dir):
    job = start(output_dir, "early")
    stage = output_dir / "early" / "midtrain"
    while job.poll() is None and not (stage / "processes.json").exists():  # workers that prepare themselves, and a driver that waits for them
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 143 and "midtrain starts:" in said and "Traceback" not in said, said
    assert look(output_dir / "early").state.end == "stopped"
    assert {row["step"] for row in read_metrics(stage / "metrics.jsonl")} <= {0} and not (stage / "checkpoint").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_of_two_workers_one_dies_in_a_step_and_one_when_both_save_and_the_course_stays(output_dir):
    """Whoever is left finds out in a collective, perhaps before Ray does, and perhaps while it writes: which is no full disk."""
    more = ("num_workers=2", "steps=24", "checkpoint={every: 2, resume: auto}")
    _, whole = course_of(start(output_dir, "two", *more), output_dir / "two" / "midtrain")
    stage = output_dir / "two_broken" / "midtrain"
    job = start(output_dir, "two_broken", *more)
    wait_for_rows(job, stage, 6)
    os.kill(pid_of(stage, rank=1), signal.SIGKILL)
    wait_for_rows(job, stage, 14)
    while job.poll() is None and not list((stage / "checkpoint").glob("*.partial")):
        time.sleep(0.001)
    os.kill(pid_of(stage, rank=1), signal.SIGKILL)
    output, course = course_of(job, stage)
    assert output.count("workers were lost; new ones go on after step") == 2
    assert course == whole
