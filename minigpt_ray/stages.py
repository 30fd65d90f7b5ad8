"""Supervised stages: which rows a stage learns from, and what it minimises on them.

A stage is a dataset and a loss. The loop (actors/supervised.py) knows neither; a new stage is a new entry of STAGES.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from minigpt_ray.data.packing import Windows
from minigpt_ray.data.rows import DataError, Row
from minigpt_ray.losses import language_model_loss
from minigpt_ray.tokenizer import Example, encode_conversation


@dataclass(frozen=True)
class Batch:
    """Packed windows as tensors."""

    token_ids: Int[Tensor, "B W"]
    loss_mask: Bool[Tensor, "B W"]
    position_ids: Int[Tensor, "B W"]
    """Restart at 0 with every example, which is what keeps packed examples apart."""

    @classmethod
    def of(cls, windows: Windows, device: torch.device) -> "Batch":
        return cls(*(torch.from_numpy(array).to(device) for array in (windows.token_ids, windows.loss_mask, windows.position_ids)))

    def split(self, rows: int) -> list["Batch"]:
        """Micro-batches of at most `rows` windows."""
        return [Batch(*parts) for parts in zip(self.token_ids.split(rows), self.loss_mask.split(rows), self.position_ids.split(rows), strict=True)]


Stats = dict[str, Float[Tensor, ""]]


@dataclass(frozen=True)
class Stage:
    """What distinguishes one supervised stage from another."""

    name: str
    """Its directory in the run, and what `init_from` calls it."""
    default_data: str
    """Where its rows are when the config names no files, below the run directory."""
    encode: Callable[[PreTrainedTokenizerBase, Row], Example]
    """The dataset: a row as token ids, and True where the loss counts."""
    loss: Callable[[nn.Module, Batch, int], tuple[Tensor, Stats]]
    """(model, micro-batch, loss tokens of the whole step) -> what is minimised, and statistics; both add up over micro-batches and ranks."""
    metrics: Callable[[Mapping[str, float]], dict[str, float]]
    """Statistics of a step, added up -> metrics, without their `train/` or `validation/`."""


def encode_demonstration(tokenizer: PreTrainedTokenizerBase, row: Row) -> Example:
    """A conversation that ends with the assistant; what the assistant says, its end token included, is learnt. Raises DataError."""
    if not row.is_demonstration:
        raise DataError(
            f'{row.place}: the row ends with the user, so there is no answer to learn; add one, or for {{"text"}} rows set separator to what stands before it'
        )
    try:
        return encode_conversation(tokenizer, row.messages)
    except ValueError as error:
        raise DataError(f"{row.place}: {error}") from error


def next_token_loss(model: nn.Module, batch: Batch, num_tokens: int) -> tuple[Float[Tensor, ""], Stats]:
    """Mean negative log-likelihood, in nats, of the learnt tokens; `model` is a TokenLogprobs."""
    logprobs, _ = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)
    loss = language_model_loss(logprobs, batch.loss_mask, num_tokens)
    return loss, {"loss": loss.detach()}


def with_perplexity(stats: Mapping[str, float]) -> dict[str, float]:
    """Perplexity is e to the mean loss, inf where that is no number any more."""
    return {**stats, "perplexity": math.exp(stats["loss"]) if stats["loss"] < 700 else math.inf}


STAGES = {
    "sft": Stage("sft", "prepare_data/demonstrations.jsonl", encode_demonstration, next_token_loss, with_perplexity),
}
