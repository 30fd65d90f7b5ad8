"""PPO in debug mode with its roles in processes of their own, and with all but the generator in one: start, time, memory.

    .venv/bin/python -m benchmarks.shared_processes        a minute on two quiet cores

Prints what each takes, and what part of the first the second is. Also what each role's process was estimated to hold before
it started, beside what it held. Logs are kept below outputs/bench.
"""

import shutil
import sys
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
    return watch(command, {}, OUTPUT / f"{run}-ppo.log", directory / "ppo" / "metrics.jsonl", IS_STEP)


def main() -> None:
    console = Console(width=110)
    apart, together = debug_ppo("apart"), debug_ppo("together", SHARED)
    table = Table(title="PPO in debug mode, four steps", title_justify="left")
    for header in ("", "apart", "together", "together / apart"):
        table.add_column(header, justify="right" if header else "left")
    for name, unit, mine, theirs in (
        ("to the first step's end", "s", apart.first_row, together.first_row),
        ("the whole job", "s", apart.seconds, together.seconds),
        ("peak PSS", "GiB", apart.peak_pss_gib, together.peak_pss_gib),
        ("processes", "", apart.processes, together.processes),
        ("others' cores", "", apart.foreign_cores, together.foreign_cores),
    ):
        ratio = f"{theirs / mine:.2f}" if name != "others' cores" else ""
        table.add_row(f"{name}{unit and f', {unit}'}", f"{mine:.2f}", f"{theirs:.2f}", ratio)
    console.print(table, _estimates(OUTPUT / "apart" / "ppo"))


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
