"""The roles of PPO, each as a program of its own: learners, reference, generator, the way of the weights."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minigpt_ray.config.base import Config, EngineConfig, OptimizerConfig


class LearnerConfig(EngineConfig):
    """A model that learns: its engine, its weights, its optimizer."""

    init_from: str
    """A stage of this run, a local directory or a hub id."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""

    @model_validator(mode="before")
    @classmethod
    def _whole_weights(cls, fields: Any) -> Any:
        adapter = next((name for name in fields if "lora" in name.lower()), None) if isinstance(fields, dict) else None
        if adapter is not None:
            raise ValueError(
                f"there is no LoRA, since weights are trained and published whole; remove {adapter}, or save memory with zero_stage=3 and activation_checkpointing=true"
            )
        return fields


class PolicyConfig(LearnerConfig):
    """The model that PPO improves."""

    init_from: str = "sft"
    """A stage of this run, a local directory or a hub id."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-6)
    """Optimizer and schedule."""


class CriticConfig(LearnerConfig):
    """The value model: the trunk of `init_from` with a scalar head."""

    init_from: str = "policy"
    """`policy` (its trunk, a fresh head), a stage of this run, a local directory or a hub id (a reward model keeps its head)."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5)
    """Optimizer and schedule."""


class ReferenceConfig(Config):
    """The frozen model that the KL is measured to."""

    init_from: str = "policy"
    """`policy` (its weights at the start), a stage of this run, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, that one forward holds."""


class GeneratorConfig(Config):
    """The rollout generator."""

    backend: Literal["vllm", "transformers"] = "vllm"
    """Engine; `transformers` is for unit tests and platforms without vLLM."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    kv_cache_mib: PositiveInt = 256
    """KV cache of one worker on CPU, in MiB."""
    gpu_memory_utilization: float = Field(default=0.85, gt=0, le=1)
    """Share of a GPU's memory that one worker may take."""
    max_num_seqs: PositiveInt = 256
    """Sequences that one worker decodes at a time."""
    enforce_eager: bool = True
    """Skip compilation and CUDA graphs: starts in seconds; set false for long runs on GPUs."""
    sleep_between_phases: bool = False
    """vLLM sleep mode after every generation, for a GPU that is shared; the weights are loaded again afterwards (GPU only)."""
    restart_limit: NonNegativeInt = 3
    """How often, between two checkpoints, dead workers are replaced, those that die with one node once together, those that die of a prompt not at all; after that the run goes on with the others, and stops when the last one dies and none is on its way."""
    fatal_prompt_limit: NonNegativeInt = 3
    """How many prompts of which workers die, again and again, are given up between two checkpoints; one more ends the run."""


MEETING_SECONDS = 300.0
"""How long the ends of a broadcast of weights wait for each other."""


class WeightsConfig(Config):
    """Publication of the policy's weights to the generator."""

    transport: Literal["object_store", "nccl", "cuda_ipc"] = "object_store"
    """How the bytes travel: `object_store` anywhere, `nccl` between whole GPUs, `cuda_ipc` on a GPU that policy and generator share."""
    bucket_mib: PositiveInt = 256
    """Tensors are packed into buckets of this size."""
    probe_tolerance: PositiveFloat = 1e-3
    """Largest difference, in nats, between the generator's and the policy's logprobs of the probe; about 0.2 suits bfloat16."""
