"""The job that makes preference pairs of a model's own answers."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from minigpt_ray.config.base import JobConfig, PromptsConfig, SamplingConfig
from minigpt_ray.config.placement import PlacementConfig
from minigpt_ray.config.rewards import AnyReward, VerifierReward
from minigpt_ray.config.roles import GeneratorConfig


class GeneratePreferencesConfig(JobConfig):
    """python -m jobs.generate_preferences: pairs of a model's own answers, preferred by reward sources, for DPO and reward models."""

    model: str = "sft"
    """The model that answers: a stage of this run, a local directory or a hub id."""
    data: PromptsConfig = PromptsConfig()
    """Prompts; without files, those that prepare_data wrote for PPO in this run."""
    num_prompts: PositiveInt = 1000
    """Prompts answered: the first so many of the set."""
    sampling: SamplingConfig = SamplingConfig(n=8)
    """How the answers to a prompt are drawn; `n` of them."""
    rewards: dict[str, AnyReward] = {"verifier": VerifierReward()}
    """Reward sources by name, as in PPO: the weighted sum decides which answer is preferred."""
    strategy: Literal["best_vs_worst", "all_pairs", "none"] = "best_vs_worst"
    """Pairs of sampled answers: the best with the worst, any two with different scores, or none."""
    max_pairs_per_prompt: PositiveInt = 4
    """With `all_pairs`, so many of them at most, drawn by the seed."""
    min_margin: NonNegativeFloat = 0.0
    """Two answers make a pair when their scores differ by more than this."""
    right_answer: bool = False
    """Also pair the prompt's right answer (the assistant's turn of a demonstration, else the answer that the verifier checks by) with a sampled one that the verifier finds wrong; for a prompt that cannot be verified, with any other answer."""
    held_out_share: float = Field(default=0.1, ge=0, lt=1)
    """Share of the prompts whose pairs go to held_out.jsonl; a prompt is in one of the files only."""
    prompts_per_batch: PositiveInt = 256
    """Prompts that are answered and scored at a time."""
    generator: GeneratorConfig = GeneratorConfig()
    """The engine."""
    placement: PlacementConfig = PlacementConfig()
    """Only the generator, the reward models, the cluster's address, `check_memory`, `wait_seconds` and `hang_after_s` count here."""
    restart_limit: NonNegativeInt = 3
    """How often the processes of a reward role are replaced when one of them dies, and the driver is started again, before the job stops."""

    @model_validator(mode="after")
    def _pairs_of_something(self) -> "GeneratePreferencesConfig":
        if self.strategy == "none" and not self.right_answer:
            raise ValueError("strategy=none with right_answer=false makes no pairs; set one of them")
        if self.strategy != "none" and self.sampling.n < 2:
            raise ValueError(
                f"sampling.n={self.sampling.n} gives strategy={self.strategy} nothing to compare; use at least 2, or strategy=none with right_answer=true"
            )
        if self.generator.sleep_between_phases:
            raise ValueError("generator.sleep_between_phases=true gives the GPU to learners, which this job has not; set it to false")
        return self
