"""The configuration of jobs/ppo.py, and what excludes what in it."""

from pydantic import NonNegativeInt, PositiveInt, model_validator

from minigpt_ray.config.algorithm import AlgorithmConfig
from minigpt_ray.config.base import CheckpointConfig, Config, LoggingConfig, PromptsConfig, SamplingConfig, TrainingConfig, refuse_plain_bfloat16
from minigpt_ray.config.placement import PlacementConfig
from minigpt_ray.config.rewards import AnyReward, VerifierReward
from minigpt_ray.config.roles import MEETING_SECONDS, CriticConfig, GeneratorConfig, PolicyConfig, ReferenceConfig, WeightsConfig


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


class PPOConfig(TrainingConfig):
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
    """How often, between two checkpoints, the processes of a role are replaced when one of them dies, before the run stops: those of a frozen role at once, the learners' together, from the newest checkpoint."""
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
        share, part = self.generator.gpu_memory_utilization, self.placement.generator.gpus
        if 0 < part < share and part < 1 and not self.generator.sleep_between_phases:
            raise ValueError(
                f"generator.gpu_memory_utilization={share} is more of a GPU than placement.generator.gpus={part} leaves it; "
                f"set it to {part} or less, or generator.sleep_between_phases=true"
            )
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
        if self.weights.transport == "nccl" and self.placement.hang_after_s <= MEETING_SECONDS:
            raise ValueError(
                f"placement.hang_after_s={self.placement.hang_after_s:g} is no longer than policy and generator workers wait for each other with weights.transport=nccl, {MEETING_SECONDS:g} s; raise it"
            )
        self._possible_on_gpus()
        return self

    def _possible_on_gpus(self) -> None:
        home = self.placement.home("policy")
        generator, policy, transport = self.placement.generator, getattr(self.placement, home), self.weights.transport
        found = f"placement.generator.gpus={generator.gpus:g} and placement.{home}.gpus={policy.gpus:g}"
        if transport == "nccl" and min(generator.gpus, policy.gpus) < 1:
            raise ValueError(f"weights.transport=nccl needs whole GPUs for generator and policy, found {found}; use object_store, or cuda_ipc on a shared GPU")
        if transport == "cuda_ipc" and (not (0 < generator.gpus < 1 and 0 < policy.gpus < 1) or policy.ranks > 1):
            raise ValueError(
                f"weights.transport=cuda_ipc needs a GPU that generator and one policy rank share (gpus between 0 and 1), found {found}, placement.{home}.ranks={policy.ranks}; use object_store or nccl"
            )
        if transport == "cuda_ipc" and not self.placement.generator_asks_for_no_other_nodes:
            raise ValueError(
                f"weights.transport=cuda_ipc needs generator and policy on one GPU, but placement.generator.labels={generator.labels} and resources={generator.resources} "
                f"ask for other nodes than those of placement.{home}; leave them out"
            )
        if self.generator.sleep_between_phases and generator.gpus == 0:
            raise ValueError("generator.sleep_between_phases=true needs a GPU, but placement.generator.gpus=0; set it to false")
        if self.generator.sleep_between_phases and self.generator.backend != "vllm":
            raise ValueError(f"generator.sleep_between_phases=true needs generator.backend=vllm, found {self.generator.backend}; set it to false")
        for role in self.learners:
            refuse_plain_bfloat16(f"{role}.", getattr(self, role))
            home = self.placement.home(role)
            if getattr(self, role).offload_optimizer and getattr(self.placement, home).gpus == 0:
                raise ValueError(f"{role}.offload_optimizer=true needs a GPU, but placement.{home}.gpus=0; set it to false")
        if "bfloat16" in (self.policy.dtype, self.generator.dtype) and self.weights.probe_tolerance < 0.01:
            raise ValueError(
                f"weights.probe_tolerance={self.weights.probe_tolerance:g} is less than bfloat16 rounds away (policy.dtype={self.policy.dtype}, generator.dtype={self.generator.dtype}); set it to about 0.2"
            )
