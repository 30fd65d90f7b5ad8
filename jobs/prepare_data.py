"""Write the data of a run from reasoning-gym tasks, or say what a data file is before anything is trained on it.

    python -m jobs.prepare_data configs/debug/prepare_data.yaml [prompts=1000 tasks.chain_sum.weight=2]
    python -m jobs.prepare_data --check FILE [--tokenizer DIR] [--separator TEXT]

The first writes <run>/prepare_data: demonstrations.jsonl, prompts.jsonl and held_out.jsonl, which share no question, a
tokenizer, and manifest.json, complete or not at all. The second ends with code 0 when the file can be used, else 1.
"""

import argparse
import hashlib
import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from minigpt_ray.cli import help_text, load_config
from minigpt_ray.config import PrepareConfig
from minigpt_ray.data.reasoning import Entry, split
from minigpt_ray.data.rows import DataError, Row, read_records, read_rows, recognise
from minigpt_ray.data.verification import verify
from minigpt_ray.tokenizer import encode_conversation, encode_prompt, load_tokenizer, train_tokenizer

STAGE = "prepare_data"
SETS = ("demonstrations", "prompts", "held_out")
MANIFEST = "manifest.json"
QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)

console = Console()


def main(argv: list[str] | None = None) -> int:
    arguments, rest = _parser().parse_known_args(argv)
    try:
        if arguments.check is not None:
            if rest:
                raise DataError(f"--check reads one file and no config, found also {' '.join(rest)}; remove it")
            check(arguments.check, arguments.tokenizer, arguments.separator)
        else:
            prepare(load_config(PrepareConfig, rest))
    except DataError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.prepare_data",
        usage="%(prog)s CONFIG.yaml ... [a.b=value ...] [--dry-run]\n       %(prog)s --check FILE [--tokenizer DIR] [--separator TEXT]",
        description=__doc__,
        epilog=help_text(PrepareConfig),
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
        check_unchanged(directory, config)
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

    unfinished = directory.with_name(f".{STAGE}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    unfinished.mkdir(parents=True)
    for name in SETS:
        rows = map(_demonstration if name == "demonstrations" else _prompt, sets[name])
        (unfinished / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    tokenizer.save_pretrained(unfinished / "tokenizer")
    manifest = {
        "config": relevant(config),
        "counts": {name: dict(sorted(Counter(_task(entry) for entry in sets[name]).items())) for name in SETS},
        "vocab_size": len(tokenizer),
        "sha256": {str(path.relative_to(unfinished)): _sha256(path) for path in sorted(unfinished.rglob("*")) if path.is_file()},
    }
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    unfinished.rename(directory)  # whole or absent
    console.print(str(directory), markup=False, highlight=False, soft_wrap=True)
    console.print(summary(sets, tokenizer))
    return directory


def check_unchanged(directory: Path, config: PrepareConfig) -> None:
    """Raises DataError unless the directory was written by this config and its files are as they were."""
    remedy = "choose another run=, or remove the directory to make it anew"
    if not (directory / MANIFEST).is_file():
        raise DataError(f"{directory} exists without a {MANIFEST}, so it was not written by this job; {remedy}")
    manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    before, now = _leaves(manifest["config"]), _leaves(relevant(config))
    differences = [f"{path}: {before.get(path)} then, {now.get(path)} now" for path in sorted(before | now) if before.get(path) != now.get(path)]
    if differences:
        raise DataError(f"{directory} was made by another config ({'; '.join(differences)}); {remedy}")
    for name, digest in manifest["sha256"].items():
        path = directory / name
        if not path.is_file() or _sha256(path) != digest:
            raise DataError(f"{path} is {'changed' if path.is_file() else 'missing'} since it was written; {remedy}")


def relevant(config: PrepareConfig) -> dict[str, Any]:
    """The part of the config that the data depends on: not where it is written."""
    return config.model_dump(mode="json", exclude={"run", "output_dir"})


def check_scores(entry: Entry) -> None:
    """Raises DataError unless the entry, read back from JSON, has an answer that its own verifier gives full marks."""
    if entry["answer"] is None:
        raise DataError(f"tasks.{_task(entry)}: the task gives no reference answer, so there is nothing to demonstrate; choose another task")
    score = verify(json.loads(json.dumps(entry)), entry["answer"])
    if score < 1:
        raise DataError(f"tasks.{_task(entry)}: its verifier gives {score} to its own answer {entry['answer']!r} to {entry['question']!r}; choose another task")


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


def _leaves(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    return {leaf: value for key, branch in tree.items() for leaf, value in _leaves(branch, f"{path}.{key}" if path else key).items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------- check


def check(path: Path, tokenizer_path: Path | None, separator: str | None) -> None:
    """Print what the file is: fields, format, sources, lengths, first row. Raises DataError when it cannot be used."""
    tokenizer = None if tokenizer_path is None else _tokenizer(tokenizer_path)
    separator = None if separator is None else separator.replace("\\n", "\n").replace("\\t", "\t")
    first = next(read_records(path))
    format = recognise(first)
    types: dict[str, Counter[str]] = {}
    for record in read_records(path):
        for name, value in record.value.items():
            types.setdefault(name, Counter())[type(value).__name__] += 1
    rows = list(read_rows([path], separator))
    lengths = measure(rows, tokenizer)

    console.print(f"{path}: {len(rows)} rows, format {format!r}", markup=False, highlight=False, soft_wrap=True)
    fields = Table("field", "types and rows")
    for name, kinds in types.items():
        fields.add_row(escape(name), ", ".join(f"{kind} {count}" for kind, count in kinds.items()))
    sources = Table("source", "rows")
    for source, count in Counter(row.source for row in rows).most_common():
        sources.add_row(escape(source), str(count))
    quantiles = Table("tokens" if tokenizer else "bytes", *(f"{q:.0%}" for q in QUANTILES))
    for name, values in lengths.items():
        quantiles.add_row(name, *(f"{value:.0f}" for value in np.quantile(values, QUANTILES, method="higher")))
    for table in (fields, sources, quantiles):
        console.print(table)
    console.print(f"first row ({rows[0].place})", markup=False, highlight=False, soft_wrap=True)
    for name, text in [*((m["role"], m["content"]) for m in rows[0].messages), ("answer", rows[0].answer)]:
        console.print(f"  {name}: {textwrap.shorten(str(text), 300)}", markup=False, highlight=False, soft_wrap=True)
    console.print(verdict(rows), markup=False, highlight=False, soft_wrap=True)


def measure(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, list[int]]:
    """Lengths of prompts and demonstrations: tokens with the chat template, or bytes of the text. Raises DataError."""
    lengths: dict[str, list[int]] = {"prompt": [], "demonstration": []}
    for row in rows:
        try:
            if row.answer is not None and "metadata" in row.answer:
                check_scores(row.answer)
            lengths["prompt"].append(_bytes(row.prompt) if tokenizer is None else len(encode_prompt(tokenizer, row.prompt)))
            if row.is_demonstration:
                lengths["demonstration"].append(_bytes(row.messages) if tokenizer is None else len(encode_conversation(tokenizer, row.messages).token_ids))
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from error
    return {name: values for name, values in lengths.items() if values}


def verdict(rows: Sequence[Row]) -> str:
    """What the rows serve for."""
    demonstrations, verifiable = sum(row.is_demonstration for row in rows), sum(row.answer is not None for row in rows)
    uses = ["prompts for PPO and evaluation"]
    uses += ["their answers can be verified"] if verifiable == len(rows) else [f"{verifiable} of {len(rows)} answers can be verified"]
    uses += ["demonstrations for SFT"] if demonstrations == len(rows) else [f"{demonstrations} of {len(rows)} are demonstrations, and SFT needs all"]
    return f"usable: {'; '.join(uses)}"


def _tokenizer(path: Path) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise DataError(f"--tokenizer: {error}") from error


def _bytes(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"].encode()) for message in messages)


if __name__ == "__main__":
    raise SystemExit(main())
