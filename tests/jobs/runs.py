"""Runs of `python -m jobs.ppo` as a user starts them, for tests that let them be, or do not."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minigpt_ray.tracking import read_metrics

CHECKOUT = Path(__file__).parents[2]

ONE_PROCESS = "placement.colocate=[[policy, critic, reference, rewards]]"
"""Starts in half the time; the numbers are the same."""


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


def numbers(row: dict[str, float]) -> dict[str, float]:
    """A row without what the clock, the machine or the length of the run decides."""
    passing = ("time/", "memory/", "pool/", "system/", "restarts/", "weights/receive_s", "train/eta", "train/mfu")
    return {name: value for name, value in row.items() if not name.startswith(passing) and "per_second" not in name}
