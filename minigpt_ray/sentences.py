"""What pydantic finds wrong with a configuration, as sentences: where, what was found, what is needed, who set it."""

import difflib
import re
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from minigpt_ray.schema import bare_type, choices_of, field_paths, follow, origin_of, section_of, type_name
from minigpt_ray.settings import Location, Origins, show


def sentence(root: type[BaseModel], error: ErrorDetails, origins: Origins) -> str:
    """One sentence for one finding of pydantic: where, what was found, what is needed, who set it."""
    location, annotation = follow(root, error["loc"])
    path, kind, found = ".".join(location), error["type"], error["input"]
    if kind == "extra_forbidden":
        parent = section_of(follow(root, error["loc"][:-1])[1])
        return f"{path}: unknown field{_suggestion(root, parent, location)}{_from(location, origins)}"
    if kind == "missing" and not isinstance(error["loc"][-1], int):
        return f"{path}: is missing and has no default; {_need(annotation)} is needed{_from(location, origins)}"
    if kind == "union_tag_not_found":
        return f"{path}.kind: is missing; one of {', '.join(_kinds(annotation))} is needed{_from(location, origins) or _from_below(location, origins)}"
    if kind == "union_tag_invalid":
        return f"{path}.kind={show(found.get('kind'))}: unknown; one of {', '.join(_kinds(annotation))} is needed{_from((*location, 'kind'), origins)}"
    if kind == "value_error":
        message = error["msg"].removeprefix("Value error, ")
        return f"{path + ': ' if path else ''}{message}{_from_mentioned(location, message, origins)}"
    if section_of(annotation) is not None or choices_of(annotation):
        return f"{path}={show(found)}: {path} is a section; set its fields, as in {path}.{_first_field(annotation)}=...{_from(location, origins)}"
    if isinstance(found, dict) and origin_of(annotation) is not dict:
        return f"{path}: is a single value ({_need(annotation)}), but fields below it are set: {show(found)}{_from_below(location, origins)}"
    return f"{path}={show(found)}: {_need(annotation) if annotation is not None else 'another value'} is needed ({_message(error)}){_from(location, origins)}"


def _message(error: ErrorDetails) -> str:
    text = error["msg"]
    hint = "; put it in quotes" if error["type"] == "string_type" and isinstance(error["input"], int | float) else ""
    return text[0].lower() + text[1:] + hint


def _need(annotation: Any) -> str:
    name = type_name(annotation)
    return f"one of {name.replace(' | ', ', ')}" if get_origin(bare_type(annotation)) is Literal else f"{'an' if name[0] in 'aeio' else 'a'} {name}"


def _kinds(annotation: Any) -> list[str]:
    return [kind for choice in choices_of(annotation) for kind in get_args(choice.model_fields["kind"].annotation)]


def _first_field(annotation: Any) -> str:
    section = section_of(annotation)
    return "kind" if section is None else next(iter(section.model_fields))


def _suggestion(root: type[BaseModel], parent: type[BaseModel] | None, location: Location) -> str:
    """`, did you mean ...?`: a near name in the same section, else the same or a near name anywhere in the tree."""
    name, at = location[-1], location[:-1]
    if parent is None:
        return ""
    paths = list(field_paths(root))
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
