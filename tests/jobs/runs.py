"""Runs of `python -m jobs.ppo` as a user starts them, for tests that let them be, or do not."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from safetensors.numpy import load_file

from minigpt_ray.tracking import read_metrics

CHECKOUT = Path(__file__).parents[2]

LOWER_CASE = '''
def lower_case(rollouts):
    """Share of lower-case letters, a reward that a random model gets some of."""
    return [sum("a" <= c <= "z" for c in r.text) / 16 for r in rollouts]
'''
"""The function that `command` asks for."""

ONE_PROCESS = "placement.colocate=[[policy, critic, reference, rewards]]"
"""Starts sooner; the numbers are the same."""


def command(home: Path, *overrides: str) -> list[str]:
    """A debug run that writes below `home`, where the module `a_users_rewards` lies as well."""
    reward = ["rewards.letters.kind=function", "rewards.letters.function=a_users_rewards:lower_case"]
    return [sys.executable, "-m", "jobs.ppo", "configs/debug/ppo.yaml", f"output_dir={home}", *reward, *overrides]


SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "cafecafe", "HF_TOKEN": "hf_" + "TheTokenOfTheHub" * 2}


def environment(home: Path) -> dict[str, str]:
    """With secrets, which nobody may find again."""
    return {**os.environ, **SECRETS, "PYTHONPATH": str(home), "COLUMNS": "80"}


@dataclass(frozen=True)
class Finished:
    """What a run left behind."""

    directory: Path
    output: str

    @property
    def rows(self) -> list[dict[str, float]]:
        """Those of the steps."""
        return [row for row in read_metrics(self.directory / "metrics.jsonl") if "train/epoch" in row]


def ppo(home: Path, run: str, *overrides: str) -> Finished:
    """Run to the end."""
    done = subprocess.run(command(home, f"run={run}", *overrides), cwd=CHECKOUT, env=environment(home), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return Finished(home / run / "ppo", done.stdout)


@contextmanager
def running(home: Path, run: str, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """Start or go on; whatever happens, nothing is left."""
    arguments = command(home, f"run={run}", *overrides)
    process = subprocess.Popen(arguments, cwd=CHECKOUT, env=environment(home), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def metrics_so_far(directory: Path) -> list[dict[str, float]]:
    """None before the first step."""
    path = directory / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def wait_for(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """While the process lives."""
    deadline = time.monotonic() + 400
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def title(pid: int) -> str:
    """What a process calls itself, its command line if it says nothing else; empty when it has ended."""
    try:
        return " ".join(psutil.Process(pid).cmdline()).strip()
    except psutil.NoSuchProcess:
        return ""


def numbers(row: dict[str, float]) -> dict[str, float]:
    """A row without what the clock, the machine or the length of the run decides."""
    passing = ("time/", "memory/", "pool/", "system/", "restarts/", "weights/receive_s", "train/eta", "train/mfu")
    return {name: value for name, value in row.items() if not name.startswith(passing) and "per_second" not in name}


GAPS = ("generator/logprob_gap_mean", "generator/logprob_gap_max")
"""Metrics of the generator's own logprobs, which depend on what else is in its batch."""


def assert_same(run: Finished, other: Finished) -> None:
    """The same steps and tokens, and the same numbers but for the last bits."""
    assert [row["step"] for row in run.rows] == [row["step"] for row in other.rows]
    for mine, theirs in zip(run.rows, other.rows, strict=True):
        mine, theirs = numbers(mine), numbers(theirs)
        for name in GAPS:
            assert mine.pop(name) < 1e-3 and theirs.pop(name) < 1e-3
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert not different_tokens(run, other)


def different_tokens(run: Finished, other: Finished) -> set[str]:
    """Tensors that differ in some step; both runs were started with logging.batches."""
    batches = sorted((other.directory / "batches").iterdir())
    assert batches
    pairs = [(load_file(run.directory / "batches" / path.name), load_file(path)) for path in batches]
    return {name for mine, theirs in pairs for name in ("batch.token_ids", "batch.response_mask") if (mine[name] != theirs[name]).any()}
