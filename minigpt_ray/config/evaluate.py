"""The jobs that use a model: evaluate, and a server of rewards."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from minigpt_ray.config.base import JobConfig, PromptsConfig, SamplingConfig
from minigpt_ray.config.placement import PlacementConfig
from minigpt_ray.config.rewards import AnyReward, VerifierReward
from minigpt_ray.config.roles import GeneratorConfig


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
    pass_at: tuple[PositiveInt, ...] = ()
    """For each k of the list, pass@k: the chance that one of k answers at temperature 1 is right."""
    pass_samples: PositiveInt = 16
    """Answers to each prompt from which pass@k is estimated; at least the largest k."""
    baseline: str | None = None
    """One of `models`: how often is an answer of each other one scored higher than its answer to the same prompt, ties half?"""
    judge: str | None = None
    """The reward source that decides it, one of `rewards`; none: the weighted sum of all."""
    generator: GeneratorConfig = GeneratorConfig()
    """The engine."""
    placement: PlacementConfig = PlacementConfig()
    """Only the generator, the reward models, the cluster's address, `check_memory`, `wait_seconds` and `hang_after_s` count here."""
    restart_limit: NonNegativeInt = 3
    """How often the processes of a reward role are replaced when one of them dies, and the driver is started again, before the job stops."""

    @model_validator(mode="after")
    def _what_is_named_is_there(self) -> "EvaluateConfig":
        if self.pass_at and max(self.pass_at) > self.pass_samples:
            raise ValueError(f"pass_at={list(self.pass_at)} asks for more answers than pass_samples={self.pass_samples} draws; raise pass_samples")
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"baseline={self.baseline} is none of the models {', '.join(self.models)}; add it to models")
        if self.judge is not None and self.judge not in self.rewards:
            raise ValueError(f"judge={self.judge} is none of the rewards {', '.join(self.rewards)}; add it to rewards, or leave judge out")
        if self.judge is not None and self.baseline is None:
            raise ValueError(f"judge={self.judge} decides between a model and the baseline, and there is none; set baseline")
        return self

    @model_validator(mode="after")
    def _nobody_to_sleep_for(self) -> "EvaluateConfig":
        if self.generator.sleep_between_phases:
            raise ValueError("generator.sleep_between_phases=true gives the GPU to learners, which an evaluation has not; set it to false")
        return self


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
