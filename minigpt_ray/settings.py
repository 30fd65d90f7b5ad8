"""Settings as users write them, YAML files and dotted overrides, and where each stands.

YAML is read by the 1.2 rules: `1e-6` is a number, `on`, `no`, `1:30` and dates are text.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Location = tuple[str, ...]
"""Where a value stands in the tree: ("policy", "optimizer", "lr")."""
Origins = dict[Location, str]
"""Which file and line, or which override, set a value."""


class ConfigError(ValueError):
    """What is wrong with a configuration: one sentence a line."""


# ---------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2."""


class Dumper(yaml.SafeDumper):
    """Writes what both _Loader and YAML 1.1 readers understand: text that either takes for something else is quoted."""


# YAML 1.1, PyYAML's default, reads 1e-6 as text, 010 as 8, 1:30 as 90, `no` as false and 2025-01-31 as a date.
_SCALARS = {
    "tag:yaml.org,2002:null": (r"~|null|Null|NULL|", "~nN\0"),
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "tag:yaml.org,2002:merge": (r"<<", "<"),
}
_Loader.yaml_implicit_resolvers = {}
for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def read_file(path: Path) -> tuple[dict[str, Any], Origins]:
    """The mapping in a YAML file, and for every key the file and line that set it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, _Loader)
        origins = {} if node is None else dict(_lines(node, path))
        content = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_plain(error)}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if content is None:
        return {}, {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: holds {show(content)}, but a mapping of field names to values is needed")
    return content, origins


def _lines(node: yaml.Node, path: Path, at: Location = ()) -> Iterator[tuple[Location, str]]:
    """Location and origin of every key below `node`; refuses keys given twice, of which YAML would keep the last."""
    if not isinstance(node, yaml.MappingNode):
        return
    first: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        here = (*at, str(key.value))
        if key.value == "<<":
            continue
        if key.tag != "tag:yaml.org,2002:str":
            raise ConfigError(f"{path}, line {line}: the key {'.'.join(here)} is not text; put it in quotes")
        if key.value in first:
            raise ConfigError(f"{path}, line {line}: {'.'.join(here)} is given a second time, first in line {first[key.value]}; keep one")
        first[key.value] = line
        yield here, f"{path}, line {line}"
        yield from _lines(value, path, here)


def locations_below(at: Location, value: Any) -> Iterator[Location]:
    """Locations of the keys within a value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (*at, str(key))
            yield from locations_below((*at, str(key)), inner)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _plain(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(_one_line(part) for part in (error.context, error.problem) if part)


# ----------------------------------------------------------------------------------------------------- overrides


@dataclass(frozen=True)
class Override:
    """`a.b=value` of the command line."""

    text: str
    location: Location
    value: Any


def split(arguments: list[str]) -> tuple[list[Path], list[Override]]:
    """Files and overrides of a command line, each in its order."""
    files: list[Path] = []
    overrides: list[Override] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            hint = f"overrides have no dashes: {argument.lstrip('-')}" if equals else "the options are --help and --dry-run"
            raise ConfigError(f"{argument}: unknown option; {hint}")
        if equals:
            if not all(key.split(".")):
                raise ConfigError(f"override {argument}: {key or 'the name'} is not a dotted path; write section.field=value")
            try:
                parsed = yaml.load(value, _Loader)
            except yaml.YAMLError:
                raise ConfigError(f"override {argument}: {value} is not valid YAML; put it in quotes: {key}='\"...\"'") from None
            overrides.append(Override(argument, tuple(key.split(".")), parsed))
        elif argument.endswith((".yaml", ".yml")):
            files.append(Path(argument))
        else:
            raise ConfigError(f"{argument}: neither a YAML file (*.yaml) nor an override (section.field=value)")
    return files, overrides


def merge(old: Any, new: Any) -> Any:
    """`new` over `old`; where both are mappings, key by key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: merge(old[key], value) if key in old else value for key, value in new.items()}}
    return new


def apply(tree: dict[str, Any], override: Override, sections: set[Location]) -> dict[str, Any]:
    """The tree with one override; a whole mapping of named things is replaced, a section is merged."""
    if isinstance(override.value, dict) and override.location not in sections:
        tree = merge(tree, _nest(override.location, None))
    return merge(tree, _nest(override.location, override.value))


def _nest(location: Location, value: Any) -> dict[str, Any]:
    for key in reversed(location):
        value = {key: value}
    return value


def show(value: Any) -> str:
    """A value as it would stand in YAML, cut to a line."""
    value = str(value) if isinstance(value, Path) else value
    try:
        text = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
