"""What several jobs share: the base class, optimizer, engine, checkpoints, logging, sampling, prompts."""

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable, of just this name, that Ray sets for the command of `ray job submit`."""


class Config(BaseModel):
    """Frozen, unknown keys refused, the docstring below a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


class OptimizerConfig(Config):
    """AdamW and its schedule, both counted in optimizer steps."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Course of the learning rate after the warm-up; `wsd` stays at `lr`, then decays (arXiv:2405.18392)."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    decay_share: float = Field(default=0.2, gt=0, le=1)
    """wsd: share of all steps, at their end, over which the learning rate decays."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where cosine, linear and wsd end, as a share of `lr`."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, applied to matrices only."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm above which gradients are scaled down."""


class EngineConfig(Config):
    """How a DeepSpeed engine holds one model."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over the ranks: nothing, optimizer states, + gradients, + parameters (arXiv:1910.02054)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; with bfloat16 the optimizer keeps float32 master weights."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more compute."""
    micro_batch_tokens: PositiveInt = 8192
    """Most tokens, padding included, that one forward-backward holds."""
    offload_optimizer: bool = False
    """Keep optimizer states and master weights in host memory while nothing is learnt; with zero_stage=3 always, and the step is taken there (GPU only; needs zero_stage 1 to 3)."""

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> "EngineConfig":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer=true needs zero_stage 1, 2 or 3, but zero_stage=0; set zero_stage=1 or offload_optimizer=false")
        return self


def refuse_plain_bfloat16(section: str, engine: EngineConfig) -> None:
    """What DeepSpeed does for this pair scales gradients down before AdamW, whose steps come out too small."""
    if engine.dtype == "bfloat16" and engine.zero_stage == 0:
        raise ValueError(f"{section}dtype=bfloat16 needs zero_stage 1, 2 or 3, but {section}zero_stage=0; set it to 1, which costs nothing on one rank")


class CheckpointConfig(Config):
    """When a checkpoint is written and how many are kept."""

    every: PositiveInt = 50
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept; older ones are removed after a new one is complete."""
    resume: Literal["never", "auto"] = "never"
    """`auto` goes on from the newest complete checkpoint of this run and stage, or starts when there is none."""
    driver_restarts: NonNegativeInt = 3
    """How often, until a newer checkpoint is written, a driver that dies, by a signal or because Ray was lost below it, is started again with `resume: auto`; each death is said in a line and counted in `restarts/driver`."""


class LoggingConfig(Config):
    """Where metrics go. metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "minigpt-ray"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""
    prometheus: bool = False
    """Also export the newest metrics at Ray's Prometheus endpoint, as ray_minigpt_train_reward and so on; deploy/grafana.json is a dashboard of them."""
    timeline: bool = True
    """Write timeline.json, which https://ui.perfetto.dev opens: every role and phase of every step of PPO, about 10 KB a step."""
    every: PositiveInt = 1
    """Steps between console lines; metrics.jsonl gets every step."""
    samples_per_step: NonNegativeInt = 4
    """Rollouts written to samples.jsonl in every step."""
    batches: NonNegativeInt = 0
    """Newest steps of PPO whose batch, scores and experience are kept in batches/step-000001.safetensors, to check or to debug: about 50 bytes a token."""


class JobConfig(Config):
    """What every job has."""

    run: str = Field(default="debug", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its stages share the directory <output_dir>/<run>."""
    output_dir: Path = Path("outputs")
    """Where runs are kept. On a cluster: an absolute path that every node sees."""
    seed: NonNegativeInt = 0
    """Seed of everything random."""

    @field_validator("output_dir")
    @classmethod
    def _is_a_place_that_lasts(cls, path: Path) -> Path:
        if re.match(r"\w+:/", str(path)):
            raise ValueError(
                f"{path} is a URL, but a run is kept in a file system that every node sees; mount one, and set export_to to have the finished model there too"
            )
        if SUBMITTED in os.environ and not path.is_absolute():
            raise ValueError(
                f"{path} is relative, but a submitted job runs in a temporary copy of the working directory; use an absolute path that every node sees"
            )
        return path

    @property
    def run_dir(self) -> Path:
        return (self.output_dir / self.run).absolute()

    def stage_dir(self, stage: str) -> Path:
        return self.run_dir / stage


class TrainingConfig(JobConfig):
    """What every job has that makes a model."""

    export_to: str | None = Field(default=None, pattern=r"^\w+://[^\s?]+$")
    """URL below which the finished model is written as well, as <export_to>/<run>/<stage>: s3://bucket/models, gs://, abfs://, hdfs:// or file://. It is tried before the job starts; credentials are those of the driver's environment."""

    @field_validator("export_to")
    @classmethod
    def _holds_no_secret(cls, url: str | None) -> str | None:
        # A password before an @, or cut off by a "/" in it: then a colon that is not a port's is left.
        if re.match(r"\w+://([^/]*:[^/]*@|[^/]*:(?!\d{1,5}(/|$)))", url or ""):
            needed = "give them to the driver's environment, and the URL without them"
            raise ValueError(f"the URL holds credentials, which would be written into config.yaml and the logs; {needed}")
        return url


class SamplingConfig(Config):
    """How the generator draws tokens."""

    temperature: NonNegativeFloat = 1.0
    """Softmax temperature; 0 is greedy."""
    max_tokens: PositiveInt = 64
    """Longest response in tokens, the end token included; a longer one is cut and counted as truncated."""
    n: PositiveInt = 1
    """Samples per prompt; they form one group."""
    stop: tuple[str, ...] = ()
    """Strings that end a response besides the end token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus sampling; below 1 only for evaluation."""
    top_k: NonNegativeInt = 0
    """Keep the k most likely tokens, 0 keeps all; only for evaluation."""
    min_p: float = Field(default=0.0, ge=0, le=1)
    """Drop tokens below this share of the most likely one; only for evaluation."""


class PromptsConfig(Config):
    """Prompts for PPO and evaluation."""

    files: tuple[Path, ...] = ()
    """JSONL files of prompts; none: what prepare_data wrote in this run."""
    separator: str | None = None
    """For {"text"} rows: the prompt ends before the first occurrence of this string (some sets put the answer behind a newline)."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, chat template included."""
    too_long: Literal["drop", "truncate_left", "refuse"] = "drop"
    """What happens to longer prompts; dropped and truncated ones are counted."""
