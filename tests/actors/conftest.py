"""Two tiny models with random weights, exported as a stage exports them; a process group of one rank for tests without Ray."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from actors.rank_host import RankHost
from minigpt_ray.models import build_causal, export
from minigpt_ray.tokenizer import train_tokenizer


def _exported(preset: str, directory: Path) -> Path:
    tokenizer = train_tokenizer(["hello"], 260)
    export(build_causal(preset, tokenizer, seed=0), tokenizer, directory)
    return directory


@pytest.fixture(scope="session")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-shaped model with a tied output head."""
    return _exported("nano", tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-shaped model with a tied output head."""
    return _exported("llama-nano", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def _process_group() -> Iterator[dict[str, str]]:
    """Formed once, as a RankHost forms it: DeepSpeed keeps its groups for the life of a process."""
    before = dict(os.environ)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    RankHost(0, 1, device="cpu").join("127.0.0.1", port, hang_after_s=60)
    formed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    _undo(formed, before)
    yield formed
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def alone(_process_group: dict[str, str]) -> Iterator[None]:
    """This process is the one rank of a process group, and its environment says so, as DeepSpeed asks."""
    before = dict(os.environ)
    os.environ.update(_process_group)
    yield
    _undo(_process_group, before)


def _undo(formed: dict[str, str], before: dict[str, str]) -> None:
    """Variables of a process group are as they were before; others, which Ray may have set meanwhile, stay."""
    for name in formed:
        os.environ.pop(name, None)
    os.environ.update({name: before[name] for name in formed if name in before})
