"""What a tree of configuration classes is made of: its sections, its fields, and their types as users would say them."""

import functools
import operator
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from minigpt_ray.settings import Location, show


def bare_type(annotation: Any) -> Any:
    """The annotation without Annotated and without `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        if len(members) == 1:
            return bare_type(members[0])
    return annotation


def origin_of(annotation: Any) -> Any:
    return get_origin(bare_type(annotation))


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The config class of a section; None for a value, a mapping or a choice of classes."""
    bare = bare_type(annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def choices_of(annotation: Any) -> list[type[BaseModel]]:
    """The config classes among which `kind` chooses."""
    members = get_args(bare_type(annotation)) if origin_of(annotation) in (Union, types.UnionType) else ()
    return [m for m in members if isinstance(m, type) and issubclass(m, BaseModel)]


def default_of(field: FieldInfo) -> Any:
    return field.get_default(call_default_factory=True, validated_data={})


def sections(model: type[BaseModel], at: Location = ()) -> set[Location]:
    found: set[Location] = set()
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        if section is not None:
            found |= {(*at, name)} | sections(section, (*at, name))
    return found


def field_paths(model: type[BaseModel], at: Location = ()) -> Iterator[Location]:
    """Location of every field in the tree, sections included."""
    for name, field in model.model_fields.items():
        yield (*at, name)
        section = section_of(field.annotation)
        if section is not None:
            yield from field_paths(section, (*at, name))


def follow(root: type[BaseModel], reported: tuple[int | str, ...]) -> tuple[Location, Any]:
    """The location as users write it, and the annotation there, of a place that pydantic reports.

    Pydantic adds the chosen `kind` of a union, which is not in the tree, and the positions in lists.
    """
    location: Location = ()
    annotation: Any = root
    for part in reported:
        section, choices = section_of(annotation), choices_of(annotation)
        if section is not None:
            annotation = section.model_fields[str(part)].annotation if part in section.model_fields else None
            location = (*location, str(part))
        elif choices:
            annotation = next((c for c in choices if part in get_args(c.model_fields["kind"].annotation)), None)
        elif origin_of(annotation) is dict:
            annotation = get_args(bare_type(annotation))[1]
            location = (*location, str(part))
        elif isinstance(part, int):
            location = (*location, str(part))
    return location, annotation


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
        return " | ".join(show(a) for a in arguments)
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
    if isinstance(annotation, type):
        return {str: "text", Path: "path", type(None): "null"}.get(annotation, annotation.__name__)
    return str(annotation)


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
