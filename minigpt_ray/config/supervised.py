"""The stages that learn from given text."""

from pathlib import Path

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from minigpt_ray.config.base import CheckpointConfig, Config, EngineConfig, JobConfig, LoggingConfig, OptimizerConfig, refuse_plain_bfloat16


class ModelConfig(Config):
    """Where the weights come from."""

    init_from: str | None = None
    """A stage of this run (`sft`), a local directory or a hub id; none: random weights of `preset`."""
    preset: str = "nano"
    """Name in minigpt_ray/presets.py; used only without init_from."""
    tokenizer: str | None = None
    """Tokenizer directory or hub id for random weights; none: what prepare_data trained in this run."""


class SFTConfig(JobConfig):
    """python -m jobs.sft: supervised fine-tuning on Ray Train."""

    model: ModelConfig = ModelConfig()
    """The model to train."""
    files: tuple[Path, ...] = ()
    """JSONL files of demonstrations; none: what prepare_data wrote in this run."""
    separator: str | None = None
    """For {"text"} rows: the answer begins behind the first occurrence of this string, the prompt ends before it."""
    steps: PositiveInt = 1000
    """Optimizer steps."""
    batch_size: PositiveInt = 64
    """Packed windows per optimizer step, over all workers."""
    window: PositiveInt = 128
    """Tokens in a packed window; a longer example is refused."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=20)
    """Optimizer and schedule."""
    engine: EngineConfig = EngineConfig()
    """DeepSpeed engine."""
    num_workers: PositiveInt = 1
    """Ray Train workers."""
    cpus_per_worker: PositiveInt = 1
    """CPUs, and compute threads, of one worker."""
    gpus_per_worker: NonNegativeInt = 0
    """GPUs of one worker."""
    validation_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of the examples kept for the validation loss."""
    validation_every: PositiveInt = 100
    """Steps between validation losses."""
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig(every=20)
    """Metrics."""

    @model_validator(mode="after")
    def _batch_divides(self) -> "SFTConfig":
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size={self.batch_size} does not divide among num_workers={self.num_workers}; use a multiple")
        if self.engine.offload_optimizer and self.gpus_per_worker == 0:
            raise ValueError("engine.offload_optimizer=true needs a GPU, but gpus_per_worker=0; set it to false")
        refuse_plain_bfloat16("engine.", self.engine)
        return self
