"""Where a model is: a stage of the run, a directory, a hub id. Imports no torch, so that a missing one is refused at once."""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

VALIDATION = "validation.json"
"""In a model directory: what the stage that made it measured on held-out data at its end, by the names of docs/metrics.md."""


class ExportError(OSError):
    """A finished model could not be written or copied: one sentence with the reason, the place and the remedy."""


@contextmanager
def written_whole(directory: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `directory`, and of what stood there, once all is written. Raises ExportError."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ExportError(f"{reason} while writing the model {directory}; make room, and go on with checkpoint.resume=auto") from error


def resolve_model(init_from: str, run_dir: Path) -> str:
    """A stage of the run, a local directory or a hub id -> what `from_pretrained` takes.

    Raises FileNotFoundError when it looks like a path and holds no model, or one whose weights are pickled.
    """
    stage = run_dir / init_from / "model"
    if (stage / "config.json").is_file():
        return str(stage)
    local = Path(init_from)
    if (local / "config.json").is_file():
        if any(local.glob("*.bin")) and not any(local.glob("*.safetensors")):
            raise FileNotFoundError(
                f"init_from={init_from!r} holds weights in pickled files alone, which can run code when they are read; "
                "load them where you trust them and write them again with save_pretrained, as safetensors"
            )
        return str(local.absolute())
    if is_path(init_from) or "/" not in init_from:
        raise FileNotFoundError(
            f"init_from={init_from!r} is neither a finished stage of this run ({stage} has no config.json) nor a model directory; run that stage first"
        )
    return init_from


def is_path(name: str) -> bool:
    """Whether a name can only be that of a directory: one on the hub has at most one slash."""
    return Path(name).is_absolute() or name.startswith(".") or name.count("/") > 1


def config_json(path: str) -> Path:
    """The config.json of a model directory or hub id."""
    from huggingface_hub import hf_hub_download

    return Path(path) / "config.json" if Path(path).is_dir() else Path(hf_hub_download(path, "config.json"))


def check_context(models: Mapping[str, str], prompts: Mapping[str, int], responses: Mapping[str, int]) -> None:
    """Raise ValueError where a model cannot read the longest prompt and the longest response together; one whose config.json names no limit has none.

    models: directory or hub id by what to call it. prompts, responses: tokens by the section, or field, of the configuration that they come from.
    """
    (section, prompt), (field, response) = (max(lengths.items(), key=itemgetter(1)) for lengths in (prompts, responses))
    for name, path in models.items():
        most = json.loads(config_json(path).read_text(encoding="utf-8")).get("max_position_embeddings", math.inf)
        if prompt + response > most:
            raise ValueError(
                f"{name}: the model {path} reads {most} tokens, but the longest prompt has {prompt} and {field}={response} come after it; "
                f"lower {field}, or {section}.max_prompt_tokens, by which longer prompts are dropped or cut, or take a model that reads more"
            )


def same_but_for_weights(one: str, other: str) -> bool:
    """Whether an engine that was built from one model directory computes with another once it has loaded its weights: names and shapes, configuration and tokenizer are the same."""
    known = all((Path(path) / name).is_file() for path in (one, other) for name in ("config.json", "tokenizer.json", "tokenizer_config.json"))
    return one == other or (known and _all_but_weights(Path(one)) == _all_but_weights(Path(other)))


def _all_but_weights(directory: Path) -> tuple[Any, ...]:
    config, special = (json.loads((directory / name).read_text(encoding="utf-8")) for name in ("config.json", "tokenizer_config.json"))
    shapes: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # it is no mapping
    files = [directory / name for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json")]
    tokenizer = *(file.read_bytes() if file.is_file() else b"" for file in files), special.get("eos_token"), special.get("chat_template")
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}, shapes, tokenizer
