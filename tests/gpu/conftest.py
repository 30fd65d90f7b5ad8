"""The model of the GPU tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from minigpt_ray.models import build_causal, export
    from minigpt_ray.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["hello"], 260)
    directory = tmp_path_factory.mktemp("nano")
    export(build_causal("nano", tokenizer, seed=0), tokenizer, directory)
    return directory
