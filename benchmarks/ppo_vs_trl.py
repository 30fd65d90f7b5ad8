"""PPO against TRL's PPO trainer, on the same models, prompts and machine, in turns.

    make bench                                          everything; about a quarter of an hour on two quiet cores
    .venv/bin/python -m benchmarks.ppo_vs_trl --rounds 1 --steps 2 --workloads uniform

What is measured, and how: README.md in this folder. Numbers and logs are kept below outputs/bench.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.inputs import PROMPTS, WORKLOADS, Workload, write_inputs
from benchmarks.processes import Watched, watch
from benchmarks.shared_processes import debug_ppo
from minigpt_ray.tracking import read_metrics

OUTPUT = Path("outputs") / "bench"
WARMUP_STEPS = 1
SYSTEMS = ("MiniGPT-Ray", "TRL")
IS_STEP = '"time/step_s"'
QUIET = 0.1
"""Cores that other programs may keep busy before a measurement is called disturbed."""

Row = dict[str, int | float]


@dataclass(frozen=True)
class Run:
    """One run of one system: its process tree, and the rows of its timed steps."""

    watched: Watched
    startup: float
    """Seconds from the command to the begin of the first step."""
    steps: list[Row]

    @classmethod
    def of(cls, watched: Watched, rows: Path) -> "Run":
        steps = [row for row in read_metrics(rows) if "time/step_s" in row]
        return cls(watched, watched.first_row - steps[0]["time/step_s"], steps[WARMUP_STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system on each workload, in turns")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a run, after one that warms up")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    arguments = parser.parse_args()
    console = Console(width=140)
    results: dict[str, dict[str, list[Run]]] = {}
    for name in arguments.workloads:
        shutil.rmtree(OUTPUT / name, ignore_errors=True)
        write_inputs(OUTPUT / name, WORKLOADS[name])
        results[name] = {system: [] for system in SYSTEMS}
        for number in range(1, arguments.rounds + 1):
            for system, run in zip(SYSTEMS, (run_this, run_trl), strict=True):
                console.print(f"{name}, round {number} of {arguments.rounds}: {system}", highlight=False)
                results[name][system].append(run(name, WORKLOADS[name], number, arguments.steps + WARMUP_STEPS))
    console.print("memory of PPO in debug mode", highlight=False)
    debug = debug_ppo("debug")
    for name, runs in results.items():
        console.print(comparison(name, runs), own_time(runs[SYSTEMS[0]]))
    console.print(f"PPO in debug mode (configs/debug/ppo.yaml): peak PSS {debug.peak_pss_gib:.2f} GiB in {debug.processes} processes", highlight=False)
    kept = {name: {system: [asdict(run) for run in several] for system, several in runs.items()} for name, runs in results.items()}
    (OUTPUT / "results.json").write_text(json.dumps({"workloads": kept, "debug": asdict(debug)}, indent=1))


# ------------------------------------------------------------------------------------------------------- the runs


def run_this(name: str, workload: Workload, number: int, steps: int) -> Run:
    directory = OUTPUT / name / "ppo"
    command = ["jobs.ppo", "configs/bench/ppo.yaml", f"run={name}", f"output_dir={OUTPUT}", f"steps={steps}", f"sampling.max_tokens={workload.max_tokens}"]
    watched = watch([sys.executable, "-m", *command], {}, OUTPUT / name / f"ppo-{number}.log", directory / "metrics.jsonl", IS_STEP)
    run = Run.of(watched, directory / "metrics.jsonl")
    directory.rename(OUTPUT / name / f"ppo-{number}")
    return run


def run_trl(name: str, workload: Workload, number: int, steps: int) -> Run:
    directory, threads = OUTPUT / name / "trl", str(os.cpu_count())
    command = [sys.executable, "-m", "benchmarks.trl_ppo", str(OUTPUT / name), name, str(steps)]
    environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    watched = watch(command, environment, OUTPUT / name / f"trl-{number}.log", directory / "metrics.jsonl", IS_STEP)
    run = Run.of(watched, directory / "metrics.jsonl")
    directory.rename(OUTPUT / name / f"trl-{number}")
    return run


# ----------------------------------------------------------------------------------------------------- the tables


def timed(runs: Sequence[Run], name: str) -> list[float]:
    """A metric in all timed steps of all runs."""
    return [row[name] for run in runs for row in run.steps]


def comparison(name: str, runs: dict[str, list[Run]]) -> Table:
    """Both systems side by side, and how many times as fast the first is."""
    ours, theirs = (runs[system] for system in SYSTEMS)
    seconds = {system: timed(several, "time/step_s") for system, several in runs.items()}
    ratio = statistics.median(seconds["TRL"]) / statistics.median(seconds["MiniGPT-Ray"])
    lengths = [statistics.fmean(timed(several, "train/avg_response_len")) for several in (ours, theirs)]
    title = (
        f"{name}: {len(seconds['TRL'])} steps of each, {ratio:.2f} times as fast as TRL; mean lengths differ by {100 * abs(lengths[0] / lengths[1] - 1):.1f} %"
    )
    table = Table(title=title, title_justify="left")
    for header in ("", "s/step: median", "range", "samples/s", "start-up s", "peak PSS GiB", "processes", "mean length", "p5", "p95", "others' cores"):
        table.add_column(header, justify="left" if header in ("", "range") else "right")
    for system, several in runs.items():
        median = statistics.median(seconds[system])
        busiest = max(run.watched.foreign_cores for run in several)
        largest = max((run.watched for run in several), key=lambda watched: watched.peak_pss_gib)
        table.add_row(
            system,
            f"{median:.2f}",
            f"{min(seconds[system]):.2f} to {max(seconds[system]):.2f}",
            f"{PROMPTS / median:.1f}",
            f"{statistics.median(run.startup for run in several):.0f}",
            f"{largest.peak_pss_gib:.2f}",
            str(largest.processes),
            f"{statistics.fmean(timed(several, 'train/avg_response_len')):.1f}",
            *(f"{statistics.median(timed(several, f'response/length_{quantile}')):.0f}" for quantile in ("p5", "p95")),
            f"{busiest:.2f}" + (" DISTURBED" if busiest > QUIET else ""),
        )
    return table


def own_time(runs: Sequence[Run]) -> Table:
    """Where this system's step went: medians over the timed steps."""
    step = statistics.median(timed(runs, "time/step_s"))
    table = Table(title="Where a step of MiniGPT-Ray goes (medians)", title_justify="left")
    names = [name for name in runs[0].steps[0] if name.startswith("time/") and "idle_share" not in name and name != "time/step_s"]
    idle = [name for name in runs[0].steps[0] if name.startswith("time/idle_share/")]
    values = [f"{(seconds := statistics.median(timed(runs, name))):.2f} s = {100 * seconds / step:.0f} %" for name in names]
    values += [f"idle {100 * statistics.median(timed(runs, name)):.0f} %" for name in idle]
    labels = [name.removeprefix("time/").removesuffix("_s") for name in names] + [name.removeprefix("time/idle_share/") for name in idle]
    table.add_column("phase or role")
    table.add_column("of the step", justify="right")
    for label, value in zip(labels, values, strict=True):
        table.add_row(label, value)
    return table


if __name__ == "__main__":
    main()
