"""Write the data of a run from reasoning-gym tasks or from a mix of sources, or say what a data file is before anything is trained on it.

    python -m jobs.prepare_data configs/debug/prepare_data.yaml [prompts=1000 tasks.chain_sum.weight=2]
    python -m jobs.prepare_data configs/data/posttrain/sft/maths.yaml [run=maths demonstrations.sources.gsm8k.count=1000]
    python -m jobs.prepare_data --check FILE [--tokenizer DIR] [--separator TEXT]

The first writes <run>/prepare_data: demonstrations.jsonl, prompts.jsonl and held_out.jsonl, which share no question, a
tokenizer, and manifest.json, complete or not at all. The second, a file with `sources`, writes what it has sources for:
documents.jsonl, demonstrations.jsonl, preferences.jsonl, prompts.jsonl, and what is held out of each. The third ends with
code 0 when the file can be used, else 1. What is refused otherwise ends with code 2, as in every job.
"""

import argparse
import json
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from minigpt_ray.cli import is_mix, load_config
from minigpt_ray.config import FileSource, MixConfig, PrepareConfig, TokenizerConfig
from minigpt_ray.data import mix_summary
from minigpt_ray.data.contents import contents_of
from minigpt_ray.data.mix import HELD_OUT, choose, tally
from minigpt_ray.data.prepared import check_unchanged, commit, relevant, sha256_of, unfinished
from minigpt_ray.data.reasoning import Entry, check_scores, split
from minigpt_ray.data.records import DataError
from minigpt_ray.data.sources import Watch, paths
from minigpt_ray.data.spool import Spool, origins
from minigpt_ray.help import help_text
from minigpt_ray.tokenizer import PreTrainedTokenizerBase, encode_conversation, encode_prompt, load_tokenizer, train_tokenizer

STAGE = "prepare_data"
SETS = ("demonstrations", "prompts", "held_out")
TOKENIZER_BYTES = 64 << 20
"""As much of each file of a mix as a tokenizer is trained on."""
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

console = Console()


def main(argv: list[str] | None = None) -> int:
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.check is not None and rest:
        print(f"--check reads one file and no config, found also {' '.join(rest)}; remove it", file=sys.stderr)
        return 2
    try:
        if arguments.check is not None:
            check(arguments.check, arguments.tokenizer, arguments.separator)
        elif not is_mix(rest):
            prepare(load_config(PrepareConfig, rest))
        else:
            prepare_mix(load_config(MixConfig, rest))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1 if arguments.check is not None else 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.prepare_data",
        usage="%(prog)s CONFIG.yaml ... [a.b=value ...] [--dry-run]\n       %(prog)s --check FILE [--tokenizer DIR] [--separator TEXT]",
        description=__doc__,
        epilog=f"{help_text(PrepareConfig)}\n\n\n{help_text(MixConfig)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--check", type=Path, metavar="FILE", help="say what a data file is; exit 0 when it can be used, else 1")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="with --check: count tokens with this tokenizer instead of bytes")
    parser.add_argument("--separator", metavar="TEXT", help='with --check: where the prompt of a {"text"} row ends; \\n stands for a newline')
    return parser


# ------------------------------------------------------------------------------------------------------- prepare


def prepare(config: PrepareConfig) -> Path:
    """Write the data, or find it written by the same config. Raises DataError when it was written by another."""
    directory = config.stage_dir(STAGE)
    if directory.exists():
        check_unchanged(directory, config, {})
        console.print(f"{directory} is complete and was made by this config; nothing to do", soft_wrap=True)
        return directory
    tasks = {name: (task.weight, task.options) for name, task in config.tasks.items()}
    easier = {("demonstrations", name): task.demonstration_options for name, task in config.tasks.items()}
    sets = split(tasks, {name: getattr(config, name) for name in SETS}, config.seed, easier)
    for name in SETS:
        for entry in sets[name]:
            check_scores(entry)
    texts = (text for name in ("demonstrations", "prompts") for entry in sets[name] for text in ("user", entry["question"], "assistant", entry["answer"]))
    tokenizer = train_tokenizer(texts, config.tokenizer.vocab_size, config.tokenizer.phrases)

    with unfinished(directory) as written:
        for name in SETS:
            rows = map(_demonstration if name == "demonstrations" else _prompt, sets[name])
            (written / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        tokenizer.save_pretrained(written / "tokenizer")
        manifest = {
            "config": relevant(config),
            "counts": {name: dict(sorted(Counter(_task(entry) for entry in sets[name]).items())) for name in SETS},
            "vocab_size": len(tokenizer),
        }
        commit(written, directory, manifest)
    console.print(str(directory), markup=False, highlight=False, soft_wrap=True)
    console.print(summary(sets, tokenizer))
    return directory


def prepare_mix(config: MixConfig) -> Path:
    """Write what the mix has sources for, or find it written from the same files by the same config. Raises DataError."""
    directory = config.stage_dir(STAGE)
    inputs = {str(path): sha256_of(path) for origin in origins(config) if isinstance(origin.source, FileSource) for path in paths(origin.path, origin.source)}
    if directory.exists():
        check_unchanged(directory, config, inputs)
        console.print(f"{directory} is complete and was made by this config; nothing to do", soft_wrap=True)
        return directory
    with unfinished(directory) as written, _progress() as watch:
        spool = Spool(written / "spool", config)
        spool.read(watch)
        watch("comparing rows", 0, 0)
        choice = choose(spool, config)
        watch("writing", 0, 0)
        parts = {**choice.train, **{HELD_OUT[kind]: rows for kind, rows in choice.held_out.items()}}
        counts = {name: spool.write(rows, written / f"{name}.jsonl") for name, rows in parts.items() if len(rows)}
        tallies = tally(spool, choice)
        spool.close()
        if config.tokenizer is not None:
            _train_tokenizer(config.tokenizer, [written / f"{kind}.jsonl" for kind in choice.train]).save_pretrained(written / "tokenizer")
        mix_summary.plot(tallies, written / "summary.svg")
        manifest = {
            "config": relevant(config),
            "counts": counts,
            "sources": {f"{of.kind}.sources.{of.name}": of.resolved() for of in tallies},
            "notes": choice.notes,
            "inputs": inputs,
        }
        commit(written, directory, manifest)
    console.print(str(directory), markup=False, highlight=False, soft_wrap=True)
    console.print(mix_summary.table(tallies))
    for note in (*choice.notes, *(f"dropped as malformed, the first of its source: {of.first_malformed}" for of in tallies if of.first_malformed)):
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    return directory


@contextmanager
def _progress() -> Iterator[Watch]:
    """A bar, where there is somebody to see it."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, shown, named = progress.add_task("", total=None), 0.0, ""

        def watch(what: str, done: int, total: int) -> None:
            nonlocal shown, named
            if what != named or time.monotonic() - shown > 0.2:  # it is told of every record
                shown, named = time.monotonic(), what
                progress.update(task, description=what, completed=done, total=total or None)

        yield watch


def _train_tokenizer(config: TokenizerConfig, files: Sequence[Path]) -> PreTrainedTokenizerBase:
    """Trained on the first rows of each file, which are in random order."""
    return train_tokenizer((text for path in files for text in _texts(path)), config.vocab_size, config.phrases)


def _texts(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        while file.tell() < TOKENIZER_BYTES and (line := file.readline()):
            row = json.loads(line)
            yield from [row["text"]] if "text" in row else []
            prompt = row.get("prompt", [])
            messages = [*row.get("messages", []), *([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), *row.get("chosen", [])]
            for message in messages:
                yield from (message["role"], message["content"])


def summary(sets: Mapping[str, Sequence[Entry]], tokenizer: PreTrainedTokenizerBase) -> Table:
    """Counts by source, and the longest prompt and demonstration, which the limits of later stages must hold."""
    prompt = max(len(encode_prompt(tokenizer, [_question(entry)])) for entries in sets.values() for entry in entries)
    demonstration = max(len(encode_conversation(tokenizer, _demonstration(entry)["messages"]).token_ids) for entry in sets["demonstrations"])
    table = Table(caption=f"tokenizer of {len(tokenizer)} tokens; longest prompt {prompt} tokens, longest demonstration {demonstration} tokens")
    table.add_column("source", overflow="fold")
    for name in SETS:
        table.add_column(name, justify="right")
    counts = {name: Counter(map(_task, entries)) for name, entries in sets.items()}
    for source in sorted(set().union(*counts.values())):
        table.add_row(source, *(str(counts[name][source]) for name in SETS))
    table.add_section()
    table.add_row("all", *(str(counts[name].total()) for name in SETS))
    return table


def _question(entry: Entry) -> dict[str, str]:
    return {"role": "user", "content": entry["question"]}


def _demonstration(entry: Entry) -> dict[str, Any]:
    return {"messages": [_question(entry), {"role": "assistant", "content": entry["answer"]}], "source": _task(entry)}


def _prompt(entry: Entry) -> dict[str, Any]:
    return {"prompt": entry["question"], "source": _task(entry), "entry": entry}


def _task(entry: Entry) -> str:
    return str(entry["metadata"]["source_dataset"])


# --------------------------------------------------------------------------------------------------------- check


def check(path: Path, tokenizer_path: Path | None, separator: str | None) -> None:
    """Print what the file is: fields, format, sources, lengths, first row. Raises DataError when it cannot be used."""
    tokenizer = None if tokenizer_path is None else _tokenizer(tokenizer_path)
    contents = contents_of(path, tokenizer, None if separator is None else separator.replace("\\n", "\n").replace("\\t", "\t"))

    console.print(f"{path}: {contents.rows} rows, format {contents.format!r}", markup=False, highlight=False, soft_wrap=True)
    fields = Table("field", "types and rows")
    for name, kinds in contents.types.items():
        fields.add_row(escape(name), ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    sources = Table("source", "rows")
    for source, count in contents.sources.most_common():
        sources.add_row(escape(source), str(count))
    quantiles = Table("tokens" if tokenizer else "bytes", *(f"{q:.0%}" for q in QUANTILES))
    for name, values in contents.lengths.items():
        quantiles.add_row(name, *(f"{value:.0f}" for value in np.quantile(values, QUANTILES, method="higher")))
    for table in (fields, sources, quantiles):
        console.print(table)
    console.print(f"first row ({contents.place})", markup=False, highlight=False, soft_wrap=True)
    for name, text in contents.first:
        console.print(f"  {name}: {textwrap.shorten(text, 300)}", markup=False, highlight=False, soft_wrap=True)
    console.print(contents.verdict, markup=False, highlight=False, soft_wrap=True)


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise DataError(f"--tokenizer: {error}") from error


if __name__ == "__main__":
    raise SystemExit(main())
