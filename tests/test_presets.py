import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from minigpt_ray.presets import ARCHITECTURES, PRESETS, ModelShape

# Head sizes that vLLM's attention on CPU supports.
VLLM_CPU_HEAD_SIZES = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}

NOMINAL_MILLIONS = {"qwen3-moe-nano": 0.144, "nano": 0.095, "0.4m": 0.386, "1m": 1.25, "2m": 1.8, "3m": 3.2, "26m": 26, "104m": 104, "0.5b": 510}


def hf_config(shape: ModelShape, vocab_size: int) -> PreTrainedConfig:
    return AutoConfig.for_model(**{**shape.to_hf(), "vocab_size": vocab_size}, bos_token_id=None, eos_token_id=0, pad_token_id=0)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vocab_size", [320, 6400])
def test_num_parameters_is_that_of_the_transformers_model(name: str, vocab_size: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config(PRESETS[name], vocab_size))
    assert PRESETS[name].num_parameters(vocab_size) == model.num_parameters()
    assert type(model).__name__ == PRESETS[name].architecture


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_num_parameters_knows_every_architecture_and_an_untied_head(architecture: str, tie_embeddings: bool) -> None:
    shape = ModelShape(architecture, 64, 96, 3, 4, 2, 16, 128, tie_embeddings, vocab_size=50)
    with torch.device("meta"):
        config = hf_config(shape, 50)
        language_model = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        critic = AutoModelForSequenceClassification.from_config(config)
    assert shape.num_parameters() == language_model.num_parameters()
    assert shape.num_trunk_parameters() + shape.hidden_size == critic.num_parameters()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_size_that_its_name_says(name: str) -> None:
    size = name if name in NOMINAL_MILLIONS else name.rsplit("-", 1)[-1]
    vocab_size = 320 if size in ("qwen3-moe-nano", "nano", "0.4m", "1m", "2m", "3m") else 6400
    assert PRESETS[name].num_parameters(vocab_size) / 1e6 == pytest.approx(NOMINAL_MILLIONS[size], rel=0.02)


@pytest.mark.parametrize("name", PRESETS)
def test_vllm_on_cpu_supports_the_head_size(name: str) -> None:
    assert PRESETS[name].head_dim in VLLM_CPU_HEAD_SIZES
    assert PRESETS[name].num_heads % PRESETS[name].num_kv_heads == 0


@pytest.mark.parametrize("name", PRESETS)
def test_shape_survives_a_saved_config_json(name: str, tmp_path: Path) -> None:
    hf_config(PRESETS[name], 320).save_pretrained(tmp_path)
    shape = ModelShape.from_config_json(tmp_path / "config.json")
    assert shape.num_parameters() == PRESETS[name].num_parameters(320)
    assert {**shape.to_hf(), "vocab_size": None} == {**PRESETS[name].to_hf(), "vocab_size": None}


def test_a_token_passes_two_of_four_experts_and_the_router() -> None:
    """Hidden 64, 2 heads and 1 key head of 32, experts 64 wide, 2 layers."""
    shape = PRESETS["qwen3-moe-nano"]
    attention, expert, router = 64 * 32 * 6, 3 * 64 * 64, 64 * 4
    assert shape.matrix_parameters == 2 * (attention + router + 2 * expert)
    assert shape.num_parameters(320) - shape.matrix_parameters == 320 * 64 + 64 + 2 * (2 * expert + 2 * 64 + 2 * 32)


def test_experts_in_some_layers_only_are_refused_with_their_file(tmp_path: Path) -> None:
    config = hf_config(PRESETS["qwen3-moe-nano"], 320)
    config.mlp_only_layers = [0]
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json: some layers have experts and others none"):
        ModelShape.from_config_json(tmp_path / "config.json")


def test_fields_that_older_files_leave_out_follow_from_the_others(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    old = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    path.write_text(json.dumps(old | {"max_position_embeddings": 32, "vocab_size": 10, "rope_theta": 5e5}))
    shape = ModelShape.from_config_json(path)
    assert (shape.num_kv_heads, shape.head_dim, shape.tie_embeddings, shape.rope_theta) == (4, 16, False, 5e5)


def test_an_unsupported_model_type_is_named_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type='gpt2' is not supported; use one of llama"):
        ModelShape.from_config_json(path)


def test_a_preset_without_vocabulary_asks_for_it() -> None:
    with pytest.raises(ValueError, match="pass the tokenizer's"):
        PRESETS["nano"].num_parameters()


def test_presets_import_neither_torch_nor_transformers() -> None:
    code = "import sys, minigpt_ray.presets; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
