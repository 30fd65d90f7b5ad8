"""Configuration: one frozen pydantic tree per job, from YAML files and dotted overrides.

    python -m jobs.ppo configs/ppo.yaml configs/mine.yaml policy.optimizer.lr=1e-6

Files are merged left to right, overrides come last. A default stands on its field and nowhere else. This module
imports neither torch nor ray, so that a mistake in a config is refused in well under a second.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator


class Config(BaseModel):
    """Frozen, unknown keys refused, the docstring below a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


# ---------------------------------------------------------------------------------------------- shared sections


class OptimizerConfig(Config):
    """AdamW and its schedule, both counted in optimizer steps."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Course of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where cosine and linear end, as a share of `lr`."""
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


class LoggingConfig(Config):
    """Where metrics go. metrics.jsonl is always written."""

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    """Weights & Biases mode."""
    wandb_project: str = "minigpt-ray"
    """Weights & Biases project."""
    tensorboard: bool = False
    """Also write TensorBoard event files (needs the package tensorboard)."""
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

    @property
    def run_dir(self) -> Path:
        return (self.output_dir / self.run).absolute()

    def stage_dir(self, stage: str) -> Path:
        return self.run_dir / stage


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


# ------------------------------------------------------------------------------------------------ prepare_data


class TaskConfig(Config):
    """One reasoning-gym task of the mix."""

    weight: PositiveFloat = 1.0
    """Share of the mix, relative to the other tasks."""
    options: dict[str, int | float | str | bool | list[int] | list[str]] = {}
    """Arguments of the task's own configuration class."""


class TokenizerConfig(Config):
    """Byte-level BPE trained on the prepared text."""

    vocab_size: int = Field(default=320, ge=260)
    """Tokens before `phrases`, the 256 bytes and the 4 special tokens included; 260 merges nothing, which suits character tasks."""
    phrases: tuple[str, ...] = ()
    """Strings that are one token each, wherever they stand: instructions that every prompt repeats, for example."""


class PrepareConfig(JobConfig):
    """python -m jobs.prepare_data: prompts, demonstrations and a held-out set from reasoning-gym, and a tokenizer."""

    tasks: dict[str, TaskConfig] = {"chain_sum": TaskConfig(), "spell_backward": TaskConfig()}
    """reasoning-gym tasks by name."""
    demonstrations: PositiveInt = 3000
    """Prompts with their answer, for SFT."""
    prompts: PositiveInt = 20000
    """Prompts for PPO; the answer serves the verifier only."""
    held_out: PositiveInt = 500
    """Prompts for evaluation, in neither of the other sets."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    """The tokenizer to train."""


# --------------------------------------------------------------------------------------------------- SFT


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


# --------------------------------------------------------------------------------------------------- PPO


class AlgorithmConfig(Config):
    """What PPO computes from a batch of rollouts."""

    estimator: Literal["gae"] = "gae"
    """Advantage estimator (gae: arXiv:1506.02438)."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE: 1 is return minus value, 0 the one-step TD error."""
    truncated: Literal["score", "bootstrap"] = "score"
    """What a response cut at sampling.max_tokens is worth: its score, as the limit is part of the task, or, in place of the score, the critic's estimate after its last token. Never both: a response that never ends would then earn twice."""
    clip: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip, 1 + clip] (arXiv:1707.06347)."""
    value_clip: PositiveFloat | None = 0.2
    """Values move at most this far from the old ones before the loss goes flat; none: no clip."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""
    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL penalty to the reference in the token rewards."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over all response tokens of the step."""
    ppo_epochs: PositiveInt = 1
    """Passes over the step's rollouts."""
    mini_batch_size: PositiveInt = 64
    """Rollouts per optimizer step, over all ranks."""
    replacement_rounds: NonNegativeInt = 0
    """Rounds in which prompts whose rollouts all earn the same, and so teach nothing, are replaced by the next ones (dynamic sampling, arXiv:2503.14476)."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite no update is applied; then the run stops, or goes on and counts it."""


class LearnerConfig(EngineConfig):
    """A model that learns: its engine, its weights, its optimizer."""

    init_from: str
    """A stage of this run, a local directory or a hub id."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Optimizer and schedule."""


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


class RewardSource(Config):
    """What every reward source has."""

    weight: float = 1.0
    """Weight in the sum."""


class VerifierReward(RewardSource):
    """reasoning-gym's own check of the answer, in [0, 1]."""

    kind: Literal["verifier"] = "verifier"
    """`verifier`"""
    exact_only: bool = False
    """Count only a full score: partial credit becomes 0."""


class FunctionReward(RewardSource):
    """A Python function `(rollouts: list[Rollout]) -> list[float]`, run in its own process."""

    kind: Literal["function"] = "function"
    """`function`"""
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`."""


class ModelReward(RewardSource):
    """A sequence-classification checkpoint with one label."""

    kind: Literal["model"] = "model"
    """`model`"""
    init_from: str
    """A stage of this run, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, that one forward holds."""


AnyReward = Annotated[VerifierReward | FunctionReward | ModelReward, Field(discriminator="kind")]


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
    """How often a dead worker is replaced before the run stops."""


class WeightsConfig(Config):
    """Publication of the policy's weights to the generator."""

    transport: Literal["object_store", "nccl", "cuda_ipc"] = "object_store"
    """How the bytes travel: `object_store` anywhere, `nccl` between whole GPUs, `cuda_ipc` on a GPU that policy and generator share."""
    bucket_mib: PositiveInt = 256
    """Tensors are packed into buckets of this size."""
    probe_tolerance: PositiveFloat = 1e-3
    """Largest difference, in nats, between the generator's and the policy's logprobs of the probe; about 0.2 suits bfloat16."""


class RolePlacement(Config):
    """Processes of one role."""

    ranks: PositiveInt = 1
    """Processes (for the generator: workers)."""
    cpus: PositiveInt = 1
    """CPUs, and compute threads, of one rank."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one rank; a fraction shares a GPU. More than one is for the generator's tensor parallel alone."""


class GeneratorPlacement(RolePlacement):
    """Processes of the generator."""

    tensor_parallel: PositiveInt = 1
    """GPUs over which one worker's model is split."""

    @model_validator(mode="after")
    def _a_gpu_for_each_part(self) -> "GeneratorPlacement":
        if self.gpus != self.tensor_parallel and max(self.gpus, self.tensor_parallel) > 1:
            raise ValueError(
                f"gpus={self.gpus:g} does not give every part of tensor_parallel={self.tensor_parallel} one whole GPU; set gpus={self.tensor_parallel} or change tensor_parallel"
            )
        return self


class PlacementConfig(Config):
    """Who runs where."""

    address: str | None = None
    """Ray cluster to join; none: the one this job was submitted to, else a fresh local one."""
    strategy: Literal["pack", "spread"] = "pack"
    """Prefer few nodes or many."""
    generator: GeneratorPlacement = GeneratorPlacement()
    """Generator workers."""
    policy: RolePlacement = RolePlacement()
    """Policy ranks."""
    critic: RolePlacement = RolePlacement()
    """Critic ranks."""
    reference: RolePlacement = RolePlacement()
    """Reference ranks."""
    reward_model: RolePlacement = RolePlacement()
    """Ranks of each reward model."""
    colocate: tuple[tuple[str, ...], ...] = ()
    """Sets of roles that share processes, for example `[[policy, reference], [critic, reward_model, rewards]]`: rank i of each lives in one process, which has the CPUs and GPUs of the set's first role. They compute in turn, and libraries, contexts and memory are paid once. The generator has processes of its own."""

    def home(self, role: str) -> str:
        """The role whose processes `role` lives in: the first of its set, or its own."""
        kind = "reward_model" if role.startswith("reward_model_") else role
        return next((shared[0] for shared in self.colocate if kind in shared), role)

    @model_validator(mode="after")
    def _sets_that_can_be(self) -> "PlacementConfig":
        listed = [name for shared in self.colocate for name in shared]
        ranks = {name: getattr(self, name).ranks for name in ("policy", "critic", "reference", "reward_model")} | {"rewards": 1}
        for name in listed:
            if name not in ranks:
                raise ValueError(f"colocate names {name!r}; use some of {', '.join(ranks)}")
            if listed.count(name) > 1:
                raise ValueError(f"colocate names {name} twice; a role lives in one place")
        for shared in self.colocate:
            if not shared or shared[0] not in ("policy", "critic", "reference"):
                raise ValueError(f"colocate has the set [{', '.join(shared)}]; its first role gives the processes and must be policy, critic or reference")
            for name in shared:
                if ranks[name] != ranks[shared[0]]:
                    raise ValueError(
                        f"colocate puts {name} with {ranks[name]} ranks into the processes of {shared[0]} with {ranks[shared[0]]}; give both the same number"
                    )
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_rank(self) -> "PlacementConfig":
        for name in ("policy", "critic", "reference", "reward_model"):
            role = getattr(self, name)
            if role.gpus > 1:
                raise ValueError(f"{name}.gpus={role.gpus:g}, but a rank computes on one GPU; set {name}.gpus=1 and raise {name}.ranks")
            if name in ("policy", "critic") and role.ranks > 1 and 0 < role.gpus < 1:
                raise ValueError(
                    f"{name}.ranks={role.ranks} with {name}.gpus={role.gpus:g} may meet on one GPU, which NCCL refuses; set {name}.gpus=1 or {name}.ranks=1"
                )
        return self


class EvaluationConfig(Config):
    """Held-out evaluation."""

    every: PositiveInt = 50
    """Steps between evaluations; the first (step 0) and the last step are always evaluated."""
    data: PromptsConfig = PromptsConfig()
    """Held-out prompts; without files, what prepare_data wrote in this run."""
    num_prompts: PositiveInt = 500
    """Prompts scored: the first so many of the set."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    """Sampling of the main figure (`eval/accuracy`)."""
    sampled: bool = True
    """Also score one answer at temperature 1 per prompt (`eval/sampled_accuracy`)."""

    def due(self, step: int, last: int) -> bool:
        return step % self.every == 0 or step == last


class PPOConfig(JobConfig):
    """python -m jobs.ppo: reinforcement learning from rewards with PPO."""

    steps: PositiveInt = 500
    """Rollout-and-learn steps."""
    prompts_per_step: PositiveInt = 64
    """Prompts drawn in a step; each gives sampling.n rollouts."""
    score_chunk: PositiveInt = 64
    """Consecutive prompts whose rollouts are scored together, as soon as all of them are there and while the rest still generates."""
    data: PromptsConfig = PromptsConfig()
    """Training prompts."""
    sampling: SamplingConfig = SamplingConfig()
    """Sampling of rollouts; top_p, top_k and min_p must stay off, since a learner cannot reproduce their logprobs."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Advantages, losses, KL."""
    policy: PolicyConfig = PolicyConfig()
    """Policy learner."""
    critic: CriticConfig = CriticConfig()
    """Critic learner."""
    reference: ReferenceConfig = ReferenceConfig()
    """Frozen reference."""
    rewards: dict[str, AnyReward] = {"verifier": VerifierReward()}
    """Reward sources by name; the reward is their weighted sum."""
    generator: GeneratorConfig = GeneratorConfig()
    """Rollout generator."""
    weights: WeightsConfig = WeightsConfig()
    """Weight publication."""
    placement: PlacementConfig = PlacementConfig()
    """Who runs where."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    logging: LoggingConfig = LoggingConfig()
    """Metrics."""

    @property
    def rollouts_per_step(self) -> int:
        return self.prompts_per_step * self.sampling.n

    @property
    def updates_per_step(self) -> int:
        return self.algorithm.ppo_epochs * self.rollouts_per_step // self.algorithm.mini_batch_size

    @model_validator(mode="after")
    def _possible(self) -> "PPOConfig":
        sampling, rows, mini = self.sampling, self.rollouts_per_step, self.algorithm.mini_batch_size
        for name, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
            if getattr(sampling, name) != off:
                raise ValueError(
                    f"sampling.{name}={getattr(sampling, name)} changes the distribution in a way the policy cannot reproduce; leave it at {off} here and use evaluation.sampling.{name}"
                )
        if sampling.temperature == 0:
            raise ValueError("sampling.temperature=0 gives PPO nothing to compare; use a positive temperature here and evaluation.sampling.temperature=0")
        if rows % mini:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} x sampling.n={sampling.n} = {rows} rollouts do not divide into algorithm.mini_batch_size={mini}; use a divisor of {rows}"
            )
        if self.algorithm.replacement_rounds and sampling.n == 1:
            raise ValueError(
                f"algorithm.replacement_rounds={self.algorithm.replacement_rounds} compares the rollouts of a prompt, but sampling.n=1; raise sampling.n or set it to 0"
            )
        for role in ("policy", "critic"):
            ranks = getattr(self.placement, role).ranks
            if mini < ranks:
                raise ValueError(f"algorithm.mini_batch_size={mini} leaves some of placement.{role}.ranks={ranks} without a rollout; use at least {ranks}")
        if not self.rewards:
            raise ValueError("rewards is empty; name at least one source, for example rewards.verifier.kind=verifier")
        if self.generator.backend == "transformers" and self.placement.generator.tensor_parallel > 1:
            raise ValueError(f"placement.generator.tensor_parallel={self.placement.generator.tensor_parallel} needs generator.backend=vllm, found transformers")
        self._possible_on_gpus()
        return self

    def _possible_on_gpus(self) -> None:
        generator, policy, transport = self.placement.generator, self.placement.policy, self.weights.transport
        found = f"placement.generator.gpus={generator.gpus:g} and placement.policy.gpus={policy.gpus:g}"
        if transport == "nccl" and min(generator.gpus, policy.gpus) < 1:
            raise ValueError(f"weights.transport=nccl needs whole GPUs for generator and policy, found {found}; use object_store, or cuda_ipc on a shared GPU")
        if transport == "cuda_ipc" and (not (0 < generator.gpus < 1 and 0 < policy.gpus < 1) or policy.ranks > 1):
            raise ValueError(
                f"weights.transport=cuda_ipc needs a GPU that generator and one policy rank share (gpus between 0 and 1), found {found}, placement.policy.ranks={policy.ranks}; use object_store or nccl"
            )
        if self.generator.sleep_between_phases and generator.gpus == 0:
            raise ValueError("generator.sleep_between_phases=true needs a GPU, but placement.generator.gpus=0; set it to false")
        if self.generator.sleep_between_phases and self.generator.backend != "vllm":
            raise ValueError(f"generator.sleep_between_phases=true needs generator.backend=vllm, found {self.generator.backend}; set it to false")
        for role in ("policy", "critic"):
            refuse_plain_bfloat16(f"{role}.", getattr(self, role))
            if getattr(self, role).offload_optimizer and getattr(self.placement, role).gpus == 0:
                raise ValueError(f"{role}.offload_optimizer=true needs a GPU, but placement.{role}.gpus=0; set it to false")
        if "bfloat16" in (self.policy.dtype, self.generator.dtype) and self.weights.probe_tolerance < 0.01:
            raise ValueError(
                f"weights.probe_tolerance={self.weights.probe_tolerance:g} is less than bfloat16 rounds away (policy.dtype={self.policy.dtype}, generator.dtype={self.generator.dtype}); set it to about 0.2"
            )


# --------------------------------------------------------------------------------------------------- evaluate


class EvaluateConfig(JobConfig):
    """python -m jobs.evaluate: score models on held-out prompts."""

    models: tuple[str, ...] = ("sft", "ppo")
    """Stages of this run, local directories or hub ids."""
    data: PromptsConfig = PromptsConfig()
    """Held-out prompts; without files, what prepare_data wrote in this run."""
    num_prompts: PositiveInt = 500
    """Prompts scored: the first so many of the set."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    """Sampling of the main figure."""
    sampled: bool = True
    """Also score one answer at temperature 1 per prompt."""
    rewards: dict[str, AnyReward] = {"verifier": VerifierReward()}
    """Reward sources by name, as in PPO: `eval/mean_reward` is the mean of their weighted sum."""
    generator: GeneratorConfig = GeneratorConfig()
    """The engine."""
    placement: PlacementConfig = PlacementConfig()
    """Only the generator, the reward models and the cluster's address count here."""

    @model_validator(mode="after")
    def _nobody_to_sleep_for(self) -> "EvaluateConfig":
        if self.generator.sleep_between_phases:
            raise ValueError("generator.sleep_between_phases=true gives the GPU to learners, which an evaluation has not; set it to false")
        return self
