"""--help: every field of a configuration with its type, default and meaning."""

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from minigpt_ray.schema import bare_type, choices_of, default_of, origin_of, section_of, type_name
from minigpt_ray.settings import Location, show


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
        value = default_of(field) if default is None else getattr(default, name)
        section = section_of(field.annotation)
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
    if origin_of(annotation) is not dict:
        return []
    entry = get_args(bare_type(annotation))[1]
    section = section_of(entry)
    return choices_of(entry) if section is None else [section]


def _help_default(value: Any) -> str:
    if value is PydanticUndefined:
        return ", required"
    if isinstance(value, dict) and any(isinstance(v, BaseModel) for v in value.values()):
        return f", default {', '.join(value)}"
    return f", default {show(value)}"
