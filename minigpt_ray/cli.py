"""The command line that all jobs share: YAML files, dotted overrides, --help, --dry-run.

    config = load_config(PPOConfig)        # python -m jobs.ppo configs/ppo.yaml mine.yaml policy.optimizer.lr=1e-6

Files are merged left to right, mapping by mapping; overrides come last, wherever they stand. A section that is given in
part keeps the rest of the default on its field. Named things (`rewards`, `tasks`) are taken as given: in a file they
replace the default ones, `rewards.verifier.weight=2` edits one, `rewards.verifier=null` removes one.

A mistake ends the process with code 2 and one sentence on stderr that names the dotted path and the file and line, or
the override, that it came from. YAML is read by the 1.2 rules: `1e-6` is a number, `on`, `no`, `1:30` and dates are text.
"""

import difflib
import functools
import json
import operator
import re
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from minigpt_ray.config import EvaluateConfig, GeneratePreferencesConfig, PPOConfig
from minigpt_ray.versions import versions

C = TypeVar("C", bound=BaseModel)
Location = tuple[str, ...]
"""Where a value stands in the tree: ("policy", "optimizer", "lr")."""
Origins = dict[Location, str]
"""Which file and line, or which override, set a value."""


class ConfigError(ValueError):
    """What is wrong with a configuration: one sentence a line."""


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
    """What a user can mend ends the process with code 2 and its sentence on stderr, not with a traceback. `kinds` are such sentences."""
    try:
        yield
    except kinds as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None


def read_config(root: type[C], arguments: list[str]) -> C:
    """As load_config, for files and overrides only; raises ConfigError."""
    files, overrides = _split(arguments)
    origins: Origins = {}
    tree: dict[str, Any] = {}
    for path in files:
        content, lines = _read_file(path)
        origins |= lines
        tree = _merge(tree, content)
    tree = _with_defaults(root, tree)
    for override in overrides:
        origins[override.location] = f"override {override.text}"
        tree = _apply(tree, override, _sections(root))
    try:
        return root.model_validate(_without_removed(root, tree))
    except ValidationError as failure:
        raise ConfigError("\n".join(_sentence(root, error, origins) for error in failure.errors())) from None


def given(arguments: list[str]) -> set[Location]:
    """Locations that the files and overrides of a command line set; raises ConfigError."""
    files, overrides = _split(arguments)
    origins = {location for path in files for location in _read_file(path)[1]}
    return origins | {location for override in overrides for location in (override.location, *_below(override.location, override.value))}


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
    return yaml.dump(resolved(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def write_resolved(config: BaseModel, directory: Path) -> Path:
    """Write the resolved tree to `directory`/config.yaml, and beside it versions.json: the software that reads it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    (directory / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- reading YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with the scalars of YAML 1.2."""


class _Dumper(yaml.SafeDumper):
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
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


def _read_file(path: Path) -> tuple[dict[str, Any], Origins]:
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
        raise ConfigError(f"{path}: holds {_show(content)}, but a mapping of field names to values is needed")
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


def _below(at: Location, value: Any) -> Iterator[Location]:
    """Locations of the keys within a value."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield (*at, str(key))
            yield from _below((*at, str(key)), inner)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _plain(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(_one_line(part) for part in (error.context, error.problem) if part)


# ------------------------------------------------------------------------------------------ files and overrides


@dataclass(frozen=True)
class _Override:
    """`a.b=value` of the command line."""

    text: str
    location: Location
    value: Any


def _split(arguments: list[str]) -> tuple[list[Path], list[_Override]]:
    """Files and overrides of a command line, each in its order."""
    files: list[Path] = []
    overrides: list[_Override] = []
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
            overrides.append(_Override(argument, tuple(key.split(".")), parsed))
        elif argument.endswith((".yaml", ".yml")):
            files.append(Path(argument))
        else:
            raise ConfigError(f"{argument}: neither a YAML file (*.yaml) nor an override (section.field=value)")
    return files, overrides


def _merge(old: Any, new: Any) -> Any:
    """`new` over `old`; where both are mappings, key by key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return {**old, **{key: _merge(old[key], value) if key in old else value for key, value in new.items()}}
    return new


def _apply(tree: dict[str, Any], override: _Override, sections: set[Location]) -> dict[str, Any]:
    """The tree with one override; a whole mapping of named things is replaced, a section is merged."""
    if isinstance(override.value, dict) and override.location not in sections:
        tree = _merge(tree, _nest(override.location, None))
    return _merge(tree, _nest(override.location, override.value))


def _nest(location: Location, value: Any) -> dict[str, Any]:
    for key in reversed(location):
        value = {key: value}
    return value


def _with_defaults(model: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with the defaults of sections below it, so that `optimizer.lr` alone keeps the field's own schedule."""
    result = dict(given)
    for name, field in model.model_fields.items():
        section, default = _section(field.annotation), _default(field)
        if isinstance(default, BaseModel):
            result[name] = _merge(default.model_dump(), given.get(name, {}))
        elif section is not None and isinstance(given.get(name), Mapping):
            result[name] = _with_defaults(section, given[name])
        elif isinstance(default, dict) and name not in given:
            result[name] = {key: item.model_dump() if isinstance(item, BaseModel) else item for key, item in default.items()}
    return result


def _without_removed(model: type[BaseModel], tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without those named things that were set to null."""
    result = dict(tree)
    for name, field in model.model_fields.items():
        value, section = tree.get(name), _section(field.annotation)
        if isinstance(value, dict) and section is not None:
            result[name] = _without_removed(section, value)
        elif isinstance(value, dict) and _origin(field.annotation) is dict:
            result[name] = {key: item for key, item in value.items() if item is not None}
    return result


# --------------------------------------------------------------------------------------------- the tree's schema


def _bare(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        if len(members) == 1:
            return _bare(members[0])
    return annotation


def _origin(annotation: Any) -> Any:
    return get_origin(_bare(annotation))


def _section(annotation: Any) -> type[BaseModel] | None:
    """The config class of a section; None for a value, a mapping or a choice of classes."""
    bare = _bare(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def _choices(annotation: Any) -> list[type[BaseModel]]:
    """The config classes among which `kind` chooses."""
    members = get_args(_bare(annotation)) if _origin(annotation) in (Union, types.UnionType) else ()
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]


def _default(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def _sections(model: type[BaseModel], at: Location = ()) -> set[Location]:
    found: set[Location] = set()
    for name, field in model.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            found |= {(*at, name)} | _sections(section, (*at, name))
    return found


def _paths(model: type[BaseModel], at: Location = ()) -> Iterator[Location]:
    """Location of every field in the tree, sections included."""
    for name, field in model.model_fields.items():
        yield (*at, name)
        section = _section(field.annotation)
        if section is not None:
            yield from _paths(section, (*at, name))


def _follow(root: type[BaseModel], reported: tuple[int | str, ...]) -> tuple[Location, Any]:
    """The location as users write it, and the annotation there, of a place that pydantic reports.

    Pydantic adds the chosen `kind` of a union, which is not in the tree, and the positions in lists.
    """
    location: Location = ()
    annotation: Any = root
    for part in reported:
        section, choices = _section(annotation), _choices(annotation)
        if section is not None:
            annotation = section.model_fields[str(part)].annotation if part in section.model_fields else None
            location = (*location, str(part))
        elif choices:
            annotation = next((c for c in choices if part in get_args(c.model_fields["kind"].annotation)), None)
        elif _origin(annotation) is dict:
            annotation = get_args(_bare(annotation))[1]
            location = (*location, str(part))
        elif isinstance(part, int):
            location = (*location, str(part))
    return location, annotation


# --------------------------------------------------------------------------------------------- errors as sentences


def _sentence(root: type[BaseModel], error: ErrorDetails, origins: Origins) -> str:
    """One sentence for one finding of pydantic: where, what was found, what is needed, who set it."""
    location, annotation = _follow(root, error["loc"])
    path, kind, found = ".".join(location), error["type"], error["input"]
    if kind == "extra_forbidden":
        parent = _section(_follow(root, error["loc"][:-1])[1])
        return f"{path}: unknown field{_suggestion(root, parent, location)}{_from(location, origins)}"
    if kind == "missing" and not isinstance(error["loc"][-1], int):
        return f"{path}: is missing and has no default; {_need(annotation)} is needed{_from(location, origins)}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: is missing; one of {', '.join(_kinds(annotation))} is needed{_from(location, origins) or _from_below(location, origins)}"
    if kind == "union_tag_invalid":
        return f"{path}.kind={_show(found.get('kind'))}: unknown; one of {', '.join(_kinds(annotation))} is needed{_from((*location, 'kind'), origins)}"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{path + ': ' if path else ''}{message}{_from_mentioned(location, message, origins)}"
    if _section(annotation) is not None or _choices(annotation):
        return f"{path}={_show(found)}: {path} is a section; set its fields, as in {path}.{_first_field(annotation)}=...{_from(location, origins)}"
    if isinstance(found, dict) and _origin(annotation) is not dict:
        return f"{path}: is a single value ({_need(annotation)}), but fields below it are set: {_show(found)}{_from_below(location, origins)}"
    return f"{path}={_show(found)}: {_need(annotation) if annotation is not None else 'another value'} is needed ({_message(error)}){_from(location, origins)}"


def _message(error: ErrorDetails) -> str:
    text = error["msg"]
    hint = "; put it in quotes" if error["type"] == "string_type" and isinstance(error["input"], int | float) else ""
    return text[0].lower() + text[1:] + hint


def _need(annotation: Any) -> str:
    name = type_name(annotation)
    return f"one of {name.replace(' | ', ', ')}" if get_origin(_bare(annotation)) is Literal else f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _kinds(annotation: Any) -> list[str]:
    return [kind for choice in _choices(annotation) for kind in get_args(choice.model_fields["kind"].annotation)]


def _first_field(annotation: Any) -> str:
    section = _section(annotation)
    return "kind" if section is None else next(iter(section.model_fields))


def _suggestion(root: type[BaseModel], parent: type[BaseModel] | None, location: Location) -> str:
    """`, did you mean ...?`: a near name in the same section, else the same or a near name anywhere in the tree."""
    name, at = location[-1], location[:-1]
    if parent is None:
        return ""
    paths = list(_paths(root))
    near = [".".join((*at, n)) for n in difflib.get_close_matches(name, list(parent.model_fields), n=1, cutoff=0.7)]
    near = near or [".".join(p) for p in paths if p[-1] == name][:3]
    near = near or difflib.get_close_matches(".".join(location), [".".join(p) for p in paths], n=1, cutoff=0.7)
    if near:
        return f", did you mean {' or '.join(near)}?"
    return f"; {'.'.join(at) or 'the root'} has {', '.join(parent.model_fields)}"


def _from(location: Location, origins: Origins) -> str:
    """` (file, line)` of the value or of the nearest section above it that somebody set."""
    for length in range(len(location), 0, -1):
        if location[:length] in origins:
            return f" ({origins[location[:length]]})"
    return ""


def _from_below(location: Location, origins: Origins) -> str:
    below = [text for place, text in origins.items() if place[: len(location)] == location]
    return f" ({'; '.join(dict.fromkeys(below))})" if below else ""


def _from_mentioned(at: Location, message: str, origins: Origins) -> str:
    """Origins of the fields that a validator's message mentions as `field=value`."""
    names = re.findall(r"([A-Za-z_][\w.]*)=", message)
    mentioned = {name: (*at, *name.split(".")) for name in names}
    texts = [f"{name}: {origins[place]}" for name, place in mentioned.items() if place in origins]
    return f" ({'; '.join(texts)})" if texts else _from(at, origins)


def _show(value: Any) -> str:
    """A value as it would stand in YAML, cut to a line."""
    value = str(value) if isinstance(value, Path) else value
    try:
        text = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --------------------------------------------------------------------------------------------------------- help


def type_name(annotation: Any, metadata: list[Any] | None = None) -> str:
    """A type as users would say it: `positive int`, `float > 0 and <= 1`, `gae | rloo`, `list of path`."""
    bounds = list(metadata or [])
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            bounds += more
        elif get_origin(annotation) in (Union, types.UnionType) and type(None) in get_args(annotation):
            annotation, optional = functools.reduce(operator.or_, (a for a in get_args(annotation) if a is not type(None))), True
        else:
            break
    text = _bounded(_plain_type(annotation), bounds)
    return f"{text} or null" if optional else text


def _plain_type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(_show(a) for a in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_plain_type(a) for a in arguments))
    if origin is dict:
        return f"mapping of names to {type_name(arguments[1])}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"list of {len(arguments)} {type_name(arguments[0])}"
    if origin in (list, tuple):
        return f"list of {type_name(arguments[0])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", Path: "path", type(None): "null"}.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _bounded(text: str, bounds: list[Any]) -> str:
    signs: list[str] = []
    for bound in bounds:
        inner = bound.metadata if isinstance(bound, FieldInfo) else [bound]
        for b in inner:
            if isinstance(b, Gt):
                signs.append(f"> {b.gt}")
            elif isinstance(b, Ge):
                signs.append(f">= {b.ge}")
            elif isinstance(b, Lt):
                signs.append(f"< {b.lt}")
            elif isinstance(b, Le):
                signs.append(f"<= {b.le}")
    return f"{text} {' and '.join(signs)}" if signs else text


def help_text(root: type[BaseModel]) -> str:
    """Usage, and every field of the tree with its type, default and meaning, section by section."""
    command = (root.__doc__ or "").partition(":")[0]
    lines = [
        (root.__doc__ or "").strip(),
        "",
        f"usage: {command} [FILE.yaml ...] [section.field=value ...] [--dry-run] [--help]",
        "",
        "  FILE.yaml            settings; files are merged left to right",
        "  section.field=value  one setting, after all files; the value is YAML (1e-6, true, [a, b], {a: 1}, null)",
        "  --dry-run            print the resolved settings"
        + (", the placement and the memory it needs" if "placement" in root.model_fields else "")
        + ", and exit",
        "",
    ]
    return "\n".join([*lines, *_help_section(root, (), None, {})]).rstrip()


def _help_section(model: type[BaseModel], at: Location, default: BaseModel | None, told: dict[type[BaseModel], str]) -> Iterator[str]:
    """Lines for the plain fields of a section, then for the sections below it. `told`: where entries of a class were told about already."""
    below: list[Iterator[str]] = []
    for name, field in model.model_fields.items():
        here = (*at, name)
        value = _default(field) if default is None else getattr(default, name)
        section = _section(field.annotation)
        if section is not None:
            inner = value if isinstance(value, BaseModel) else None
            below.append(iter(["", f"[{'.'.join(here)}]  {field.description or ''}".rstrip()]))
            below.append(_help_section(section, here, inner, told))
            continue
        yield f"  {'.'.join(here)}  ({type_name(field.annotation, field.metadata)}{_help_default(value)})"
        if field.description:
            yield f"      {field.description}"
        for entry in _entry_classes(field.annotation):
            place = ".".join((*here, "<name>"))
            if entry in told:
                below.append(iter(["", f"[{place}]  As {told[entry]}: {(entry.__doc__ or '').strip()}"]))
                continue
            told[entry] = place
            below.append(iter(["", f"[{place}]  {(entry.__doc__ or '').strip()}"]))
            below.append(_help_section(entry, (*here, "<name>"), None, told))
    for part in below:
        yield from part


def _entry_classes(annotation: Any) -> list[type[BaseModel]]:
    """The config classes of the entries of a mapping of named things."""
    if _origin(annotation) is not dict:
        return []
    entry = get_args(_bare(annotation))[1]
    section = _section(entry)
    return _choices(entry) if section is None else [section]


def _help_default(value: Any) -> str:
    if value is PydanticUndefined:
        return ", required"
    if isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
        return f", default {', '.join(value)}"
    return f", default {_show(value)}"
