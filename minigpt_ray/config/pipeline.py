"""The life of a model as a list of stages."""

from pathlib import Path

from pydantic import model_validator

from minigpt_ray.config.base import Config, JobConfig
from minigpt_ray.config.data import PrepareConfig
from minigpt_ray.config.evaluate import EvaluateConfig
from minigpt_ray.config.generate_preferences import GeneratePreferencesConfig
from minigpt_ray.config.ppo import PPOConfig
from minigpt_ray.config.supervised import DPOConfig, MidtrainConfig, PretrainConfig, RewardModelConfig, SFTConfig

STAGE_CONFIGS: dict[str, type[JobConfig]] = {
    "prepare_data": PrepareConfig,
    "pretrain": PretrainConfig,
    "midtrain": MidtrainConfig,
    "sft": SFTConfig,
    "generate_preferences": GeneratePreferencesConfig,
    "reward_model": RewardModelConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
    "evaluate": EvaluateConfig,
}
"""Jobs that a pipeline runs, and what configures each."""


class StageConfig(Config):
    """One stage: what one would write behind `python -m jobs.<stage>`."""

    files: tuple[Path, ...] = ()
    """Configuration files, merged left to right."""
    overrides: tuple[str, ...] = ()
    """Dotted overrides; run, output_dir and seed are the pipeline's."""


class PipelineConfig(JobConfig):
    """python -m jobs.pipeline: several stages in one run, one after the other."""

    stages: dict[str, StageConfig] = {}
    """Stages by the name of their job, in their order."""
    only: tuple[str, ...] = ()
    """Those of the stages to run; none: all."""

    @model_validator(mode="after")
    def _known_stages(self) -> "PipelineConfig":
        if not self.stages:
            raise ValueError(f"stages is empty; name at least one of {', '.join(STAGE_CONFIGS)}")
        for name in self.stages:
            if name not in STAGE_CONFIGS:
                raise ValueError(f"stages.{name} is no stage; use some of {', '.join(STAGE_CONFIGS)}")
        for name in self.only:
            if name not in self.stages:
                raise ValueError(f"only names {name!r}, which is not among the stages {', '.join(self.stages)}")
        return self
