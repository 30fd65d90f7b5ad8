"""Configuration: one frozen pydantic tree per job, from YAML files and dotted overrides.

    python -m jobs.ppo configs/ppo.yaml configs/mine.yaml policy.optimizer.lr=1e-6

Files are merged left to right, overrides come last. A default stands on its field and nowhere else. This module
imports neither torch nor ray, so that a mistake in a config is refused in well under a second.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

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


# --------------------------------------------------------------------------------------------------- PPO


class AlgorithmConfig(Config):
    """What PPO computes from a batch of rollouts: advantages, rewards, KL, losses, updates."""

    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """Advantage estimator: gae (arXiv:1506.02438) learns a critic; rloo (arXiv:2402.14740), grpo (arXiv:2402.03300) and reinforce++ (arXiv:2501.03262) start none."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount per token, for gae and reinforce++; rloo and grpo judge whole responses."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE: 1 is return minus value, 0 the one-step TD error."""
    divide_by_group_std: bool = True
    """Whether grpo divides by the group's standard deviation; false: without the bias to the easiest and hardest prompts (arXiv:2503.20783)."""
    whiten_advantages: bool | None = None
    """Shift and scale advantages to mean 0 and standard deviation 1 over all response tokens of the step; none: with gae and reinforce++, and not with rloo and grpo, where it moves groups without signal away from 0."""
    replacement_rounds: NonNegativeInt = 0
    """Rounds in which prompts whose rollouts all earn the same, and so teach nothing, are replaced by the next ones (dynamic sampling, arXiv:2503.14476)."""

    truncated: Literal["score", "bootstrap"] = "score"
    """What a response cut at sampling.max_tokens is worth: its score, as the limit is part of the task, or, in place of the score, the critic's estimate after its last token. Never both: a response that never ends would then earn twice."""
    normalize_rewards: bool = False
    """Subtract the mean and divide by the standard deviation of all weighted rewards since the run began (arXiv:2307.04964)."""
    reward_clip: PositiveFloat | None = None
    """The weighted reward, normalised if so configured, is clipped to [-reward_clip, reward_clip]; none: no clip."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken off the rewards, after normalisation and clip, for every response token beyond length_free. With 1 / buffer, and length_free = sampling.max_tokens - buffer, the soft overlong punishment of arXiv:2503.14476."""
    length_free: NonNegativeInt = 0
    """Response tokens that cost nothing."""

    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL penalty to the reference; with kl_target its value in the first step."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty is taken: off the rewards of tokens, so that advantages hold it, or as a term of the policy's loss (as in arXiv:2402.03300)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty. In the loss its gradient counts: k2 has that of KL(policy || reference), k3 that of KL(reference || policy), k1 none (arXiv:2506.09477)."""
    kl_target: PositiveFloat | None = None
    """KL to the reference, in nats per token (train/kl_ref), to which kl_coef is adapted after every step (arXiv:1909.08593); none: kl_coef is fixed."""
    kl_horizon: float = Field(default=10.0, ge=1)
    """Inertia of the adaptation, in steps: a KL that is off by 20 % or more changes kl_coef by 20 % / kl_horizon; 10 is the paper's."""

    clip_low: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high] (arXiv:1707.06347)."""
    clip_high: PositiveFloat = 0.2
    """Larger than clip_low it lets unlikely tokens rise (arXiv:2503.14476 takes 0.28)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """For a negative advantage the ratio counts at most so much, 3 for example (arXiv:1912.09729); none: no bound."""
    value_clip: PositiveFloat | None = 0.2
    """Values move at most this far from the old ones before the loss goes flat; none: no clip."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    ppo_epochs: PositiveInt = 1
    """Passes over the step's rollouts."""
    mini_batch_size: PositiveInt = 64
    """Rollouts per optimizer step, over all ranks."""
    kl_stop: PositiveFloat | None = None
    """A mini-batch on which the policy has moved further than this from the one that sampled (train/kl, nats per token) is not learnt from, nor any after it in the step; the critic learns on. none: no early stop."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite no update is applied; then the run stops, or goes on and counts it."""

    @property
    def uses_critic(self) -> bool:
        return self.estimator == "gae"

    @property
    def whitens(self) -> bool:
        return self.estimator in ("gae", "reinforce++") if self.whiten_advantages is None else self.whiten_advantages

    @model_validator(mode="after")
    def _possible(self) -> "AlgorithmConfig":
        if not self.uses_critic and self.truncated == "bootstrap":
            raise ValueError(
                f"truncated=bootstrap needs a critic's estimate, but estimator={self.estimator} starts no critic; set truncated=score or estimator=gae"
            )
        if not self.uses_critic and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} waits for a critic, but estimator={self.estimator} starts none; set it to 0 or estimator=gae"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_in=loss with kl_estimator=k1 has no gradient on average; set kl_estimator=k2 or k3, or kl_in=reward")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target={self.kl_target:g} adapts kl_coef by a factor, and kl_coef=0 stays 0; start from a small positive kl_coef")
        return self


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


class RewardSource(Config):
    """What every reward source has."""

    weight: float = 1.0
    """Weight in the sum."""


class CalledReward(RewardSource):
    """A source whose calls may fail: repeated, then without a score for those rollouts, and the run stops when they are too many."""

    retries: NonNegativeInt = 2
    """Repetitions of a call that failed. After them the rollouts of a batch are scored one by one, once each, so that only the guilty ones stay without a score."""
    max_errors: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the newest rollouts (100, or all that are scored together if more) that may stay without a score because the source raised an error or gave no valid answer; more stop the run."""
    max_outages: float = Field(default=0.1, ge=0, le=1)
    """The same for those whose scoring took too long, whose process died or whose server could not be reached."""


class VerifierReward(CalledReward):
    """The rule of the prompt's answer (reasoning-gym's own check, same text, same number), in [0, 1]."""

    kind: Literal["verifier"] = "verifier"
    """`verifier`"""
    exact_only: bool = False
    """Count only a full score: partial credit becomes 0."""


class FunctionReward(CalledReward):
    """A Python function `(rollouts: list[Rollout]) -> list[float]`, run in its own process; nan where there is no score."""

    kind: Literal["function"] = "function"
    """`function`"""
    function: str = Field(pattern=r"^[\w.]+:\w+$")
    """`module:function`."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one call may take; then its process is killed and started again."""
    batch_size: PositiveInt | None = None
    """Rollouts of one call; none: all of them."""


class HttpReward(CalledReward):
    """A server that answers POST {"samples": [{"prompt", "response", "answer", "source"}, ...]} with {"scores": [number or null, ...]}."""

    kind: Literal["http"] = "http"
    """`http`"""
    url: str = Field(pattern=r"^https?://[^\s/@?#]+(/[^\s@]*)?$")
    """Where samples are posted to, without credentials. It is asked for the scores of no samples before the job starts; redirects are not followed."""
    token_env: str | None = None
    """Environment variable, where the job starts, that holds a bearer token for the server."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one request may take, from connecting to the last byte."""
    backoff_s: NonNegativeFloat = 0.5
    """Seconds before the first repetition of a request; they double with each."""
    batch_size: PositiveInt = 32
    """Samples of one request."""
    concurrency: PositiveInt = 4
    """Requests under way at a time."""
    max_response_bytes: PositiveInt = 1 << 20
    """Largest answer that is read."""


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


AnyReward = Annotated[VerifierReward | FunctionReward | ModelReward | HttpReward, Field(discriminator="kind")]


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
    """Advantages, rewards, KL, losses."""
    policy: PolicyConfig = PolicyConfig()
    """Policy learner."""
    critic: CriticConfig = CriticConfig()
    """Critic learner; unused with an estimator that needs none."""
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
    restart_limit: NonNegativeInt = 3
    """How often the processes of a role are replaced when one of them dies, before the run stops: those of a frozen role at once, the learners' together, from the newest checkpoint."""
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
    def learners(self) -> tuple[str, ...]:
        return ("policy", "critic") if self.algorithm.uses_critic else ("policy",)

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
        if not self.algorithm.uses_critic and any("critic" in shared for shared in self.placement.colocate):
            raise ValueError(f"placement.colocate names critic, but algorithm.estimator={self.algorithm.estimator} starts none; leave critic out of it")
        if self.algorithm.estimator in ("rloo", "grpo") and sampling.n == 1:
            raise ValueError(f"algorithm.estimator={self.algorithm.estimator} compares the samples of a prompt, but sampling.n=1; set it to at least 2")
        if rows % mini:
            raise ValueError(
                f"prompts_per_step={self.prompts_per_step} x sampling.n={sampling.n} = {rows} rollouts do not divide into algorithm.mini_batch_size={mini}; use a divisor of {rows}"
            )
        if self.algorithm.replacement_rounds and sampling.n == 1:
            raise ValueError(
                f"algorithm.replacement_rounds={self.algorithm.replacement_rounds} compares the rollouts of a prompt, but sampling.n=1; raise sampling.n or set it to 0"
            )
        for role in self.learners:
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
        for role in self.learners:
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


# ------------------------------------------------------------------------------------------------ serve_reward


class ServeRewardConfig(JobConfig):
    """python -m jobs.serve_reward: an HTTP server that scores responses with a function or a reward model."""

    function: str = Field(default="minigpt_ray.reward_protocol:by_rule", pattern=r"^[\w.]+:\w+$")
    """`module:function`, (samples: list[Sample]) -> list[float or None]; the default checks answers as `kind: verifier` does."""
    model: str | None = None
    """Instead of the function, a sequence-classification checkpoint with one label and its own tokenizer: a stage of this run, a local directory or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of the model."""
    micro_batch_tokens: PositiveInt = 16384
    """Most tokens, padding included, that one forward of the model holds."""
    host: str = "127.0.0.1"
    """Address to listen at; one that other machines reach needs token_env."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen at; 0 takes one that is free."""
    token_env: str | None = None
    """Environment variable that holds the bearer token every request must carry."""
    max_request_bytes: PositiveInt = 64 << 20
    """Largest request that is read."""

    @model_validator(mode="after")
    def _not_open_to_everyone(self) -> "ServeRewardConfig":
        if self.host not in ("127.0.0.1", "localhost", "::1") and self.token_env is None:
            raise ValueError(
                f"host={self.host} lets other machines in, but token_env is not set; name an environment variable with a token, or use host=127.0.0.1"
            )
        return self
