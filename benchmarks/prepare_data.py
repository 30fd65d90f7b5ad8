"""Preparing a gigabyte of JSON Lines: speed of a core, and memory.

    .venv/bin/python -m benchmarks.prepare_data                     1000 MB; minutes
    .venv/bin/python -m benchmarks.prepare_data --megabytes 100

The file is made of words that are as frequent as in natural text; of its documents every 20th is an exact and every 20th a near
duplicate of an earlier one. It lies below outputs/bench and is removed at the end. All filters are on, the limit of memory is 2 GiB.
"""

import argparse
import itertools
import json
import resource
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.processes import watch

OUTPUT = Path("outputs") / "bench" / "prepare_data"
LIMIT_GIB = 2.0
WORDS = 20_000
SENTENCES = 50_000
SENTENCE_WORDS = 12
MEAN_SENTENCES = 30
KEPT = 1000
"""Documents that may be repeated."""
FILTERS = "{min_characters: 20, max_characters: 1000000, max_repetition: 0.5, drop: ['lorem ipsum']}"
THREADS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}

console = Console()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prepare_data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000)
    arguments = parser.parse_args(argv)
    shutil.rmtree(OUTPUT, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    size = write_documents(OUTPUT / "documents.jsonl", arguments.megabytes * 10**6)
    source = f"{{kind: file, files: ['{OUTPUT / 'documents.jsonl'}'], filters: {FILTERS}}}"
    command = [sys.executable, "-m", "jobs.prepare_data", f"output_dir={OUTPUT}", "run=run", f"documents.sources={{made: {source}}}"]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    watched = watch(command, THREADS, OUTPUT / "log", OUTPUT / "none", "", every=0.2)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    manifest = json.loads((OUTPUT / "run" / "prepare_data" / "manifest.json").read_text())
    (counts,) = manifest["sources"].values()
    shutil.rmtree(OUTPUT / "run")
    (OUTPUT / "documents.jsonl").unlink()

    table = Table("MB", "rows", "duplicates", "near duplicates", "s", "CPU s", "MB/s of a core", "peak PSS", "others' cores")
    table.add_row(
        f"{size / 1e6:.0f}",
        f"{counts['read']:,}",
        *(f"{counts['dropped'].get(reason, 0):,}" for reason in ("duplicate", "near_duplicate")),
        f"{wall:.0f}",
        f"{cpu:.0f}",
        f"{size / 1e6 / cpu:.1f}",
        f"{watched.peak_pss_gib:.2f} GiB",
        f"{watched.foreign_cores:.1f}",
    )
    console.print(table)
    return 0 if watched.peak_pss_gib < LIMIT_GIB else 1


def write_documents(path: Path, size: int) -> int:
    """Write documents until the file has so many bytes; returns how many it has."""
    written = 0
    with path.open("wb") as file:
        for text in documents(0):
            if written >= size:
                return written
            written += file.write(json.dumps({"text": text, "source": "made"}).encode() + b"\n")
    raise AssertionError("documents have no end")


def documents(seed: int) -> Iterator[str]:
    """Texts without end, of sentences out of many."""
    random = np.random.default_rng(seed)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    words = np.array(["".join(random.choice(letters, 2 + random.poisson(3))) for _ in range(WORDS)])
    frequencies = 1 / np.arange(1, WORDS + 1)
    drawn = random.choice(words, (SENTENCES, SENTENCE_WORDS), p=frequencies / frequencies.sum())
    sentences = [" ".join(sentence) + "." for sentence in drawn.tolist()]
    kept: list[list[str]] = []
    for number in itertools.count(1):
        if number % 20 == 0:
            text = kept[random.integers(len(kept))]
        elif number % 20 == 10:
            text = [*kept[random.integers(len(kept))], f"Changed {number}."]
        else:
            text = [sentences[place] for place in random.integers(0, SENTENCES, 2 + int(random.exponential(MEAN_SENTENCES - 2)))]
            if len(kept) < KEPT:
                kept.append(text)
            else:
                kept[random.integers(KEPT)] = text
        yield " ".join(text)


if __name__ == "__main__":
    raise SystemExit(main())
