"""prepare_data: a mix of sources, and what is made of it."""

import re
from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from minigpt_ray.config.base import Config, JobConfig
from minigpt_ray.config.data import TaskOptions, TokenizerConfig


class FiltersConfig(Config):
    """Which rows are left out; each is counted under its reason. All look at the whole row: prompt, answers, every turn."""

    min_characters: NonNegativeInt = 0
    """Shortest row."""
    max_characters: PositiveInt | None = None
    """Longest row; null: any."""
    max_repetition: float = Field(default=1.0, ge=0, le=1)
    """Largest share of the text that may repeat what stood in it before, word for word (32 bytes or more), in any language. Prose has less than 0.05; 1 keeps all."""
    keep: tuple[str, ...] = ()
    """Regular expressions that must all be found somewhere in a row."""
    drop: tuple[str, ...] = ()
    """Regular expressions none of which may be found."""

    @field_validator("keep", "drop")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression ({error}); mend it") from None
        return patterns


class MixSource(Config):
    """What every source has. Without `weight` and `count` all of it is taken."""

    weight: PositiveFloat | None = None
    """Share of the rows, relative to the other weights."""
    count: PositiveInt | None = None
    """Rows taken, held-out ones included."""
    repeat: bool = False
    """Take rows several times when there are fewer than asked for; otherwise that is refused."""
    fields: dict[str, str] = {}
    """Where a field of a known format stands in the file: {question: problem, answer: meta.solution}. Other fields are then not looked at."""
    separator: str | None = None
    """For {"text"} rows: the prompt ends before the first occurrence of this string, the answer begins behind it."""
    filters: FiltersConfig = FiltersConfig()
    """Which rows are left out."""
    malformed: Literal["refuse", "drop"] = "refuse"
    """What happens to a row with an empty or missing field; a file that is no JSON, text or Parquet is always refused."""

    @model_validator(mode="after")
    def _one_amount(self) -> "MixSource":
        if self.weight is not None and self.count is not None:
            raise ValueError(f"weight={self.weight} and count={self.count} both say how much is taken; keep one")
        return self


class StoredSource(MixSource):
    """What is read and not generated."""

    first: PositiveInt | None = None
    """Read only so many records."""
    templated: bool = False
    """Rows that differ in a word or a number on purpose, such as generated exercises: only exact duplicates are dropped."""


class FileSource(StoredSource):
    """Files: JSON Lines, JSON arrays, plain text (.txt, .md), Parquet; all but Parquet also as .gz or .zst."""

    kind: Literal["file"] = "file"
    """`file`"""
    files: tuple[str, ...] = Field(min_length=1)
    """Paths, or patterns such as data/books/*.jsonl.gz."""
    cut_at: str | None = None
    """Plain text: a document ends where this stands, a blank line for example; null: a file is one document."""
    document_characters: PositiveInt = 1
    """Plain text that is cut: pieces are joined until a document has so many characters."""


class HubSource(StoredSource):
    """A data set of the Hugging Face hub, streamed (needs the package datasets)."""

    kind: Literal["hub"] = "hub"
    """`hub`"""
    id: str
    """`owner/name`."""
    subset: str | None = None
    """The configuration of the data set, where it has several."""
    split: str = "train"
    """Its split."""
    revision: str | None = None
    """Commit or tag; null: the newest, which may change."""


class TaskSource(MixSource):
    """Questions of a reasoning-gym task, which are templated by nature: only exact duplicates are dropped."""

    kind: Literal["task"] = "task"
    """`task`"""
    task: str
    """Name of the task."""
    options: TaskOptions = {}
    """Arguments of the task's own configuration class."""


AnySource = Annotated[FileSource | HubSource | TaskSource, Field(discriminator="kind")]


class DatasetConfig(Config):
    """One kind of rows, from as many sources as wanted. Of duplicates the one from the first source stays."""

    sources: dict[str, AnySource] = {}
    """Sources by name, which their rows carry as `source` unless they have one."""
    rows: PositiveInt | None = None
    """Rows in all, of which the sources with a weight share what those without leave; null: as many as the weights allow without repetition."""

    @model_validator(mode="after")
    def _amounts(self) -> "DatasetConfig":
        if self.rows is not None and all(source.weight is None for source in self.sources.values()):
            raise ValueError(f"rows={self.rows} is shared by the sources with a weight, but none has one; give weights or remove rows")
        if self.rows is None and (endless := [name for name, s in self.sources.items() if s.weight is not None and isinstance(s, TaskSource)]):
            raise ValueError(f"sources.{endless[0]} has a weight, but a task has no end; set rows, or count in place of weight")
        if bare := [name for name, s in self.sources.items() if s.weight is None and s.count is None and isinstance(s, TaskSource)]:
            raise ValueError(f"sources.{bare[0]}: a task has no end; set its count, or a weight and rows")
        return self


class PreferencesConfig(DatasetConfig):
    """Pairs of a better and a worse answer."""

    @model_validator(mode="after")
    def _have_two_answers(self) -> "PreferencesConfig":
        if tasks := [name for name, source in self.sources.items() if isinstance(source, TaskSource)]:
            raise ValueError(f"sources.{tasks[0]}.kind=task gives one answer to a question, but a pair needs two; choose another source")
        return self


class PromptDatasetConfig(DatasetConfig):
    """Prompts for PPO."""

    answers: Literal["keep", "drop"] = "keep"
    """Whether prompts carry what a verifier needs; a file keeps to one, so `keep` refuses sources of which only some have it."""


class MixConfig(JobConfig):
    """python -m jobs.prepare_data: a mix of sources, cleaned, split and put into order. Files for several stages may be given together."""

    documents: DatasetConfig = DatasetConfig()
    """{"text", "source"} for pretrain and midtrain."""
    demonstrations: DatasetConfig = DatasetConfig()
    """{"messages", "source"} for sft."""
    preferences: PreferencesConfig = PreferencesConfig()
    """{"prompt", "chosen", "rejected", "source"} for dpo and reward_model."""
    prompts: PromptDatasetConfig = PromptDatasetConfig()
    """{"prompt", "answer", "source"} for PPO and evaluation."""
    held_out: float = Field(default=0.02, ge=0, lt=1)
    """Share of the rows that is kept from training. Conversations that the user begins in the same or nearly the same way are on the same side, whatever they are used for."""
    near_duplicates: float | None = Field(default=0.8, ge=0.5, le=1)
    """Similarity (Jaccard, of runs of 8 bytes) from which rows are near duplicates, of which one is kept; null: only exact ones."""
    tokenizer: TokenizerConfig | None = None
    """Train a tokenizer on the rows; null: the model has one."""

    @model_validator(mode="after")
    def _has_sources(self) -> "MixConfig":
        if not any(getattr(self, kind).sources for kind in KINDS):
            raise ValueError(f"no source is given; set one of {', '.join(f'{kind}.sources' for kind in KINDS)}")
        return self


KINDS = ("documents", "demonstrations", "preferences", "prompts")
"""Fields of MixConfig, and names of files."""
