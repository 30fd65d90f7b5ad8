"""A program and all processes that it starts, watched from outside: memory, CPU time, and what else ran meanwhile."""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

TICKS = os.sysconf("SC_CLK_TCK")


class BenchmarkError(RuntimeError):
    """A program that was measured failed: which, and where its output is."""


@dataclass(frozen=True)
class Watched:
    """One run of a program."""

    seconds: float
    """From its start to its end."""
    first_row: float
    """Seconds from its start to its first row of metrics."""
    peak_pss_gib: float
    """Largest sum over its processes of proportional set sizes: a page that several of them share counts once."""
    processes: int
    """At that moment."""
    foreign_cores: float
    """Cores that programs other than this one and its watcher kept busy meanwhile, on average."""
    cpu_seconds: float
    """CPU time of its processes. It is less noisy than `seconds` where the program waits for cores."""


def watch(command: Sequence[str], environment: Mapping[str, str], log: Path, rows: Path, is_row: str, every: float = 0.5, memory: bool = True) -> Watched:
    """Run a program to its end, looking at its processes every so many seconds; its output goes to `log`.

    `rows` is a file that it writes; the first line with `is_row` in it is its first row. `memory` may be left alone, since
    each look at it stops the processes for milliseconds. Raises BenchmarkError when the program does not end with 0.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        start, others = time.perf_counter(), _machine_seconds() - time.process_time()
        program = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})
        first_row, peak, processes, seconds = 0.0, 0.0, 0, {0: 0.0}
        while program.poll() is None:
            tree = _tree(program.pid)
            held = sum(_pss(process) for process in tree) / 2**30 if memory else 0.0
            peak, processes = max((peak, processes), (held, len(tree)))
            seconds |= {process.pid: spent for process in tree if (spent := _cpu_seconds(process)) > 0}
            if not first_row and rows.is_file() and is_row in rows.read_text():
                first_row = time.perf_counter() - start
            with suppress(subprocess.TimeoutExpired):
                program.wait(every)
    wall = time.perf_counter() - start
    if program.returncode:
        raise BenchmarkError(f"`{' '.join(command)}` ended with code {program.returncode}; its output is in {log}")
    used = sum(seconds.values())
    foreign = _machine_seconds() - time.process_time() - others - used
    return Watched(wall, first_row, peak, processes, max(0.0, foreign) / wall, used)


def _tree(pid: int) -> list[psutil.Process]:
    """The process and its descendants."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _pss(process: psutil.Process) -> int:
    """Proportional set size in bytes; 0 when the process has just ended."""
    try:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _cpu_seconds(process: psutil.Process) -> float:
    """CPU time of the process, and of those children that have ended."""
    try:
        return sum(process.cpu_times()[:4])
    except psutil.NoSuchProcess:
        return 0.0


def _machine_seconds() -> float:
    """CPU time of everything on this machine since it was started."""
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / TICKS
