"""Supervised stages: what a stage reads, and what it minimises on that.

A stage is a dataset and a loss. The loop (actors/supervised_rank.py) knows neither; a new stage is a new entry of STAGES and a
class of its configuration.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minigpt_ray.config import DocumentsConfig, DPOConfig, ExamplesConfig, RewardModelConfig, SFTConfig, SupervisedConfig
from minigpt_ray.data import documents
from minigpt_ray.data.documents import Stretch
from minigpt_ray.data.packing import Group, Windows, split
from minigpt_ray.data.pairs import Pair, read_pairs
from minigpt_ray.data.rows import DataError, Row, read_rows
from minigpt_ray.losses import PREFERENCE_LOSSES, PairLogprobs, language_model_loss, log_odds_loss
from minigpt_ray.tokenizer import Example, Messages, PreTrainedTokenizerBase, encode_conversation, encode_document, encode_prompt

REFERENCE = "reference_logprobs"
"""Logprobs of the loss's tokens under the frozen model of `config.reference_from`, among the numbers of a batch; none with simpo."""


@dataclass(frozen=True)
class Batch:
    """Packed windows as tensors."""

    token_ids: Int[Tensor, "B W"]
    loss_mask: Bool[Tensor, "B W"]
    position_ids: Int[Tensor, "B W"]
    """Restart at 0 with every segment, which is what keeps packed segments apart."""
    numbers: Mapping[str, Float[Tensor, "B W"]] = field(default_factory=dict)
    """What else the loss asks for, beside the tokens."""

    @classmethod
    def of(cls, windows: Windows, device: torch.device) -> "Batch":
        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        numbers = {name: tensor(array) for name, array in windows.numbers.items()}
        return cls(tensor(windows.token_ids), tensor(windows.loss_mask), tensor(windows.position_ids), numbers)

    def split(self, rows: int) -> list["Batch"]:
        """Micro-batches of at most `rows` windows."""
        parts = zip(self.token_ids.split(rows), self.loss_mask.split(rows), self.position_ids.split(rows), strict=True)
        numbers = {name: tensor.split(rows) for name, tensor in self.numbers.items()}
        return [Batch(*part, {name: tensors[i] for name, tensors in numbers.items()}) for i, part in enumerate(parts)]


class Item(Protocol):
    """Something that is tokenised by itself."""

    @property
    def place(self) -> str:
        """Where it stands, for messages."""


Stats = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Stage:
    """What distinguishes one supervised stage from another; `config` is its own class of configuration."""

    name: str
    """Its directory in the run, and what `init_from` calls it."""
    read: Callable[[Sequence[Path], str | None, Any], Sequence[Item]]
    """(files, the one source that is wanted or None, config) -> what is tokenised, in the driver. Raises DataError."""
    encode: Callable[[PreTrainedTokenizerBase, Any, Any], list[Group]]
    """(tokenizer, item, config) -> token ids, and True where the loss counts; in parallel. Raises DataError."""
    loss: Callable[[nn.Module, Batch, int, Any], tuple[Tensor, Stats]]
    """(model, micro-batch, count of the whole step, config) -> what is minimised, and statistics; both add up over micro-batches and ranks."""
    metrics: Callable[[Mapping[str, float]], dict[str, float]]
    """Statistics of a step, added up -> metrics, without their `train/` or `validation/`."""
    mean_over: Literal["num_loss_tokens", "num_examples"] = "num_loss_tokens"
    """What `count` counts: learnt tokens, or pairs."""
    head: Literal["language", "scalar"] = "language"
    """`model` is a TokenLogprobs or a TokenValues."""
    segments: int = 1
    """Segments of an example: 2 where it is a pair of answers."""
    block_items: int = 4096
    """Items that are packed together. A constant, so that windows do not depend on the cluster that makes them."""
    settings: tuple[str, ...] = ()
    """Fields of the config that the windows depend on, besides those that every stage has."""
    belongs_to: Callable[[Any], Any] | None = None
    """Items with the same value are kept for validation together; None: each by itself."""
    baseline: Callable[[Windows, Windows], dict[str, float]] | None = None
    """(training windows, validation windows) -> what there is to be better than, to stand beside the validation's metrics."""


# ------------------------------------------------------------------------------------------------------ documents


def read_stretches(files: Sequence[Path], source: str | None, config: DocumentsConfig) -> list[Stretch]:
    """Stretches of files, whose documents are read where they are tokenised."""
    return documents.cut(files, source)


def encode_documents(tokenizer: PreTrainedTokenizerBase, stretch: Stretch, config: DocumentsConfig) -> list[Group]:
    """Every token of every document is learnt, but the first, and those that end documents too; long documents go on in other windows."""
    found = [(encode_document(tokenizer, document.text), document.source) for document in documents.read(stretch)]
    if config.attend_across_documents and found:
        examples, sources = zip(*found, strict=True)
        found = [(Example(*(np.concatenate(parts) for parts in zip(*examples, strict=True))), sources[0] if len(set(sources)) == 1 else "")]
    return [Group((piece,), source=source) for example, source in found for piece in split(example, config.window)]


def unigrams(train: Windows, validation: Windows) -> dict[str, float]:
    """Perplexity of the validation's learnt tokens to one who knows how frequent each token is in training, and nothing of what stands before it.

    Every token counts once more than it occurs, so that none is impossible.
    """
    size = 1 + max(int(train.token_ids.max()), int(validation.token_ids.max()))
    seen, asked = (np.bincount(windows.token_ids[windows.loss_mask], minlength=size) for windows in (train, validation))
    logprobs = np.log((seen + 1) / (seen + 1).sum())
    return {"unigram_perplexity": float(np.exp(-(asked @ logprobs) / max(1, asked.sum())))}


# --------------------------------------------------------------------------------------------------- conversations


def read_demonstrations(files: Sequence[Path], source: str | None, config: SFTConfig) -> list[Row]:
    return [row for row in read_rows(files, config.separator) if source in (None, row.source)]


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """A conversation that ends with the assistant; what the assistant says, its end token included, is learnt. Raises DataError."""
    if not row.is_demonstration:
        raise DataError(
            f'{row.place}: the row ends with the user, so there is no answer to learn; add one, or for {{"text"}} rows set separator to what stands before it'
        )
    return _encode(tokenizer, row.messages, row.place)


def _encode(tokenizer: PreTrainedTokenizerBase, messages: Messages, place: str) -> Example:
    try:
        return encode_conversation(tokenizer, messages)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from error


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row, config: SFTConfig) -> list[Group]:
    return fitting(Group((encode_demonstration(tokenizer, row),), source=row.source), row.place, config)


def fitting(group: Group, place: str, config: ExamplesConfig) -> list[Group]:
    """The group; of one that is longer than a window nothing, or a DataError, as the configuration says."""
    if len(group) <= config.window:
        return [group]
    if config.too_long == "drop":
        return []
    raise DataError(f"{place}: {len(group)} tokens with the chat template, but window={config.window}; raise window, set too_long=drop or remove the row")


def next_token_loss(model: nn.Module, batch: Batch, num_tokens: int, config: SupervisedConfig) -> tuple[Float[Tensor, ""], Stats]:
    """Mean negative log-likelihood, in nats, of the learnt tokens; `model` is a TokenLogprobs."""
    logprobs, _ = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)
    loss = language_model_loss(logprobs, batch.loss_mask, num_tokens)
    return loss, {"loss": loss.detach()}


def with_perplexity(stats: Mapping[str, float]) -> dict[str, float]:
    """Perplexity is e to the mean loss, inf where that is no number any more."""
    return {**stats, "perplexity": math.exp(stats["loss"]) if stats["loss"] < 700 else math.inf}


# ----------------------------------------------------------------------------------------------------- preferences


def read_preferences(files: Sequence[Path], source: str | None, config: SupervisedConfig) -> list[Pair]:
    return [pair for pair in read_pairs(files) if source in (None, pair.source)]


def prompt_of(pair: Pair) -> str:
    return json.dumps(pair.prompt)


def encode_pair(tokenizer: PreTrainedTokenizerBase, pair: Pair, config: ExamplesConfig) -> list[Group]:
    """Both answers, each behind the prompt; what the assistant says in an answer counts, in the prompt it does not."""
    begin = len(encode_prompt(tokenizer, pair.prompt))

    def answer(turns: Messages) -> Example:
        token_ids, learnt = _encode(tokenizer, (*pair.prompt, *turns), pair.place)
        return Example(token_ids, learnt & (np.arange(len(token_ids)) >= begin))

    return fitting(Group((answer(pair.chosen), answer(pair.rejected)), source=pair.source), pair.place, config)


def encode_ranked(tokenizer: PreTrainedTokenizerBase, pair: Pair, config: RewardModelConfig) -> list[Group]:
    """As encode_pair, but the last token of each answer alone counts: the reward is read there."""

    def ends(group: Group) -> tuple[Example, ...]:
        return tuple(Example(ids, np.arange(len(ids)) == len(ids) - 1) for ids, _ in group.segments)

    return [replace(group, segments=ends(group), numbers={"margin": pair.margin}) for group in encode_pair(tokenizer, pair, config)]


def of_answers(batch: Batch, values: Float[Tensor, "B W"]) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Sums of `values` over the chosen and over the rejected answers of a batch's pairs, prompts included.

    A window holds pairs, chosen before rejected, and then perhaps padding, where no token counts.
    """
    segment = (batch.position_ids == 0).cumsum(1) - 1
    size = batch.position_ids.shape[1]

    def sums(x: Float[Tensor, "B W"]) -> Float[Tensor, "B W 2"]:
        return x.new_zeros(len(x), 2 * size).scatter_add(1, segment, x).view(len(x), size, 2)

    real = sums(batch.loss_mask.float())[..., 1] > 0
    chosen, rejected = sums(values)[real].unbind(1)
    return chosen, rejected


def logprobs_of_pairs(batch: Batch, logprobs: Float[Tensor, "B W"]) -> PairLogprobs:
    return PairLogprobs(*of_answers(batch, torch.where(batch.loss_mask, logprobs, 0)), *of_answers(batch, batch.loss_mask.float()))


def preference_loss(model: nn.Module, batch: Batch, num_pairs: int, config: DPOConfig) -> tuple[Float[Tensor, ""], Stats]:
    """Mean over pairs of the chosen loss, and nll_weight times the mean negative log-likelihood of a token of the chosen answer."""
    logprobs, _ = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)
    policy = logprobs_of_pairs(batch, logprobs)
    reference = logprobs_of_pairs(batch, batch.numbers.get(REFERENCE, torch.zeros_like(logprobs)))
    losses, chosen, rejected = PREFERENCE_LOSSES[config.loss](policy, reference, config)
    nll = -policy.means.chosen
    stats = compared(chosen, rejected) | {"chosen_logprob": policy.chosen, "rejected_logprob": policy.rejected, "chosen_nll": nll}
    return _mean_over_pairs(losses + config.nll_weight * nll, stats, num_pairs)


def ranking_loss(model: nn.Module, batch: Batch, num_pairs: int, config: RewardModelConfig) -> tuple[Float[Tensor, ""], Stats]:
    """Bradley-Terry: mean over pairs of -log sigmoid(reward of the chosen answer - reward of the rejected - margin)."""
    values = model(batch.token_ids, position_ids=batch.position_ids)[:, 1:]
    chosen, rejected = of_answers(batch, torch.where(batch.loss_mask, values, 0))
    margin, _ = of_answers(batch, batch.numbers["margin"])
    rewards = {"reward_mean": (chosen + rejected) / 2, "reward_square": (chosen.square() + rejected.square()) / 2}
    return _mean_over_pairs(log_odds_loss(chosen - rejected - margin * config.use_margin), compared(chosen, rejected) | rewards, num_pairs)


def compared(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> dict[str, Float[Tensor, "P"]]:
    return {"chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected, "accuracy": (chosen > rejected).float()}


def _mean_over_pairs(losses: Float[Tensor, "P"], stats: dict[str, Float[Tensor, "P"]], num_pairs: int) -> tuple[Float[Tensor, ""], Stats]:
    loss = losses.sum() / num_pairs
    return loss, {"loss": loss.detach()} | {name: values.detach().sum() / num_pairs for name, values in stats.items()}


def as_they_are(stats: Mapping[str, float]) -> dict[str, float]:
    return dict(stats)


def with_spread(stats: Mapping[str, float]) -> dict[str, float]:
    """Mean and standard deviation of the rewards of all answers, chosen and rejected."""
    variance = stats["reward_square"] - stats["reward_mean"] ** 2
    return {name: value for name, value in stats.items() if name != "reward_square"} | {"reward_std": math.sqrt(max(0.0, variance))}


# ---------------------------------------------------------------------------------------------------------- stages

OF_DOCUMENTS: dict[str, Any] = {"block_items": 4, "settings": ("attend_across_documents",), "baseline": unigrams}
OF_PAIRS: dict[str, Any] = {"mean_over": "num_examples", "segments": 2, "settings": ("too_long",), "belongs_to": prompt_of}

STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", read_stretches, encode_documents, next_token_loss, with_perplexity, **OF_DOCUMENTS),
        Stage("midtrain", read_stretches, encode_documents, next_token_loss, with_perplexity, **OF_DOCUMENTS),
        Stage("sft", read_demonstrations, encode_row, next_token_loss, with_perplexity, settings=("separator", "too_long")),
        Stage("dpo", read_preferences, encode_pair, preference_loss, as_they_are, **OF_PAIRS),
        Stage("reward_model", read_preferences, encode_ranked, ranking_loss, with_spread, head="scalar", **OF_PAIRS),
    )
}
"""The stages that learn from given text, in the order of a model's life."""
