"""What a data file holds, before anything is trained on it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from minigpt_ray.data.formats import PAIR_FORMATS, PairOfAnswers, in_one_format, recognise
from minigpt_ray.data.reasoning import check_scores
from minigpt_ray.data.records import DataError, read_records
from minigpt_ray.data.rows import Row, read_rows, source_of
from minigpt_ray.data.sources import ALL_FORMATS
from minigpt_ray.tokenizer import PreTrainedTokenizerBase, encode_conversation, encode_prompt


@dataclass(frozen=True)
class Contents:
    """Of one file."""

    format: str
    types: dict[str, Counter[str]]
    """Field -> how many records have which type in it."""
    rows: int
    sources: Counter[str]
    lengths: dict[str, list[int]]
    """What is measured -> tokens with the chat template, or bytes of the text."""
    place: str
    """Of the first row."""
    first: list[tuple[str, str]]
    """Name and text of each part of the first row."""
    verdict: str
    """What the rows serve for."""


def contents_of(path: Path, tokenizer: PreTrainedTokenizerBase | None, separator: str | None) -> Contents:
    """Read the whole file. Raises DataError when it cannot be used."""
    first = next(read_records(path))
    format = recognise(first, ALL_FORMATS)
    types: dict[str, Counter[str]] = {}
    for record in read_records(path):
        for name, value in record.value.items():
            types.setdefault(name, Counter())[type(value).__name__] += 1
    return _pairs(path, tokenizer, format, types) if format in PAIR_FORMATS else _conversations(path, tokenizer, separator, format, types)


def _conversations(path: Path, tokenizer: PreTrainedTokenizerBase | None, separator: str | None, format: str, types: dict[str, Counter[str]]) -> Contents:
    rows = list(read_rows([path], separator))
    parts = [*((message["role"], message["content"]) for message in rows[0].messages), ("answer", str(rows[0].answer))]
    sources = Counter(row.source for row in rows)
    return Contents(format, types, len(rows), sources, measure(rows, tokenizer), rows[0].place, parts, verdict(rows, format))


def _pairs(path: Path, tokenizer: PreTrainedTokenizerBase | None, format: str, types: dict[str, Counter[str]]) -> Contents:
    found: list[tuple[PairOfAnswers, str, str]] = []
    ties = 0
    for record, _ in in_one_format(read_records(path), PAIR_FORMATS):
        pairs = PAIR_FORMATS[format].read(record, None)
        ties += not pairs
        found += [(pair, source_of(record, path.stem), record.place) for pair in pairs]
    if not found:
        raise DataError(f"{path}: in each of {ties} rows the answers are equally good; expected a better and a worse one")
    lengths = {
        "prompt": [_prompt_length(pair.prompt, tokenizer) for pair, _, _ in found],
        "chosen, with its prompt": [_length([*pair.prompt, pair.chosen], tokenizer) for pair, _, _ in found],
        "rejected, with its prompt": [_length([*pair.prompt, pair.rejected], tokenizer) for pair, _, _ in found],
    }
    first, _, place = found[0]
    parts = [*((message["role"], message["content"]) for message in first.prompt), ("chosen", first.chosen["content"]), ("rejected", first.rejected["content"])]
    left_out = f"; {ties} rows whose answers are equally good are left out" if ties else ""
    uses = f"usable: pairs for DPO and reward models, as preferences of a mix{left_out}"
    return Contents(format, types, len(found), Counter(source for _, source, _ in found), lengths, place, parts, uses)


def measure(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase | None) -> dict[str, list[int]]:
    """Lengths of prompts and demonstrations: tokens with the chat template, or bytes of the text. Raises DataError."""
    lengths: dict[str, list[int]] = {"prompt": [], "demonstration": []}
    for row in rows:
        try:
            if row.answer is not None and "metadata" in row.answer:
                check_scores(row.answer)
            lengths["prompt"].append(_prompt_length(row.prompt, tokenizer))
            if row.is_demonstration:
                lengths["demonstration"].append(_length(row.messages, tokenizer))
        except ValueError as error:
            raise DataError(f"{row.place}: {error}") from error
    return {name: values for name, values in lengths.items() if values}


def verdict(rows: Sequence[Row], format: str) -> str:
    """What the rows serve for."""
    demonstrations, verifiable = sum(row.is_demonstration for row in rows), sum(row.answer is not None for row in rows)
    uses = ["documents for a mix"] if format == "text" else []
    uses += ["prompts for PPO and evaluation"]
    uses += ["their answers can be verified"] if verifiable == len(rows) else [f"{verifiable} of {len(rows)} answers can be verified"]
    uses += ["demonstrations for SFT"] if demonstrations == len(rows) else [f"{demonstrations} of {len(rows)} are demonstrations, and SFT needs all"]
    return f"usable: {'; '.join(uses)}"


def _prompt_length(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> int:
    return _bytes(messages) if tokenizer is None else len(encode_prompt(tokenizer, messages))


def _length(messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase | None) -> int:
    return _bytes(messages) if tokenizer is None else len(encode_conversation(tokenizer, messages).token_ids)


def _bytes(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(len(message["content"].encode()) for message in messages)
