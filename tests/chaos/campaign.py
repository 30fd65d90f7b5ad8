"""Rounds of faults, each round a run that is held against one that nobody touched, and the ledger of what came of them."""

import json
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from statistics import median

import psutil

from tests.chaos.faults import FAULTS
from tests.chaos.world import END_SECONDS, Job, World, living
from tests.jobs.runs import CHECKOUT, GAPS, Finished, different_tokens, numbers

PATIENCE_STEPS = 6
"""That a run takes while there is nothing to do a fault to, before the next one is taken."""
CALLS = "reward_calls/"
"""Counters of retries."""


@dataclass(frozen=True)
class Entry:
    """A fault that was injected, and what came of it."""

    round: int
    fault: str
    step: int
    """Steps that were complete."""
    phase: str
    """In which it came."""
    redone: int
    """Steps that were taken again."""
    seconds: float
    """That it cost: until two more steps were complete, less what these take."""
    said: str
    """The job's line about it, the first after it."""
    result: str
    """`exact`: the run ended with the numbers and the tokens of the undisturbed one, to the bit; else what is not so."""


def play(world: World, undisturbed: Finished, number: int, moments: Sequence[Sequence[str]], seed: int, say: Callable[[str], object]) -> list[Entry]:
    """One run with some faults at each of several random moments, in any phase.

    Two steps are waited for after a moment, since a role that dies after its work of a step is missed in the next one.
    """
    random = Random(f"{seed}-{number}")
    usual = median(row["time/step_s"] for row in undisturbed.rows)
    entries: list[Entry] = []
    heard: list[int] = []
    run = f"round-{number:03}"
    shutil.rmtree(world.home / run, ignore_errors=True)  # of a campaign that was stopped in it
    with living(world.job(run)) as job:
        job.wait_for_step(0)
        for names in moments:
            time.sleep(random.uniform(0, 1.5 * usual))
            step, phase, before, began = job.step, job.phase, len(job.output), time.monotonic()
            injected = [name for name in names if _inject(name, job, random)]
            if not injected:
                continue
            lived = (not any(FAULTS[name].ends for name in injected) or job.start_again()) and job.wait_for_step(max(step, job.step) + 1)
            seconds = max(0.0, time.monotonic() - began - 1.5 * usual)
            output = job.output[before:]
            begins = [int(after or 0) for after in re.findall(r"goe?s? on after step (\d+)|PPO starts", output)]
            redone = step - min(begins[-1], step) if begins else 0
            for name in injected:
                said = _line(name, output)
                heard.append(before)
                entries.append(Entry(number, name, step, phase, redone, round(seconds, 1), said, "" if lived else "lost"))
                say(
                    f"round {number}: {name} in step {step + 1} ({phase}): {'' if lived else 'LOST, '}{seconds:.1f} s, {redone} redone; {said or 'nothing said so far'}"
                )
            if not lived:
                break
        try:
            job.finish()
            result = compare(Finished(job.directory, job.output), undisturbed)
        except AssertionError:
            result = "lost"
        output = job.output
    said = [entry.said or (_line(entry.fault, output[before:]) if FAULTS[entry.fault].late else "") for entry, before in zip(entries, heard, strict=True)]
    return [replace(entry, said=line, result=entry.result or result) for entry, line in zip(entries, said, strict=True)]


def _line(name: str, output: str) -> str:
    """What the job says of a fault of this kind; empty when nothing."""
    line = re.search(f"^.*{FAULTS[name].said}.*$", output, re.MULTILINE) if FAULTS[name].said else None
    return line[0].strip().replace(f"{CHECKOUT}/", "") if line else ""


def _inject(name: str, job: Job, random: Random) -> bool:
    """As soon as there is something to do it to; False when there is nothing for some steps, or the job ends before."""
    last, end = job.step + PATIENCE_STEPS, time.monotonic() + END_SECONDS
    while job.code() is None and job.step <= last and time.monotonic() < end:
        with suppress(psutil.NoSuchProcess):  # somebody ended meanwhile
            if FAULTS[name].inject(job, random):
                return True
        time.sleep(0.2)
    return False


def compare(run: Finished, undisturbed: Finished) -> str:
    """`exact`, or in what the run differs from the other."""
    if [row["step"] for row in run.rows] != [row["step"] for row in undisturbed.rows]:
        return f"steps {[int(row['step']) for row in run.rows]}"
    different: set[str] = set()
    for mine, theirs in zip(run.rows, undisturbed.rows, strict=True):
        mine, theirs = numbers(mine), numbers(theirs)
        different |= {name for name in mine.keys() | theirs.keys() if not name.startswith((*GAPS, CALLS)) and mine.get(name) != theirs.get(name)}
        different |= {name for name in GAPS if not mine[name] < 1e-3}
    different |= different_tokens(run, undisturbed)
    return "exact" if not different else f"differs in {', '.join(sorted(different))}"


class Ledger:
    """Entries of all rounds that are over, one JSON line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.entries = [Entry(**json.loads(line)) for line in lines]

    def add(self, entries: Iterable[Entry]) -> None:
        with self.path.open("a") as file:
            for entry in entries:
                self.entries.append(entry)
                file.write(json.dumps(asdict(entry)) + "\n")

    @property
    def rounds(self) -> int:
        return max((entry.round for entry in self.entries), default=0)

    def table(self) -> str:
        """Markdown."""
        lines = [
            "| Fault | injected | recovered | numbers and tokens to the bit | said | steps redone | seconds lost, median (most) |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for name, fault in [*FAULTS.items(), ("", None)]:
            mine = [entry for entry in self.entries if fault is None or entry.fault == name]
            if not mine:
                continue
            seconds = [entry.seconds for entry in mine]
            counts = [len(mine), *(sum(map(good, mine)) for good in (_recovered, _exact, _said)), sum(entry.redone for entry in mine)]
            timing = "" if fault is None else f"{median(seconds):.0f} ({max(seconds):.0f})"
            lines.append(f"| {fault.what if fault else 'all'} | {' | '.join(map(str, counts))} | {timing} |")
        return "\n".join(lines)


def _recovered(entry: Entry) -> bool:
    return entry.result != "lost"


def _exact(entry: Entry) -> bool:
    return entry.result == "exact"


def _said(entry: Entry) -> bool:
    return bool(entry.said) or not FAULTS[entry.fault].said


def deal(seed: int, faults: int, names: Sequence[str]) -> list[str]:
    """So many faults, each kind as often as any other, in random order."""
    random, dealt = Random(seed), list[str]()
    while len(dealt) < faults:
        deck = list(names)
        random.shuffle(deck)
        dealt += deck
    return dealt[:faults]
