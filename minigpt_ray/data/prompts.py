"""Prompts: read, encoded and length-checked once, then drawn in a shuffled order that resumes from one number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from minigpt_ray.config import PromptsConfig
from minigpt_ray.data.rows import DataError, Message, Row, read_rows
from minigpt_ray.rl.rollout import Prompt
from minigpt_ray.tokenizer import PreTrainedTokenizerBase, encode_prompt


@dataclass(frozen=True)
class PromptSet:
    """Encoded prompts in file order, `serial` counting from 0, and what the length limit did to the rest."""

    prompts: tuple[Prompt, ...]
    dropped: int
    truncated: int

    def __len__(self) -> int:
        return len(self.prompts)


def load_prompts(config: PromptsConfig, default_file: Path, tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of `config.files`, or of `default_file` when it names none. Raises DataError, as the two that it is made of."""
    return encode_prompts(config, read_prompts(config, default_file), tokenizer)


def read_prompts(config: PromptsConfig, default_file: Path) -> list[Row]:
    """What `load_prompts` encodes. Needs no tokenizer, so that a malformed file is refused before one is loaded. Raises DataError."""
    if not config.files and not default_file.is_file():
        raise DataError(f"{default_file}: no such file, and no other was given; run python -m jobs.prepare_data first or set data.files")
    return list(read_rows(config.files or (default_file,), config.separator))


def encode_prompts(config: PromptsConfig, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """Demonstrations give their prompt. Raises DataError for a prompt that is too long when `too_long` is `refuse`, and when none is left."""
    prompts: list[Prompt] = []
    dropped = truncated = 0
    for row in rows:
        messages, token_ids = row.prompt, _encode(tokenizer, row.prompt, row.place)
        if len(token_ids) > config.max_prompt_tokens:
            if config.too_long == "refuse":
                raise DataError(
                    f"{row.place}: the prompt has {len(token_ids)} tokens, but max_prompt_tokens={config.max_prompt_tokens}; raise it, "
                    "remove the row, or set too_long to drop or truncate_left"
                )
            if config.too_long == "drop":
                dropped += 1
                continue
            messages, token_ids = _cut_left(tokenizer, row, config.max_prompt_tokens)
            truncated += 1
        prompts.append(Prompt(len(prompts), messages, token_ids, row.source, row.answer))
    if not prompts:
        raise DataError(
            f"{rows[0].place} and on: all {dropped} prompts are longer than max_prompt_tokens={config.max_prompt_tokens}; raise it or set too_long=truncate_left"
        )
    return PromptSet(tuple(prompts), dropped, truncated)


def longest(prompts: Iterable[Prompt]) -> int:
    """Tokens of the longest prompt."""
    return max(len(prompt.token_ids) for prompt in prompts)


def _encode(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], place: str) -> np.ndarray:
    try:
        return encode_prompt(tokenizer, messages)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


def _cut_left(tokenizer: PreTrainedTokenizerBase, row: Row, limit: int) -> tuple[tuple[Message, ...], np.ndarray]:
    """Drop characters from the left of the user's last message until the prompt fits: the template stays whole."""
    last = row.prompt[-1]

    def cut(characters: int) -> tuple[tuple[Message, ...], np.ndarray]:
        messages = (*row.prompt[:-1], {**last, "content": last["content"][characters:]})
        return messages, _encode(tokenizer, messages, row.place)

    too_few, enough = 0, len(last["content"]) - 1
    fitting = cut(enough)
    if len(fitting[1]) > limit:
        raise DataError(
            f"{row.place}: the template and the messages before the last take {len(fitting[1]) - 1} tokens, but max_prompt_tokens={limit}; raise it or set too_long=drop"
        )
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        candidate = cut(middle)
        if len(candidate[1]) <= limit:
            enough, fitting = middle, candidate
        else:
            too_few = middle
    return fitting


class PromptStream:
    """Prompts without end: every epoch in a new order, which depends on nothing but (seed, epoch).

    Its whole state is `drawn`, so PromptStream(prompts, seed, start=stream.drawn) goes on where the stream stands.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, start: int = 0):
        assert prompts and start >= 0
        self._prompts = prompts
        self._seed = seed
        self._drawn = start
        self._order = _order(len(prompts), seed, start // len(prompts))

    @property
    def drawn(self) -> int:
        """Prompts drawn since the run began: the cursor."""
        return self._drawn

    @property
    def epoch(self) -> int:
        """Passes over the prompts that have been begun, from 1."""
        return max(self._drawn - 1, 0) // len(self._prompts) + 1

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts, across the end of an epoch if need be; `serial` is the number of the draw, from 0."""
        return [self._draw() for _ in range(n)]

    def _draw(self) -> Prompt:
        epoch, position = divmod(self._drawn, len(self._prompts))
        if position == 0:
            self._order = _order(len(self._prompts), self._seed, epoch)
        prompt = replace(self._prompts[self._order[position]], serial=self._drawn)
        self._drawn += 1
        return prompt


def _order(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)
