"""Models: build or load a causal language model or a scalar head on the same trunk, and what both say about tokens.

Stock Hugging Face architectures, so that vLLM and `AutoModelForCausalLM.from_pretrained` load an export as it is.

transformers is imported where a model is made, loaded or saved: drivers, which do none of it, are spared seconds and 100 MiB.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor, nn

from minigpt_ray.losses import align, token_values
from minigpt_ray.presets import PRESETS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
else:
    PreTrainedModel = PreTrainedTokenizerBase = Any

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAFE: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
"""A model that somebody gives you runs no code of its own: neither from a pickled file nor from a module beside its config."""


def build_causal(preset: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Random weights of a preset, float32, its vocabulary that of the tokenizer."""
    if preset not in PRESETS:
        raise ValueError(f"model.preset={preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import AutoConfig

    fields = PRESETS[preset].to_hf()
    config = AutoConfig.for_model(fields.pop("model_type"), **{
        **fields,
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    })  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def load_causal(path: str, dtype: str) -> PreTrainedModel:
    """A causal language model from a directory or hub id."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype], **SAFE)


def saved_weights(path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model directory, by the names under which they were saved, one after the other. Raises FileNotFoundError at once."""
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{path} holds no weights (*.safetensors) on this machine; every node has to see it")

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for file in files:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    yield name, opened.get_tensor(name)

    return tensors()


def load_scalar(path: str, dtype: str, seed: int | None) -> PreTrainedModel:
    """Trunk and scalar head. A checkpoint without such a head gets a fresh one.

    Drawn by `seed` from N(0, 1 / (hidden + 1)) (arXiv:2009.01325), or, without a seed, zero: a critic then begins by
    expecting nothing, where a random head would add noise of about 1 to every value.
    """
    from transformers import AutoModelForSequenceClassification, logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # from_pretrained would report the fresh head as a problem
    model, report = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=DTYPES[dtype], output_loading_info=True, **SAFE)
    logging.set_verbosity(before)
    missing = set(report["missing_keys"])
    if missing - {"score.weight"}:
        raise ValueError(f"{path} lacks weights of the trunk: {', '.join(sorted(missing)[:5])}; is it a model of another architecture?")
    if missing:
        head = torch.zeros_like(model.score.weight)
        if seed is not None:
            head.normal_(0, (model.config.hidden_size + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            model.score.weight.copy_(head)
    return model


def as_saved(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names, and in the pieces, that save_pretrained writes and other programs read.

    transformers keeps the experts of a layer in one tensor; each is written by itself.
    """
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in weights:
        yield from revert_weight_conversion(model, {name: tensor}).items()


class TokenLogprobs(nn.Module):
    """A causal language model that answers with logprobs and entropies of chosen tokens.

    Only the chosen positions pass through the output layer, so memory and compute of the vocabulary are paid for
    response tokens alone.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, token_ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"], temperature: float = 1.0, position_ids: Int[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """log p(token t | tokens < t) and the entropy of that distribution in nats, in column t where mask is True, else 0.

        Rows are padded on the right: causal attention alone keeps padding out, no attention mask is needed. Packed
        rows come with position_ids that restart with every example, which is what isolates examples in transformers.
        """
        assert not bool(mask[:, 0].any()), "column 0 has no tokens before it"
        hidden = align(self.model.base_model(input_ids=token_ids, position_ids=position_ids, use_cache=False).last_hidden_state)[:, :-1]
        logits = self.model.get_output_embeddings()(hidden[mask]).float() / temperature
        log_normaliser = logits.logsumexp(-1)
        chosen = logits.gather(-1, token_ids[mask].long()[:, None])[:, 0] - log_normaliser
        entropy = log_normaliser - (logits.softmax(-1) * logits).sum(-1)
        empty = torch.zeros(token_ids.shape, device=token_ids.device)
        return empty.masked_scatter(mask, chosen), empty.masked_scatter(mask, entropy)


class TokenValues(nn.Module):
    """A scalar head read at every token."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"] | None = None) -> Float[Tensor, "B T+1"]:
        """Column t is the estimate before token t: the head's output at token t - 1; column 0, before any token, is 0.

        Packed rows come with position_ids, as in TokenLogprobs; there, what follows an example is another's beginning.
        """
        hidden = self.model.base_model(input_ids=token_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        return token_values(cast(nn.Module, self.model.score)(hidden)[..., 0].float())


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, weights: dict[str, Tensor] | None = None) -> None:
    """A plain Hugging Face directory: safetensors, config, tokenizer with its chat template; `weights` where they are sharded."""
    from transformers import logging

    directory.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    model.save_pretrained(directory, state_dict=weights)
    tokenizer.save_pretrained(directory)
