"""Preference pairs from sampled answers and their scores: which answers make a pair, and the files that hold them.

A pair is a row that DPO and reward models read: `{"prompt": [messages], "chosen": [messages], "rejected": [messages], "source",
"chosen_score", "rejected_score"}`.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import xxhash
from rich.table import Table

from minigpt_ray.cli import write_resolved
from minigpt_ray.config import GeneratePreferencesConfig, PromptsConfig
from minigpt_ray.data.prepared import check_unchanged, commit, relevant, unfinished
from minigpt_ray.data.rows import DataError, Message, read_rows
from minigpt_ray.data.verification import verify
from minigpt_ray.rl.rollout import Prompt, Rollout
from minigpt_ray.tokenizer import PreTrainedTokenizerBase, encode_conversation

Pair = dict[str, Any]
"""A row of preferences.jsonl."""
RIGHT = -1
"""`Rollout.sample` of the right answer, which nobody sampled."""
Counts = Counter[str]
"""What became of prompts and answers, by the names of COUNTED."""

INDIFFERENT = ("placement", "prompts_per_batch", "restart_limit", "generator.restart_limit", "generator.fatal_prompt_limit")
"""Fields of the configuration that the pairs do not depend on, besides where they are written."""
COUNTED = (
    "prompts",
    "prompts without a pair",
    "prompts with a right answer",
    "answers",
    "answers cut at the length limit",
    "answers without a score",
    "answers blank or with a special token",
    "answers that repeat another",
    "pairs",
    "pairs held out",
)


@dataclass(frozen=True)
class Answer:
    """One answer and what was found about it."""

    text: str
    score: float
    """Weighted sum of the reward sources; nan when a source gave none."""
    verified: float
    """The verifier's score in [0, 1]; nan for a prompt without an answer."""
    finished: bool
    """False when it was cut at the length limit."""


@dataclass(frozen=True)
class Answers:
    """All answers to a prompt."""

    prompt: Prompt
    sampled: tuple[Answer, ...]
    right: Answer | None
    """The right answer, where it is known and asked for."""


# ----------------------------------------------------------------------------------------------------- right answers


def load_right_answers(config: PromptsConfig, default_file: Path, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> dict[int, Rollout]:
    """The right answers to the prompts that have one, by serial number and in the form of sampled ones, so that any source can score them.

    Raises DataError when none has, or one cannot be encoded.
    """
    rows = read_rows(config.files or (default_file,), config.separator)
    demonstrated = {_key(row.prompt): row.messages[-1]["content"] for row in rows if row.is_demonstration}
    texts = {prompt.serial: _right_answer(prompt, demonstrated) for prompt in prompts}
    found = {prompt.serial: _as_rollout(prompt, text, tokenizer) for prompt in prompts if (text := texts[prompt.serial]) is not None}
    if not found:
        raise DataError("right_answer=true, but no prompt carries a right answer; give demonstrations, or prompts with an answer, or set it to false")
    return found


def _right_answer(prompt: Prompt, demonstrated: Mapping[tuple[str, ...], str]) -> str | None:
    """What was demonstrated, else what the verifier checks by; None where that is not accepted by the verifier itself."""
    text = demonstrated.get(_key(prompt.messages))
    if text is None and prompt.answer is not None:
        text = prompt.answer["answer"]
    return text if text is not None and (prompt.answer is None or verify(prompt.answer, text) == 1.0) else None


def _as_rollout(prompt: Prompt, text: str, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    try:
        example = encode_conversation(tokenizer, [*prompt.messages, {"role": "assistant", "content": text}])
    except ValueError as error:
        raise DataError(f"the right answer {text!r} to {prompt.messages[-1]['content']!r}: {error}") from error
    token_ids = example.token_ids[len(prompt.token_ids) :]
    size = len(token_ids)
    return Rollout(prompt, RIGHT, token_ids, np.ones(size, bool), np.zeros(size, np.float32), np.zeros(size, np.int32), text, "stop")


def _key(messages: Sequence[Message]) -> tuple[str, ...]:
    """A conversation as the key of a mapping."""
    return tuple(part for message in messages for part in (message["role"], message["content"]))


# -------------------------------------------------------------------------------------------------------------- pairs


def make_pairs(answers: Answers, config: GeneratePreferencesConfig, special_tokens: Sequence[str]) -> tuple[list[Pair], Counts]:
    """The pairs of one prompt, and what became of it and its answers.

    An answer is left out when it has no score, is blank, repeats an earlier one, or spells out a special token, which no conversation
    may. One that was cut at the length limit is never chosen: it would teach to stop there.
    """
    usable, counts = _usable(answers.sampled, special_tokens)
    draws = np.random.default_rng([config.seed, answers.prompt.serial])
    pairs = PAIRINGS[config.strategy](usable, config.min_margin, config.max_pairs_per_prompt, draws)
    if answers.right is not None and math.isfinite(answers.right.score):
        counts["prompts with a right answer"] += 1
        wrong = [answer for answer in usable if answer.text.strip() != answers.right.text.strip() and answer.verified != 1.0]
        if wrong:
            pairs = [*pairs, (answers.right, wrong[draws.integers(len(wrong))])]
    counts.update({"prompts": 1, "prompts without a pair": int(not pairs), "pairs": len(pairs)})
    return [_row(answers.prompt, chosen, rejected) for chosen, rejected in pairs], counts


def _usable(sampled: Sequence[Answer], special_tokens: Sequence[str]) -> tuple[list[Answer], Counts]:
    usable: dict[str, Answer] = {}
    counts = Counter({"answers": len(sampled), "answers cut at the length limit": sum(not answer.finished for answer in sampled)})
    for answer in sampled:
        text = answer.text.strip()
        if not math.isfinite(answer.score):
            counts["answers without a score"] += 1
        elif not text or any(token in text for token in special_tokens):
            counts["answers blank or with a special token"] += 1
        elif text in usable:
            counts["answers that repeat another"] += 1
        else:
            usable[text] = answer
    return list(usable.values()), counts


ChosenRejected = tuple[Answer, Answer]


def best_vs_worst(answers: Sequence[Answer], min_margin: float, limit: int, draws: np.random.Generator) -> list[ChosenRejected]:
    """The best finished answer and the worst of all; the earlier one where scores are equal."""
    finished = [answer for answer in answers if answer.finished]
    if not finished:
        return []
    best, worst = max(finished, key=lambda answer: answer.score), min(answers, key=lambda answer: answer.score)
    return [(best, worst)] if best.score - worst.score > min_margin else []


def all_pairs(answers: Sequence[Answer], min_margin: float, limit: int, draws: np.random.Generator) -> list[ChosenRejected]:
    """Any two answers whose scores differ by more than the margin; of more than `limit` of them, so many are drawn."""
    ordered = [(a, b) if a.score > b.score else (b, a) for a, b in combinations(answers, 2)]
    pairs = [(chosen, rejected) for chosen, rejected in ordered if chosen.finished and chosen.score - rejected.score > min_margin]
    return pairs if len(pairs) <= limit else [pairs[place] for place in np.sort(draws.choice(len(pairs), limit, replace=False))]


def no_pairs(answers: Sequence[Answer], min_margin: float, limit: int, draws: np.random.Generator) -> list[ChosenRejected]:
    """Sampled answers are compared with the right one alone."""
    return []


PAIRINGS = {"best_vs_worst": best_vs_worst, "all_pairs": all_pairs, "none": no_pairs}


def _row(prompt: Prompt, chosen: Answer, rejected: Answer) -> Pair:
    return {
        "prompt": [dict(message) for message in prompt.messages],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "source": prompt.source,
        "chosen_score": chosen.score,
        "rejected_score": rejected.score,
    }


# -------------------------------------------------------------------------------------------------------------- files


class PairFile:
    """preferences.jsonl, held_out.jsonl and manifest.json of a directory that is whole or not there.

    Until it is whole, the pairs of each prompt are kept in a file beside it, so that a job which follows one that ended before need not
    answer again. Raises DataError when the directory, or that file, was made by another configuration or other models.
    """

    def __init__(self, directory: Path, config: GeneratePreferencesConfig, model: str, judges: Mapping[str, str] = MappingProxyType({})) -> None:
        """`model`: directory or hub id of the model that answers; `judges`: those of the models that score its answers, by `rewards.<name>`."""
        self.directory, self.config = directory, config
        self.counts: Counts = Counter()
        self._pairs: dict[int, tuple[Prompt, list[Pair]]] = {}
        self.kept = directory.with_name(f".{directory.name}.jsonl")
        """The pairs of each prompt, until all are there."""
        self._inputs = {f"the model {config.model}": _fingerprint(model), **{f"the model of {name}": _fingerprint(path) for name, path in judges.items()}}
        self.is_complete = directory.exists()
        if self.is_complete:
            check_unchanged(directory, config, self._inputs, INDIFFERENT)
            self.kept.unlink(missing_ok=True)  # of a job that was killed after its last word

    def take_over(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The pairs that an earlier job of this configuration, these models and prompts has kept; the prompts that are left.

        Raises DataError when what is kept was made of something else.
        """
        digest = xxhash.xxh3_128_hexdigest(json.dumps([[prompt.serial, prompt.messages, prompt.answer] for prompt in prompts], default=str).encode())
        header = json.dumps({"config": relevant(self.config, INDIFFERENT), "inputs": self._inputs, "prompts": digest}) + "\n"
        lines = self.kept.read_text(encoding="utf-8").splitlines(keepends=True) if self.kept.is_file() else []
        kept = [line for line in lines[1:] if line.endswith("\n")]  # the last line of a killed job may be torn
        if kept and lines[0] != header:
            raise DataError(
                f"{self.kept} has the pairs of {len(kept)} prompts that were made by another configuration, other models or of other prompts; "
                "give the command that began them, or remove the file"
            )
        with self._keeping():
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            partial = self.kept.with_name(f"{self.kept.name}.partial")
            partial.write_text(header + "".join(kept), encoding="utf-8")
            partial.replace(self.kept)
        by_serial = {prompt.serial: prompt for prompt in prompts}
        for row in map(json.loads, kept):
            if row["serial"] not in self._pairs:
                self._take(by_serial[row["serial"]], row["pairs"], Counter(row["counts"]))
        return [prompt for prompt in prompts if prompt.serial not in self._pairs]

    def add(self, prompt: Prompt, pairs: list[Pair], counts: Counts) -> None:
        """The pairs of one prompt; in which order prompts come makes no difference."""
        self._take(prompt, pairs, counts)
        with self._keeping(), self.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"serial": prompt.serial, "pairs": pairs, "counts": counts}) + "\n")

    def _take(self, prompt: Prompt, pairs: list[Pair], counts: Counts) -> None:
        self._pairs[prompt.serial] = prompt, pairs
        self.counts.update(counts)

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{error.strerror} while writing {self.kept}; what is there is kept: make room, and give the same command again") from error

    def write(self) -> None:
        """Raises DataError when there is no pair at all."""
        if not self.counts["pairs"]:
            self.kept.unlink(missing_ok=True)
            raise DataError(
                f"no two of {self.counts['answers']} answers to {self.counts['prompts']} prompts make a pair: all answers to a prompt are alike to the rewards; "
                "raise sampling.temperature or sampling.n, lower min_margin, choose other prompts or another reward"
            )
        rows: dict[str, list[Pair]] = {"preferences": [], "held_out": []}
        for _, (prompt, pairs) in sorted(self._pairs.items()):
            rows["held_out" if is_held_out(prompt, self.config.held_out_share, self.config.seed) else "preferences"] += pairs
        self.counts["pairs held out"] = len(rows["held_out"])
        manifest = {
            "config": relevant(self.config, INDIFFERENT),
            "inputs": self._inputs,
            "became_of": {name: self.counts[name] for name in COUNTED},
            "counts": {name: dict(sorted(Counter(pair["source"] for pair in pairs).items())) for name, pairs in rows.items()},
        }
        with unfinished(self.directory) as written:
            write_resolved(self.config, written)
            for name, pairs in rows.items():
                (written / f"{name}.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), encoding="utf-8")
            commit(written, self.directory, manifest)
        self.kept.unlink(missing_ok=True)


def _fingerprint(model: str) -> str:
    """A hash of the weights in a model directory; of a hub id, which has none here, the id."""
    files = sorted(Path(model).glob("*.safetensors"))
    digest = xxhash.xxh3_128(b"" if files else model.encode())
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def is_held_out(prompt: Prompt, share: float, seed: int) -> bool:
    """Whether the pairs of a prompt are for validation: by its text, so that a question that occurs twice is on one side."""
    return xxhash.xxh3_64_intdigest("\0".join(_key(prompt.messages)).encode(), seed=seed) < share * 2**64


def summary(counts: Counts) -> Table:
    """What became of prompts and answers."""
    table = Table(show_header=False)
    for name in COUNTED:
        table.add_row(name, f"{counts[name]:,}")
    return table
