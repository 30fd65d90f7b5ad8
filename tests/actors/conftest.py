"""Two tiny models with random weights, exported as a stage exports them."""

from pathlib import Path

import pytest

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
