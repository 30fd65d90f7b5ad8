"""Questions from reasoning-gym (arXiv:2505.24760), split into sets that share none.

Item i of a task with seed s is item 0 of seed s + i: sets drawn with near seeds overlap, a held-out set can lie wholly
inside a training set. So each task is drawn once (once for each choice of options), from a seed that is a hash, duplicates
are dropped by their question, and what is left is shuffled and dealt to the sets.
"""

import difflib
import json
import warnings
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt_ray.data.rows import DataError
from minigpt_ray.data.verification import TASK_OPTIONS, verify

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

Entry = dict[str, Any]
"""`question`, `answer`, `metadata`: what reasoning-gym gives and scores."""
Options = Mapping[str, Any]
Differing = Mapping[tuple[str, str], Options]


def create(task: str, options: Options, seed: int, size: int) -> "ProceduralDataset":
    """The dataset of a task. Raises DataError for an unknown task or options that it does not take."""
    if task not in _tasks():
        near = difflib.get_close_matches(task, _tasks(), n=3)
        raise DataError(f"tasks.{task}: reasoning-gym has no such task; expected one of {', '.join(near or _tasks())}")
    if reserved := {"seed", "size"} & options.keys():
        raise DataError(f"tasks.{task}.options.{min(reserved)} is chosen by the split; remove it")
    try:
        return _reasoning_gym().create_dataset(task, **options, seed=seed, size=size)
    except (TypeError, AssertionError, ValueError) as error:
        raise DataError(f"tasks.{task}.options={dict(options)}: the task refuses them: {error}; mend the options") from error


def generate(task: str, options: Options, size: int, seed: int) -> Iterator[Entry]:
    """`size` entries of a task, duplicates included. Those drawn with options carry them, since some tasks score by them."""
    dataset = create(task, options, seed, size)
    for index in range(size):
        entry = dataset[index]
        metadata = {**entry["metadata"], "source_dataset": task}
        yield {**entry, "metadata": {**metadata, TASK_OPTIONS: dict(options)} if options else metadata}


def distinct(task: str, options: Options, size: int, seed: int, seen: Mapping[str, str] | None = None) -> list[Entry]:
    """`size` entries with different questions, in random order, none that this task has given before (`seen`: question -> task).

    Raises DataError when the task does not have that many.
    """
    found: dict[str, Entry] = {}
    attempts = 10 * size + 1000
    for entry in generate(task, options, attempts, _seed(seed, task)):
        if (seen or {}).get(content(entry)) != task:
            found.setdefault(content(entry), entry)
        if len(found) == size:
            break
    else:
        raise DataError(
            f"tasks.{task}: {attempts} draws gave {len(found)} distinct questions, but the sets need {size} of this task; "
            "ask for fewer, lower its weight, or widen its options"
        )
    entries = list(found.values())
    # Easy questions repeat and so come early: without the shuffle the first set would be easier than the last.
    return [entries[i] for i in np.random.default_rng([seed, zlib.crc32(task.encode())]).permutation(size)]


def split(tasks: Mapping[str, tuple[float, Options]], sizes: Mapping[str, int], seed: int, differing: Differing | None = None) -> dict[str, list[Entry]]:
    """Entries for each named set, mixed by weight and shuffled; no question is in two sets, or twice in one.

    `tasks`: name -> (weight, options). `sizes`: set -> number of entries. `differing`: (set, task) -> options that this set has instead.
    Raises DataError when a task cannot give its share.
    """
    weights = [weight for weight, _ in tasks.values()]
    shares = {name: apportion(size, weights) for name, size in sizes.items()}
    sets: dict[str, list[Entry]] = {name: [] for name in sizes}
    seen: dict[str, str] = {}
    for index, (task, (_, options)) in enumerate(tasks.items()):
        asked: dict[str, list[str]] = {}  # options -> the sets that have them, which are dealt from one draw
        for name in sizes:
            asked.setdefault(json.dumps({**options, **(differing or {}).get((name, task), {})}), []).append(name)
        for given, alike in asked.items():
            needed = [shares[name][index] for name in alike]
            entries = distinct(task, json.loads(given), sum(needed), seed, seen)
            for entry in entries:
                if seen.setdefault(content(entry), task) != task:
                    raise DataError(f"tasks.{task} and tasks.{seen[content(entry)]} both ask {entry['question']!r}; drop one of the tasks")
            for name, part in zip(alike, np.split(np.arange(len(entries)), np.cumsum(needed)[:-1]), strict=True):
                sets[name] += [entries[i] for i in part]
    for number, name in enumerate(sizes):
        order = np.random.default_rng([seed, number]).permutation(sizes[name])
        sets[name] = [sets[name][i] for i in order]
    return sets


def apportion(total: int, weights: list[float]) -> list[int]:
    """Whole shares of `total` by weight that add up to it (largest remainders)."""
    exact = total * np.array(weights) / sum(weights)
    shares = np.floor(exact).astype(int)
    largest = np.argsort(shares - exact, kind="stable")[: total - shares.sum()]
    shares[largest] += 1
    return [int(share) for share in shares]


def check_scores(entry: Entry) -> None:
    """Raises DataError unless the entry, read back from JSON, has an answer that its own verifier gives full marks."""
    if entry["answer"] is None:
        raise DataError(
            f"tasks.{entry['metadata']['source_dataset']}: the task gives no reference answer, so there is nothing to demonstrate; choose another task"
        )
    score = verify(json.loads(json.dumps(entry)), entry["answer"])
    if score < 1:
        raise DataError(
            f"tasks.{entry['metadata']['source_dataset']}: its verifier gives {score} to its own answer {entry['answer']!r} to {entry['question']!r}; choose another task"
        )


def content(entry: Entry) -> str:
    """What makes two questions the same: the text, white space and case aside."""
    return " ".join(entry["question"].split()).casefold()


def _seed(seed: int, task: str) -> int:
    return int(np.random.SeedSequence([seed, zlib.crc32(task.encode())]).generate_state(1)[0] >> 1)


@cache
def _tasks() -> tuple[str, ...]:
    return tuple(sorted(_reasoning_gym().factory.DATASETS.keys() - {"composite"}))  # a mix of others, which `tasks` is already


def _reasoning_gym() -> ModuleType:
    """The library, which takes seconds to import, and whose dependencies warn when they are compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
    return reasoning_gym
