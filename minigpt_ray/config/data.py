"""prepare_data: which data is made, and the tokenizer."""

from pydantic import Field, PositiveFloat, PositiveInt

from minigpt_ray.config.base import Config, JobConfig

TaskOptions = dict[str, int | float | str | bool | list[int] | list[str]]


class TaskConfig(Config):
    """One reasoning-gym task of the mix."""

    weight: PositiveFloat = 1.0
    """Share of the mix, relative to the other tasks."""
    options: TaskOptions = {}
    """Arguments of the task's own configuration class."""
    demonstration_options: dict[str, int | float | str | bool | list[int] | list[str]] = {}
    """Arguments in which the demonstrations differ from `options`: easier questions, for example, so that PPO has what SFT does not teach."""


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
