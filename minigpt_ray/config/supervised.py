"""The supervised stages: what all of them have, and what each has besides."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minigpt_ray.config.base import CheckpointConfig, Config, EngineConfig, LoggingConfig, OptimizerConfig, TrainingConfig, refuse_plain_bfloat16
from minigpt_ray.config.placement import RolePlacement


class ModelConfig(Config):
    """Where the weights come from."""

    init_from: str | None = None
    """A stage of this run (`sft`), a local directory or a hub id; none: random weights of `preset`."""
    preset: str = "nano"
    """Name in minigpt_ray/presets.py; used only without init_from."""
    tokenizer: str | None = None
    """Tokenizer directory or hub id for random weights; none: what prepare_data trained in this run."""


class SourceConfig(Config):
    """One source of a mix."""

    files: tuple[Path, ...] = ()
    """Files of the source; none: those rows of the stage's own files whose `source` is its name."""
    weight: NonNegativeFloat = 1.0
    """Share of the windows that are read, relative to the other sources."""
    final_weight: NonNegativeFloat | None = None
    """Weight at the end of the run, reached linearly over `anneal_share` of it; none: the weight stays."""


class SupervisedConfig(TrainingConfig):
    """What every supervised stage has; which of them it is, the class says."""

    stage: ClassVar[str]
    """Key of STAGES in minigpt_ray/stages.py."""
    default_data: ClassVar[str]
    """The file of its data when the configuration names none, in the directory of the job that `data_from` names."""

    model: ModelConfig = ModelConfig()
    """The model to train."""
    files: tuple[Path, ...] = ()
    """Data files; none: what prepare_data wrote in this run."""
    steps: PositiveInt = 1000
    """Optimizer steps, unless `epochs` or `tokens` says how long."""
    epochs: PositiveFloat | None = None
    """Passes over the training data, in place of `steps`."""
    tokens: PositiveInt | None = None
    """Tokens to read, padding not counted, in place of `steps`: as many steps as hold so many on average."""
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
    resources_per_worker: dict[str, PositiveFloat] = {}
    """Custom resources of one worker, as nodes were given them: `{learner: 1}`."""
    labels_per_worker: dict[str, str] = {}
    """Labels that a node must have to hold a worker, by Ray's selectors: `{role: learner}`."""
    wait_seconds: NonNegativeFloat = 5
    """How long the job waits for room, saying what is missing, before it is refused, which by default is within ten seconds of its start; where an autoscaler brings nodes, as long as these take."""
    hang_after_s: PositiveFloat = 3600
    """After so many seconds without a step, or without a batch of the reference's logprobs before the first one, the workers count as hung: their stacks are printed, and they are ended and replaced like workers that died. So long without a tokenised block while windows are made ends the job."""
    worker_restarts: NonNegativeInt = 2
    """How often workers are replaced when one of them dies, all together, from the newest checkpoint. After that a new driver begins from there, see `checkpoint.driver_restarts`."""
    validation_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of the examples kept for the validation loss."""
    validation_every: PositiveInt = 100
    """Steps between validation losses."""
    early_stopping: PositiveInt | None = None
    """End the run, with the model as it then is, once so many validation losses in a row are not below the lowest before; none: take all steps."""
    checkpoint: CheckpointConfig = CheckpointConfig(every=500)
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig(every=20)
    """Metrics."""

    @property
    def workers(self) -> RolePlacement:
        """Where the workers run, as other jobs say it of a role."""
        return RolePlacement(
            ranks=self.num_workers, cpus=self.cpus_per_worker, gpus=self.gpus_per_worker, resources=self.resources_per_worker, labels=self.labels_per_worker
        )

    @property
    def sources(self) -> Mapping[str, SourceConfig]:
        """What is read, by source; a stage that mixes nothing has one, without a name."""
        return {"": SourceConfig(files=self.files)}

    def shares(self, progress: float) -> list[float]:
        """How windows divide among the sources, adding up to 1, when a share `progress` of the run is done."""
        return [1.0]

    @property
    def data_from(self) -> str:
        """The job of this run whose data is read when `files` names none."""
        return "prepare_data"

    @property
    def reference_from(self) -> str | None:
        """Where the frozen model comes from whose logprobs the loss asks for, as in `init_from`; None: it asks for none."""
        return None

    @model_validator(mode="after")
    def _batch_divides(self) -> "SupervisedConfig":
        if self.batch_size % self.num_workers:
            raise ValueError(f"batch_size={self.batch_size} does not divide among num_workers={self.num_workers}; use a multiple")
        if self.engine.offload_optimizer and self.gpus_per_worker == 0:
            raise ValueError("engine.offload_optimizer=true needs a GPU, but gpus_per_worker=0; set it to false")
        if self.early_stopping is not None and self.validation_share == 0:
            raise ValueError(f"early_stopping={self.early_stopping} waits for a validation loss, but validation_share=0 keeps nothing for it; raise it")
        if self.epochs is not None and self.tokens is not None:
            raise ValueError(f"epochs={self.epochs:g} and tokens={self.tokens} both say how long the run is; set one of them to null")
        refuse_plain_bfloat16("engine.", self.engine)
        return self


# ------------------------------------------------------------------------------------------------------ documents


class DocumentsConfig(SupervisedConfig):
    """What the stages that learn from documents have."""

    default_data: ClassVar[str] = "documents.jsonl"
    files: tuple[Path, ...] = ()
    """JSON Lines files of {"text", "source"}, or plain text files (.txt, .md); none: what prepare_data wrote in this run."""
    window: PositiveInt = 512
    """Tokens in a packed window; a longer document goes on in another."""
    attend_across_documents: bool = False
    """Let tokens attend to the documents before theirs in the window, as if all were one text."""
    validation_share: float = Field(default=0.01, ge=0, lt=1)
    """Share of the data, in stretches of consecutive documents, kept for the validation loss."""


class PretrainConfig(DocumentsConfig):
    """python -m jobs.pretrain: a language model from documents, on Ray Train."""

    stage: ClassVar[str] = "pretrain"
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3, schedule="wsd", warmup_steps=100, weight_decay=0.1)
    """Optimizer and schedule."""


class MidtrainConfig(DocumentsConfig):
    """python -m jobs.midtrain: go on with documents of several sources, whose weights may change on the way, on Ray Train."""

    stage: ClassVar[str] = "midtrain"
    model: ModelConfig = ModelConfig(init_from="pretrain")
    """The model to train."""
    mix: dict[str, SourceConfig] = {}
    """Sources by name; none: all files are one source."""
    anneal_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the run, at its end, over which weights go to `final_weight`."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-4, schedule="linear", warmup_steps=20, weight_decay=0.1)
    """Optimizer and schedule."""

    @property
    def sources(self) -> Mapping[str, SourceConfig]:
        return self.mix or super().sources

    def shares(self, progress: float) -> list[float]:
        """Those of the weights, then from 1 - anneal_share on linearly to those of the final weights."""
        annealed = max(0.0, 1 - (1 - progress) / self.anneal_share)
        first, last = self._weights()
        return [(1 - annealed) * before / sum(first) + annealed * after / sum(last) for before, after in zip(first, last, strict=True)]

    def _weights(self) -> tuple[list[float], list[float]]:
        """Of every source, at the beginning and at the end."""
        sources = self.sources.values()
        return [s.weight for s in sources], [s.weight if s.final_weight is None else s.final_weight for s in sources]

    @model_validator(mode="after")
    def _something_is_read(self) -> "MidtrainConfig":
        for name, weights in zip(("weight", "final_weight"), self._weights(), strict=True):
            if not sum(weights):
                raise ValueError(f"mix: {name}=0 for every source, so there would be nothing to read; give one of {', '.join(self.mix)} more")
        return self


# ----------------------------------------------------------------------------------------- conversations and pairs


class ExamplesConfig(SupervisedConfig):
    """What the stages have whose examples are not split over windows."""

    too_long: Literal["refuse", "drop"] = "refuse"
    """An example longer than `window`: refuse to start, or leave it out; how many are left out is said."""


class SFTConfig(ExamplesConfig):
    """python -m jobs.sft: supervised fine-tuning on Ray Train."""

    stage: ClassVar[str] = "sft"
    default_data: ClassVar[str] = "demonstrations.jsonl"
    files: tuple[Path, ...] = ()
    """JSONL files of demonstrations; none: what prepare_data wrote in this run."""
    separator: str | None = None
    """For {"text"} rows: the answer begins behind the first occurrence of this string, the prompt ends before it."""


class PreferencesConfig(ExamplesConfig):
    """What the stages that learn from preference pairs have."""

    default_data: ClassVar[str] = "preferences.jsonl"
    model: ModelConfig = ModelConfig(init_from="sft")
    """The model to train."""
    files: tuple[Path, ...] = ()
    """JSON Lines files of {"prompt", "chosen", "rejected"}; none: what `pairs_from` wrote in this run."""
    pairs_from: Literal["prepare_data", "generate_preferences"] = "prepare_data"
    """The job of this run whose preferences.jsonl is read when `files` names none."""
    steps: PositiveInt = 500
    """Optimizer steps, unless `epochs` or `tokens` says how long."""
    batch_size: PositiveInt = 16
    """Packed windows per optimizer step, over all workers."""
    window: PositiveInt = 256
    """Tokens in a packed window; a pair has both its answers in one."""
    validation_share: float = Field(default=0.05, ge=0, lt=1)
    """Share of the prompts, with all their pairs, kept for validation."""

    @property
    def data_from(self) -> str:
        return self.pairs_from

    @model_validator(mode="after")
    def _begins_with_a_model(self) -> "PreferencesConfig":
        if self.model.init_from is None:
            raise ValueError("model.init_from=null, but there is nothing to learn from preferences without a model; set a stage, a directory or a hub id")
        return self


class DPOConfig(PreferencesConfig):
    """python -m jobs.dpo: direct preference optimisation, on Ray Train."""

    stage: ClassVar[str] = "dpo"
    loss: Literal["dpo", "ipo", "simpo"] = "dpo"
    """`dpo` (arXiv:2305.18290), `ipo` (arXiv:2310.12036), `simpo` (arXiv:2405.14734: no reference)."""
    beta: PositiveFloat = 0.1
    """Weight of what a logprob has gained on the reference (with simpo: of a mean logprob); 2 to 10 suits simpo."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round: conservative DPO; not with ipo."""
    nll_weight: NonNegativeFloat = 0.0
    """Weight of the negative log-likelihood of the chosen answer, a mean over its tokens (arXiv:2404.19733)."""
    gamma: NonNegativeFloat = 1.0
    """simpo: by how much the chosen answer's reward should be ahead."""
    reference: str = "policy"
    """`policy` (the model before training), a stage of this run, a local directory or a hub id; simpo has none."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-5, schedule="linear", warmup_steps=20)
    """Optimizer and schedule."""

    @property
    def reference_from(self) -> str | None:
        if self.loss == "simpo":
            return None
        return self.model.init_from if self.reference == "policy" else self.reference

    @model_validator(mode="after")
    def _smoothing_has_a_meaning(self) -> "DPOConfig":
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(f"loss=ipo is not made of labels that label_smoothing={self.label_smoothing:g} could smooth; set it to 0, or loss=dpo")
        return self


class RewardModelConfig(PreferencesConfig):
    """python -m jobs.reward_model: a Bradley-Terry reward model, on Ray Train."""

    stage: ClassVar[str] = "reward_model"
    use_margin: bool = True
    """Ask the chosen answer to be ahead by the pair's `margin`, where it has one (arXiv:2307.09288)."""
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, schedule="linear", warmup_steps=20)
    """Optimizer and schedule."""
