"""Every supervised stage against a bare torch loop of the same model and batch, and two workers against one.

    .venv/bin/python -m benchmarks.supervised_vs_torch                            all stages; some twenty minutes on two quiet cores
    .venv/bin/python -m benchmarks.supervised_vs_torch --stages sft --rounds 1

One thread to a worker throughout. Ends with code 1 where a stage has less than 0.9 of the loop's tokens/s, or two workers less than 1.7
times those of one. What is measured, and how: README.md in this folder. Numbers and logs are kept below outputs/bench/supervised.
"""

import argparse
import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.processes import watch
from benchmarks.supervised_inputs import write_inputs
from minigpt_ray.stages import STAGES
from minigpt_ray.tracking import read_metrics

OUTPUT = Path("outputs") / "bench" / "supervised"
WARMUP_STEPS = 5
SIZES = ["batch_size=16", "window=256", "engine.micro_batch_tokens=4096"]
SETTINGS = ["model.init_from=start", *SIZES, "engine.zero_stage=0", "validation_share=0", "checkpoint.every=1000000"]
"""ZeRO stage 0 is plain data parallelism: the loop shards nothing either."""
LOOP, ONE, TWO = "bare torch loop", "1 worker", "2 workers"
SHARE, GAIN = 0.9, 1.7
"""What one worker has to reach of the loop's speed, and two workers of one's."""
QUIET = 0.1
"""Cores that other programs may keep busy before a measurement is called disturbed."""


@dataclass(frozen=True)
class Run:
    """One run of one system."""

    tokens_per_second: float
    """Of the steps after the warm-up, by the clock on the wall: everything that happens between two steps is in it."""
    foreign_cores: float


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.supervised_vs_torch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=2, help="runs of each system on each stage, in turns")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of a run, after those that warm up")
    arguments = parser.parse_args(argv)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    write_inputs(OUTPUT)
    console = Console(width=140)
    runs: dict[str, dict[str, list[Run]]] = {stage: {LOOP: [], ONE: [], TWO: []} for stage in arguments.stages}
    for stage, systems in runs.items():
        for number in range(1, arguments.rounds + 1):
            console.print(f"{stage}, round {number} of {arguments.rounds}", highlight=False)
            for system, workers in ((ONE, 1), (TWO, 2)):
                systems[system].append(run_stage(stage, workers, arguments.steps, f"{stage}-{workers}-{number}"))
            systems[LOOP].append(run_loop(stage, arguments.steps, f"{stage}-loop-{number}"))
    table, reached = comparison(runs)
    console.print(table)
    (OUTPUT / "results.json").write_text(json.dumps({stage: {name: [vars(r) for r in of] for name, of in systems.items()} for stage, systems in runs.items()}))
    return 0 if reached else 1


# ------------------------------------------------------------------------------------------------------- the runs


def run_stage(stage: str, workers: int, steps: int, log: str) -> Run:
    """The job as a user runs it. The bare loop reads what the last one has left."""
    directory = OUTPUT / stage
    shutil.rmtree(directory, ignore_errors=True)
    job = [f"jobs.{stage}", f"run={OUTPUT.name}", f"output_dir={OUTPUT.parent}", f"steps={steps + WARMUP_STEPS}", f"num_workers={workers}", *SETTINGS]
    metrics = directory / "metrics.jsonl"
    with Arrivals(metrics) as arrivals:
        foreign_cores = _watch([sys.executable, "-m", *job], {}, log)
    tokens = {row["step"]: row["train/num_tokens_seen"] for row in read_metrics(metrics) if "train/loss" in row}
    first, last = WARMUP_STEPS, WARMUP_STEPS + steps
    return Run((tokens[last] - tokens[first]) / (arrivals.at[last] - arrivals.at[first]), foreign_cores)


def run_loop(stage: str, steps: int, log: str) -> Run:
    command = [sys.executable, "-m", "benchmarks.torch_loop", str(OUTPUT / stage), str(steps + WARMUP_STEPS)]
    foreign_cores = _watch(command, {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, log)
    timed = json.loads((OUTPUT / stage / "torch_loop.json").read_text())[WARMUP_STEPS:]
    return Run(sum(row["tokens"] for row in timed) / sum(row["seconds"] for row in timed), foreign_cores)


def _watch(command: Sequence[str], environment: Mapping[str, str], log: str) -> float:
    """Run a program; how many cores others kept busy. Two workers leave the watcher no core, so it looks seldom, and at no memory."""
    return watch(command, environment, OUTPUT / f"{log}.log", OUTPUT / "none", "", every=2.0, memory=False).foreign_cores


class Arrivals:
    """When the row of each training step came into a metrics.jsonl; a context manager that looks every 20 ms."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, dict[int, float]()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        size = 0
        while not self._ended.wait(0.02):
            if self.path.exists() and (now := self.path.stat().st_size) > size:
                size, moment = now, time.perf_counter()
                for row in read_metrics(self.path):
                    if "train/loss" in row:
                        self.at.setdefault(int(row["step"]), moment)

    def __enter__(self) -> "Arrivals":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


# ------------------------------------------------------------------------------------------------------ the table


def comparison(runs: dict[str, dict[str, list[Run]]]) -> tuple[Table, bool]:
    """The fastest of the rounds, since whatever else the machine does only makes slower; and whether all stages reach SHARE and GAIN."""
    table = Table(
        title=f"Tokens per second, one thread to a worker, fastest of the rounds; wanted: {SHARE} of the loop, {GAIN} times one worker", title_justify="left"
    )
    for header in ("stage", LOOP, ONE, "of the loop", TWO, "times one worker", "others' cores"):
        table.add_column(header, justify="left" if header == "stage" else "right")
    reached = True
    for stage, systems in runs.items():
        loop, one, two = (max(run.tokens_per_second for run in systems[name]) for name in (LOOP, ONE, TWO))
        busiest = max(run.foreign_cores for several in systems.values() for run in several)
        share, gain = one / loop, two / one
        reached = reached and share >= SHARE and gain >= GAIN
        cells = (_marked(share, SHARE), f"{two:,.0f}", _marked(gain, GAIN), f"{busiest:.2f}" + (" DISTURBED" if busiest > QUIET else ""))
        table.add_row(stage, f"{loop:,.0f}", f"{one:,.0f}", *cells)
    return table, reached


def _marked(value: float, wanted: float) -> str:
    return f"{value:.2f}" + ("" if value >= wanted else " BELOW")


if __name__ == "__main__":
    raise SystemExit(main())
