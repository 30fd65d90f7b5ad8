"""The command line that all jobs share: YAML files, dotted overrides, --help, --dry-run.

    config = load_config(PPOConfig)        # python -m jobs.ppo configs/ppo.yaml mine.yaml policy.optimizer.lr=1e-6

Files are merged left to right, mapping by mapping; overrides come last, wherever they stand. A section that is given in
part keeps the rest of the default on its field. Named things (`rewards`, `tasks`) are taken as given: in a file they
replace the default ones, `rewards.verifier.weight=2` edits one, `rewards.verifier=null` removes one.

A mistake ends the process with code 2 and one sentence on stderr that names the dotted path and the file and line, or
the override, that it came from.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from minigpt_ray.config import EvaluateConfig, GeneratePreferencesConfig, PPOConfig
from minigpt_ray.help import help_text
from minigpt_ray.schema import default_of, origin_of, section_of, sections
from minigpt_ray.sentences import sentence
from minigpt_ray.settings import ConfigError, Dumper, Location, Origins, apply, locations_below, merge, read_file, split
from minigpt_ray.versions import versions

C = TypeVar("C", bound=BaseModel)


def load_config(root: type[C], argv: list[str] | None = None) -> C:
    """The job's configuration from its command line (`sys.argv[1:]`); exits after --help, --dry-run or a mistake."""
    arguments = sys.argv[1:] if argv is None else argv
    if "--help" in arguments or "-h" in arguments:
        print(help_text(root))
        raise SystemExit(0)
    try:
        config = read_config(root, [a for a in arguments if a != "--dry-run"])
    except ConfigError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if "--dry-run" in arguments:
        print(to_yaml(config), end="")
        if isinstance(config, PPOConfig | EvaluateConfig | GeneratePreferencesConfig):
            from minigpt_ray.memory import print_placement  # reads model shapes, which nothing else here needs

            print()
            print_placement(config)
        raise SystemExit(0)
    return config


@contextmanager
def one_sentence(kinds: tuple[type[Exception], ...] = (ValueError, FileNotFoundError)) -> Iterator[None]:
    """What a user can mend ends the process with code 2 and its sentence on stderr, not with a traceback. `kinds` are such sentences.

    One that comes from another process has the traceback from there in its text; its cause has the sentence alone.
    """
    try:
        yield
    except kinds as error:
        print(getattr(error, "cause", error), file=sys.stderr)
        raise SystemExit(2) from None


def read_config(root: type[C], arguments: list[str]) -> C:
    """As load_config, for files and overrides only; raises ConfigError."""
    files, overrides = split(arguments)
    origins: Origins = {}
    tree: dict[str, Any] = {}
    for path in files:
        content, lines = read_file(path)
        origins |= lines
        tree = merge(tree, content)
    tree = _with_defaults(root, tree)
    for override in overrides:
        origins[override.location] = f"override {override.text}"
        tree = apply(tree, override, sections(root))
    try:
        return root.model_validate(_without_removed(root, tree))
    except ValidationError as failure:
        raise ConfigError("\n".join(sentence(root, error, origins) for error in failure.errors())) from None


def given(arguments: list[str]) -> set[Location]:
    """Locations that the files and overrides of a command line set; raises ConfigError."""
    files, overrides = split(arguments)
    origins = {location for path in files for location in read_file(path)[1]}
    return origins | {location for override in overrides for location in (override.location, *locations_below(override.location, override.value))}


def is_mix(arguments: list[str]) -> bool:
    """Whether a command line of prepare_data describes a mix of sources: reasoning-gym tasks alone need none."""
    try:
        return any("sources" in location[1:2] for location in given([word for word in arguments if not word.startswith("-")]))
    except ConfigError:
        return False  # load_config says what is wrong


def resolved(config: BaseModel) -> dict[str, Any]:
    """The whole tree, defaults included, as values that JSON knows."""
    return config.model_dump(mode="json")


def to_yaml(config: BaseModel) -> str:
    """The resolved tree as YAML that load_config reads back to an equal config."""
    return yaml.dump(resolved(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_resolved(config: BaseModel, directory: Path) -> Path:
    """Write the resolved tree to `directory`/config.yaml, and beside it versions.json: the software that reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    (directory / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
    return path


def _with_defaults(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of sections below it, so that `optimizer.lr` alone keeps the field's own schedule."""
    result = dict(given)
    for name, field in model.model_fields.items():
        section, default = section_of(field.annotation), default_of(field)
        if isinstance(default, BaseModel):
            result[name] = merge(default.model_dump(), given.get(name, {}))
        elif section is not None and isinstance(given.get(name), Mapping):
            result[name] = _with_defaults(section, given[name])
        elif isinstance(default, dict) and name not in given:
            result[name] = {key: item.model_dump() if isinstance(item, BaseModel) else item for key, item in default.items()}
    return result


def _without_removed(model: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without those named things that were set to null."""
    result = dict(tree)
    for name, field in model.model_fields.items():
        value, section = tree.get(name), section_of(field.annotation)
        if isinstance(value, dict) and section is not None:
            result[name] = _without_removed(section, value)
        elif isinstance(value, dict) and origin_of(field.annotation) is dict:
            result[name] = {key: item for key, item in value.items() if item is not None}
    return result
