"""Configuration: one frozen pydantic tree per job, from YAML files and dotted overrides.

    python -m jobs.ppo configs/ppo.yaml configs/mine.yaml policy.optimizer.lr=1e-6

Files are merged left to right, overrides come last. A default stands on its field and nowhere else. This package
imports neither torch nor ray, so that a mistake in a config is refused in well under a second.
"""

from minigpt_ray.config.algorithm import AlgorithmConfig
from minigpt_ray.config.base import (
    CheckpointConfig,
    Config,
    EngineConfig,
    JobConfig,
    LoggingConfig,
    OptimizerConfig,
    PromptsConfig,
    SamplingConfig,
    refuse_plain_bfloat16,
)
from minigpt_ray.config.data import PrepareConfig, TaskConfig, TokenizerConfig
from minigpt_ray.config.evaluate import EvaluateConfig, ServeRewardConfig
from minigpt_ray.config.generate_preferences import GeneratePreferencesConfig
from minigpt_ray.config.mix import AnySource, DatasetConfig, FileSource, FiltersConfig, HubSource, MixConfig, TaskSource
from minigpt_ray.config.pipeline import PipelineConfig, StageConfig
from minigpt_ray.config.placement import AnyPlacement, GeneratorPlacement, PlacementConfig, RolePlacement
from minigpt_ray.config.ppo import EvaluationConfig, PPOConfig
from minigpt_ray.config.rewards import (
    LONGEST_WAIT_S,
    START_AGAIN_S,
    AnyReward,
    CalledReward,
    FunctionReward,
    HttpReward,
    ModelReward,
    RewardSource,
    VerifierReward,
    longest_score,
)
from minigpt_ray.config.roles import MEETING_SECONDS, CriticConfig, GeneratorConfig, LearnerConfig, PolicyConfig, ReferenceConfig, WeightsConfig
from minigpt_ray.config.supervised import (
    DocumentsConfig,
    DPOConfig,
    ExamplesConfig,
    MidtrainConfig,
    ModelConfig,
    PreferencesConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
    SourceConfig,
    SupervisedConfig,
)

__all__ = [
    "LONGEST_WAIT_S",
    "MEETING_SECONDS",
    "START_AGAIN_S",
    "AlgorithmConfig",
    "AnyPlacement",
    "AnyReward",
    "AnySource",
    "CalledReward",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "DPOConfig",
    "DatasetConfig",
    "DocumentsConfig",
    "ExamplesConfig",
    "EngineConfig",
    "EvaluateConfig",
    "EvaluationConfig",
    "FileSource",
    "FiltersConfig",
    "FunctionReward",
    "GeneratePreferencesConfig",
    "GeneratorConfig",
    "GeneratorPlacement",
    "HttpReward",
    "HubSource",
    "JobConfig",
    "LearnerConfig",
    "LoggingConfig",
    "MidtrainConfig",
    "MixConfig",
    "ModelConfig",
    "ModelReward",
    "OptimizerConfig",
    "PPOConfig",
    "PipelineConfig",
    "PlacementConfig",
    "PolicyConfig",
    "PreferencesConfig",
    "PrepareConfig",
    "PretrainConfig",
    "PromptsConfig",
    "ReferenceConfig",
    "RewardModelConfig",
    "RewardSource",
    "RolePlacement",
    "SFTConfig",
    "SamplingConfig",
    "ServeRewardConfig",
    "SourceConfig",
    "StageConfig",
    "SupervisedConfig",
    "TaskConfig",
    "TaskSource",
    "TokenizerConfig",
    "VerifierReward",
    "WeightsConfig",
    "longest_score",
    "refuse_plain_bfloat16",
]
