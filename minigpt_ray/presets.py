"""Model presets: a name for the shape of a stock Hugging Face architecture.

A preset says everything about a model but its vocabulary, which comes from the tokenizer. Sizes and FLOPs are computed
from the shape alone, so that the cluster pre-flight needs no weights: this module imports neither torch nor transformers.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """What distinguishes the supported decoders: all have RMSNorm, rotary positions, SwiGLU and grouped-query attention."""

    model_type: str
    query_key_norm: bool
    """RMSNorm on each query and key head."""
    query_key_value_bias: bool
    experts: bool = False
    """The feed-forward part of every layer is a mixture of experts."""


ARCHITECTURES = {
    "Qwen3ForCausalLM": Architecture("qwen3", query_key_norm=True, query_key_value_bias=False),
    "Qwen3MoeForCausalLM": Architecture("qwen3_moe", query_key_norm=True, query_key_value_bias=False, experts=True),
    "Qwen2ForCausalLM": Architecture("qwen2", query_key_norm=False, query_key_value_bias=True),
    "LlamaForCausalLM": Architecture("llama", query_key_norm=False, query_key_value_bias=False),
    "MistralForCausalLM": Architecture("mistral", query_key_norm=False, query_key_value_bias=False),
}


@dataclass(frozen=True)
class ModelShape:
    """The shape of a decoder; names as in the literature, `to_hf` gives Hugging Face's."""

    architecture: str
    """Key of ARCHITECTURES."""
    hidden_size: int
    intermediate_size: int
    """Width of the feed-forward part, or of each of its experts."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """vLLM on CPU knows 32, 64, 96 and 128, but neither 16 nor 48."""
    max_positions: int
    tie_embeddings: bool = True
    """The output head is the input embedding."""
    rope_theta: float = 10000.0
    vocab_size: int | None = None
    """Rows of the embedding; None in a preset, which leaves it to the tokenizer."""
    num_experts: int = 1
    """Feed-forward networks of a layer; more than 1 only in an architecture of experts."""
    experts_per_token: int = 1
    """How many of them a token passes."""

    @classmethod
    def from_config_json(cls, path: Path) -> "ModelShape":
        """Shape of the checkpoint whose config.json this is; causal language models and scalar-head models alike."""
        config = json.loads(path.read_text())
        known = {architecture.model_type: name for name, architecture in ARCHITECTURES.items()}
        if config["model_type"] not in known:
            raise ValueError(f"{path}: model_type={config['model_type']!r} is not supported; use one of {', '.join(sorted(known))}")
        for field in ("attention_bias", "mlp_bias"):
            if config.get(field, False):
                raise ValueError(f"{path}: {field}=true is not supported; use a checkpoint without it")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ValueError(f"{path}: some layers have experts and others none, which is not supported; use a checkpoint with experts in every layer")
        architecture = known[config["model_type"]]
        experts = (
            {
                "intermediate_size": config["moe_intermediate_size"],
                "num_experts": config["num_local_experts"] if "num_local_experts" in config else config["num_experts"],  # transformers 5, and before
                "experts_per_token": config["num_experts_per_tok"],
            }
            if ARCHITECTURES[architecture].experts
            else {"intermediate_size": config["intermediate_size"]}
        )
        heads = config["num_attention_heads"]
        # Files written by transformers 5 keep rope_theta inside rope_parameters, older ones beside the other fields.
        rope = config.get("rope_parameters") or config
        return cls(
            architecture=architecture,
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            max_positions=config["max_position_embeddings"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            rope_theta=rope.get("rope_theta", 10000.0),
            vocab_size=config["vocab_size"],
            **experts,
        )

    def to_hf(self) -> dict[str, Any]:
        """Fields of config.json; vocab_size only where the shape has one."""
        fields = {
            "architectures": [self.architecture],
            "model_type": ARCHITECTURES[self.architecture].model_type,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": self.tie_embeddings,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }
        if ARCHITECTURES[self.architecture].experts:
            fields |= {
                "moe_intermediate_size": self.intermediate_size,
                "num_experts": self.num_experts,
                "num_experts_per_tok": self.experts_per_token,
                "norm_topk_prob": True,
            }
        return fields if self.vocab_size is None else {**fields, "vocab_size": self.vocab_size}

    @property
    def matrix_parameters(self) -> int:
        """Entries of the matrices that a token passes, of the experts only those that it is sent to: 2 FLOPs each. Embedding and output head are not among them."""
        return self._matrix_parameters(self.experts_per_token)

    def _matrix_parameters(self, experts: int) -> int:
        attention = self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        router = self.hidden_size * self.num_experts * ARCHITECTURES[self.architecture].experts
        return self.num_layers * (attention + router + experts * 3 * self.hidden_size * self.intermediate_size)

    def num_trunk_parameters(self, vocab_size: int | None = None) -> int:
        """Parameters without the output head; a critic or reward model has hidden_size more."""
        architecture = ARCHITECTURES[self.architecture]
        norms = 2 * self.hidden_size + 2 * self.head_dim * architecture.query_key_norm
        biases = self.head_dim * (self.num_heads + 2 * self.num_kv_heads) * architecture.query_key_value_bias
        matrices = self._matrix_parameters(self.num_experts)
        return self._vocab_size(vocab_size) * self.hidden_size + matrices + self.num_layers * (norms + biases) + self.hidden_size

    def num_parameters(self, vocab_size: int | None = None) -> int:
        """Parameters of the causal language model, a tied embedding counted once; vocab_size: the shape's own unless given."""
        head = 0 if self.tie_embeddings else self._vocab_size(vocab_size) * self.hidden_size
        return self.num_trunk_parameters(vocab_size) + head

    def _vocab_size(self, given: int | None) -> int:
        size = self.vocab_size if given is None else given
        if size is None:
            raise ValueError(f"this {self.architecture} shape has no vocab_size; pass the tokenizer's")
        return size


QWEN3, QWEN3_MOE, LLAMA = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "LlamaForCausalLM"

# Sizes in names are with 320 tokens up to 3m and with 6,400 above.
PRESETS = {
    "nano": ModelShape(QWEN3, 64, 128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=512),
    "qwen3-0.4m": ModelShape(QWEN3, 128, 320, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, max_positions=512),
    "qwen3-1m": ModelShape(QWEN3, 192, 512, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=32, max_positions=512),
    "qwen3-2m": ModelShape(QWEN3, 192, 576, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, max_positions=1024),
    "qwen3-3m": ModelShape(QWEN3, 256, 768, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=64, max_positions=1024),
    "qwen3-26m": ModelShape(QWEN3, 512, 1408, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64, max_positions=4096),
    "qwen3-104m": ModelShape(QWEN3, 768, 2048, num_layers=16, num_heads=8, num_kv_heads=2, head_dim=96, max_positions=4096),
    "qwen3-0.5b": ModelShape(QWEN3, 1024, 3072, num_layers=32, num_heads=16, num_kv_heads=8, head_dim=128, max_positions=8192),
    "qwen3-moe-nano": ModelShape(
        QWEN3_MOE, 64, 64, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=512, num_experts=4, experts_per_token=2
    ),
    "llama-nano": ModelShape(LLAMA, 64, 128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=512),
    "llama-2m": ModelShape(LLAMA, 192, 576, num_layers=4, num_heads=6, num_kv_heads=2, head_dim=32, max_positions=1024),
    "llama-26m": ModelShape(LLAMA, 512, 1408, num_layers=8, num_heads=8, num_kv_heads=2, head_dim=64, max_positions=4096),
}
