"""Fingerprints of what a run begins from: the same for the same content, wherever and whenever it was written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minigpt_ray.inputs import PIECE_BYTES, PIECES, fingerprint_of_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model directory with weights of three times what is read of them."""
    directory = tmp_path / "model"
    directory.mkdir()
    save_file({"weights": np.random.default_rng(0).standard_normal(3 * PIECES * PIECE_BYTES // 8)}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def test_neither_place_nor_date_nor_other_files_count(model: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(model, tmp_path / "elsewhere", copy_function=shutil.copy)
    (copied / "README.md").write_text("A model.")
    assert fingerprint_of_model(copied) == fingerprint_of_model(model)


def test_a_weight_that_is_moved_everywhere_a_size_a_name_and_a_small_file_count(model: Path) -> None:
    found = [fingerprint_of_model(model)]
    weights = model / "model.safetensors"
    save_file({"weights": np.random.default_rng(1).standard_normal(3 * PIECES * PIECE_BYTES // 8)}, weights)
    found.append(fingerprint_of_model(model))
    with weights.open("r+b") as file:  # the last byte
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    found.append(fingerprint_of_model(model))
    weights.write_bytes(weights.read_bytes() + b"\0")
    found.append(fingerprint_of_model(model))
    weights.rename(model / "model-00001-of-00001.safetensors")
    found.append(fingerprint_of_model(model))
    (model / "config.json").write_text('{"rope_theta": 1}')
    found.append(fingerprint_of_model(model))
    assert len(set(found)) == len(found)


def test_every_byte_of_small_weights_counts(model: Path) -> None:
    weights, content = model / "model.safetensors", np.zeros(PIECES * PIECE_BYTES, np.uint8)
    found = set()
    for place in np.linspace(0, len(content) - 1, 20).astype(int):
        content[place] ^= 1
        weights.write_bytes(content.tobytes())
        found.add(fingerprint_of_model(model))
    assert len(found) == 20
