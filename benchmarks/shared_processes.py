"""PPO in debug mode with its roles in processes of their own, and with all but the generator in one: start, time, memory.

    .venv/bin/python -m benchmarks.shared_processes        four minutes on two quiet cores

Prints what each takes, median of the rounds, and what part of the first the second is. Also what each role's process was
estimated to hold before it started, beside what it held. Logs are kept below outputs/bench.
"""

import argparse
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.processes import Watched, watch
from minigpt_ray.config import PPOConfig
from minigpt_ray.memory import per_process
from minigpt_ray.models import build_causal, export
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import read_metrics

OUTPUT = Path("outputs") / "bench"
IS_STEP = '"time/step_s"'
SHARED = "placement.colocate=[[policy, critic, reference, rewards]]"


def debug_start(run: str) -> Path:
    """The directory of a run that has been through prepare_data in debug mode, with a nano model that learnt nothing: time and memory do not depend on that."""
    directory = OUTPUT / run
    shutil.rmtree(directory, ignore_errors=True)
    command = [sys.executable, "-m", "jobs.prepare_data", "configs/debug/prepare_data.yaml", f"run={run}", f"output_dir={OUTPUT}"]
    watch(command, {}, OUTPUT / f"{run}-prepare_data.log", directory / "none", IS_STEP)
    tokenizer = load_tokenizer(directory / "prepare_data" / "tokenizer")
    export(build_causal("nano", tokenizer, seed=0), tokenizer, directory / "sft" / "model")
    return directory


def debug_ppo(run: str, *overrides: str) -> Watched:
    """PPO in debug mode from such a start."""
    directory = debug_start(run)
    command = [sys.executable, "-m", "jobs.ppo", "configs/debug/ppo.yaml", f"run={run}", f"output_dir={OUTPUT}", *overrides]
    return watch(command, {}, OUTPUT / f"{run}-ppo.log", directory / "ppo" / "metrics.jsonl", IS_STEP, every=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shared_processes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each form, in turns")
    arguments = parser.parse_args()
    console = Console(width=110)
    apart: list[Watched] = []
    together: list[Watched] = []
    for number in range(1, arguments.rounds + 1):
        console.print(f"round {number} of {arguments.rounds}", highlight=False)
        apart.append(debug_ppo("apart"))
        together.append(debug_ppo("together", SHARED))
    console.print(comparison(apart, together), _estimates(OUTPUT / "apart" / "ppo"))


def comparison(apart: Sequence[Watched], together: Sequence[Watched]) -> Table:
    """Medians of the rounds, what part of the first the second is, and in which range that part lies round by round."""
    table = Table(title=f"PPO in debug mode, four steps, median of {len(apart)} rounds", title_justify="left")
    for header in ("", "apart", "together", "together / apart", "in a round"):
        table.add_column(header, justify="right" if header else "left")
    for name, measured in (
        ("to the first step's end, s", lambda run: run.first_row),
        ("the whole job, s", lambda run: run.seconds),
        ("CPU time, s", lambda run: run.cpu_seconds),
        ("peak PSS, GiB", lambda run: run.peak_pss_gib),
        ("processes", lambda run: run.processes),
    ):
        mine, theirs = (statistics.median(map(measured, runs)) for runs in (apart, together))
        parts = [measured(other) / measured(one) for one, other in zip(apart, together, strict=True)]
        table.add_row(name, f"{mine:.2f}", f"{theirs:.2f}", f"{theirs / mine:.3f}", f"{min(parts):.2f} to {max(parts):.2f}")
    table.add_row("others' cores, at most", *(f"{max(run.foreign_cores for run in runs):.2f}" for runs in (apart, together)))
    return table


def _estimates(directory: Path) -> Table:
    estimated = per_process(PPOConfig.model_validate(yaml.safe_load((directory / "config.yaml").read_text())))
    held = [row for row in read_metrics(directory / "metrics.jsonl") if "train/epoch" in row][-1]
    table = Table(title="GiB of one process", title_justify="left")
    for header in ("role", "estimated", "held", "estimated / held"):
        table.add_column(header, justify="left" if header == "role" else "right")
    for role, gib in estimated.items():
        measured = held[f"memory/{role}_gib"]
        table.add_row(role, f"{gib:.2f}", f"{measured:.2f}", f"{gib / measured:.2f}")
    return table


if __name__ == "__main__":
    main()
