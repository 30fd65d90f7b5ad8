"""What a supervised stage settles before any process starts: which model, which files, where to go on. Bad input is refused here.

Imports no torch, so that the answer comes at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from actors.preparation import MAY_DIFFER_ON_RESUME, find_start
from minigpt_ray.checkpoint import Checkpoints
from minigpt_ray.config import SupervisedConfig
from minigpt_ray.inputs import Inputs
from minigpt_ray.model_directory import config_json, is_path, resolve_model
from minigpt_ray.object_store import check_store
from minigpt_ray.presets import PRESETS, ModelShape


class StageError(ValueError):
    """A stage cannot run as asked: one sentence with what was found and the remedy."""


@dataclass(frozen=True)
class Files:
    """What windows are made of."""

    paths: tuple[Path, ...]
    only: str | None = None
    """The one `source` that is wanted; None: all."""


@dataclass(frozen=True)
class Ready:
    """A configuration with everything that it refers to found and checked; paths are absolute, since Ray Train changes the directory."""

    config: SupervisedConfig
    directory: Path
    model: str | None
    """What `from_pretrained` takes, or None for random weights of the preset."""
    reference: str | None
    """The same for the frozen model whose logprobs the loss asks for, or None."""
    tokenizer: str
    sources: Mapping[str, Files]
    shape: ModelShape
    inputs: Inputs
    start: int
    """Step of the checkpoint to go on from, 0 for none."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoint", self.config.checkpoint.keep)


def prepare(config: SupervisedConfig) -> Ready:
    """Raises ValueError or FileNotFoundError when a model, the tokenizer or the data is not there, and when an earlier run is, or began from others."""
    check_store(config.export_to)
    directory = config.stage_dir(config.stage)
    model = None if config.model.init_from is None else resolve_model(config.model.init_from, config.run_dir)
    if model is None and config.model.preset not in PRESETS:
        raise StageError(f"model.preset={config.model.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    reference = None if config.reference_from is None else resolve_model(config.reference_from, config.run_dir)
    tokenizer = model or _tokenizer_of_a_new_model(config)
    sources = _find_sources(config)
    shape = _shape(model, config.model.preset)
    if config.window > shape.max_positions:
        raise StageError(f"window={config.window} is longer than the model's {shape.max_positions} positions; use at most so many")
    checkpoints = Checkpoints(directory / "checkpoint", config.checkpoint.keep)
    latest = find_start(config, directory, checkpoints, _may_differ(config))
    start = 0 if latest is None else checkpoints.step_of(latest)
    inputs = _inputs(config, model, reference, tokenizer, sources)
    if latest is not None:
        inputs.refuse_others(directory, latest)
    tokenizer = str(Path(tokenizer).absolute()) if Path(tokenizer).is_dir() else tokenizer
    return Ready(config, directory, model, reference, tokenizer, sources, shape, inputs, start)


def _tokenizer_of_a_new_model(config: SupervisedConfig) -> str:
    named, trained = config.model.tokenizer, config.stage_dir("prepare_data") / "tokenizer"
    if named is None and not trained.is_dir():
        raise StageError(f"no tokenizer at {trained}; {_before_this(config, 'prepare_data')}, or set model.tokenizer or model.init_from")
    if named is not None and is_path(named) and not Path(named).is_dir():
        raise StageError(f"model.tokenizer={named!r} is neither a directory nor the name of a tokenizer on the hub; python -m jobs.prepare_data trains one")
    return named or str(trained)


def _find_sources(config: SupervisedConfig) -> dict[str, Files]:
    """The files of every source; a source without files is what the stage's files say is theirs."""
    common = tuple(path.absolute() for path in config.files) or (config.stage_dir(config.data_from) / config.default_data,)
    own = {name: tuple(path.absolute() for path in source.files) for name, source in config.sources.items()}
    sources = {name: Files(paths) if paths else Files(common, only=name or None) for name, paths in own.items()}
    for name, source in sources.items():
        given = f"mix.{name}.files" if name and own[name] else "files" if config.files else ""
        for path in source.paths:
            if not path.is_file():
                raise StageError(f"no data file {path}; {f'correct {given}' if given else f'{_before_this(config, config.data_from)}, or set files'}")
    return sources


def _inputs(config: SupervisedConfig, model: str | None, reference: str | None, tokenizer: str, sources: Mapping[str, Files]) -> Inputs:
    models = {"model.init_from": model} if model else {"tokenizer": tokenizer}
    if reference is not None and reference != model:
        models["reference"] = reference
    return Inputs.of(models, list(dict.fromkeys(path for files in sources.values() for path in files.paths)))


def _before_this(config: SupervisedConfig, job: str) -> str:
    return f"run python -m jobs.{job} run={config.run} output_dir={config.output_dir} first"


MAY_DIFFER = (
    *MAY_DIFFER_ON_RESUME,
    "epochs",
    "tokens",
    "cpus_per_worker",
    "resources_per_worker",
    "labels_per_worker",
    "wait_seconds",
    "worker_restarts",
    "hang_after_s",
    "validation_every",
    "early_stopping",
)
"""Fields that a resumed run may change."""
LENGTH = ("steps", "epochs", "tokens")


def _may_differ(config: SupervisedConfig) -> list[str]:
    """Where shares move with the share of the run that is done, another length would have drawn other windows before: some twice, some never."""
    moves = config.shares(0.0) != config.shares(1.0)
    return [name for name in MAY_DIFFER if not (moves and name in LENGTH)]


def _shape(model: str | None, preset: str) -> ModelShape:
    if model is None:
        return PRESETS[preset]
    return ModelShape.from_config_json(config_json(model))
