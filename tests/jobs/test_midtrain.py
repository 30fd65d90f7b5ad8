"""A stage that mixes sources, as a user runs it: killed with SIGKILL on the way, and gone on with by the same command."""

import json
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from minigpt_ray.models import build_causal, export
from minigpt_ray.tokenizer import train_tokenizer
from minigpt_ray.tracking import read_metrics

ROOT = Path(__file__).parents[2]
MIX = "mix={sums: {weight: 3, final_weight: 1}, words: {weight: 1, final_weight: 3}}"


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    """Two runs of one beginning: documents of two sources and a model under the name of the stage pretrain."""
    directory = tmp_path_factory.mktemp("outputs")
    tokenizer = train_tokenizer(["a"], 260)
    texts = [(f"{i} and {i} make {2 * i}.", "sums") if i % 2 else (f"word {i} " * (1 + i % 40), "words") for i in range(2, 600)]
    for run in ("whole", "killed"):
        (directory / run / "prepare_data").mkdir(parents=True)
        rows = "".join(json.dumps({"text": text, "source": source}) + "\n" for text, source in texts)
        (directory / run / "prepare_data" / "documents.jsonl").write_text(rows)
        export(build_causal("llama-nano", tokenizer, seed=0), tokenizer, directory / run / "pretrain" / "model")
    return directory


def start(output_dir, run):
    arguments = ["configs/debug/midtrain.yaml", MIX, "steps=150", "checkpoint={every: 10, resume: auto}", f"run={run}", f"output_dir={output_dir}"]
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.midtrain", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def course_of(job, stage, said):
    """What the rows of a job say about learning and reading, once it has ended well."""
    output = job.communicate(timeout=500)[0]
    assert job.returncode == 0 and said in output, output
    names = ("step", "train/loss", "train/grad_norm", "train/lr", "train/num_tokens_seen/sums", "train/num_tokens_seen/words", "validation/loss")
    return [{name: row[name] for name in names if name in row} for row in read_metrics(stage / "metrics.jsonl")]


def kill_all(job):
    """The driver first, so that nobody replaces anything; some end by themselves when it is gone."""
    processes = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes)
    job.communicate()


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_mix_goes_on_as_if_it_had_not_been(output_dir):
    stages = {run: output_dir / run / "midtrain" for run in ("whole", "killed")}
    whole = course_of(start(output_dir, "whole"), stages["whole"], "midtrain starts:")
    training = [row for row in whole if "train/loss" in row]
    assert [row["step"] for row in training] == list(range(1, 151))
    assert training[-1]["train/loss"] < training[0]["train/loss"] - 1
    shares = [row["train/num_tokens_seen/words"] / (row["train/num_tokens_seen/words"] + row["train/num_tokens_seen/sums"]) for row in training]
    assert shares[29] < 0.45 < shares[-1]  # from a quarter of the windows to three, in a straight line

    job = start(output_dir, "killed")
    metrics = stages["killed"] / "metrics.jsonl"
    while job.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 25):
        time.sleep(0.05)
    kill_all(job)
    assert 25 <= len(read_metrics(metrics)) < 150 and not (stages["killed"] / "model").exists()
    assert course_of(start(output_dir, "killed"), stages["killed"], "midtrain goes on after step") == whole
    weights = [load_file(stage / "model" / "model.safetensors") for stage in stages.values()]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
