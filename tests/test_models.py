import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from minigpt_ray.model_directory import resolve_model
from minigpt_ray.models import TokenLogprobs, TokenValues, as_saved, build_causal, export, load_causal, load_scalar
from minigpt_ray.tokenizer import load_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["hello"], 260)


@pytest.fixture(scope="module", params=["nano", "llama-nano", "qwen3-moe-nano"])
def model(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return build_causal(request.param, tokenizer, seed=0).eval()


def rows(*lengths: int) -> tuple[Tensor, Tensor]:
    """Random rows padded on the right, and a mask of the tokens from column 2 on."""
    torch.manual_seed(1)
    width = max(lengths)
    ids = torch.randint(260, (len(lengths), width))
    inside = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids * inside, inside & (torch.arange(width) >= 2)


def test_weights_that_are_pickled_are_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = build_causal("nano", tokenizer, seed=0)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="holds weights in pickled files alone, which can run code when they are read"):
        resolve_model(str(tmp_path), tmp_path / "run")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load_causal(str(tmp_path), "float32")


@pytest.mark.parametrize("load", [lambda path: load_causal(path, "float32"), lambda path: load_scalar(path, "float32", seed=0), load_tokenizer])
def test_code_that_comes_with_a_model_is_not_run(load: Callable[[str], object], tmp_path: Path) -> None:
    classes = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoModelForSequenceClassification": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "own", "auto_map": classes}))
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy_are_those_of_the_logits_one_position_before(model: PreTrainedModel, temperature: float) -> None:
    ids, mask = rows(9, 5)
    logprobs, entropy = TokenLogprobs(model)(ids, mask, temperature)
    logits = model(ids, use_cache=False).logits[:, :-1] / temperature
    expected = -F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    assert torch.allclose(logprobs[:, 1:], expected.where(mask[:, 1:], 0), atol=1e-5)
    assert torch.allclose(entropy[:, 1:], torch.distributions.Categorical(logits=logits).entropy().where(mask[:, 1:], 0), atol=1e-5)
    assert not logprobs[:, 0].any()


def test_padding_on_the_right_changes_nothing(model: PreTrainedModel) -> None:
    ids, mask = rows(9, 5)
    together = TokenLogprobs(model)(ids, mask)[0][1, :5]
    alone = TokenLogprobs(model)(ids[1:, :5], mask[1:, :5])[0][0]
    assert torch.allclose(together, alone, atol=1e-5)


def test_gradient_is_that_of_cross_entropy(model: PreTrainedModel) -> None:
    ids, mask = rows(7)
    embedding = model.get_input_embeddings().weight
    (ours,) = torch.autograd.grad(TokenLogprobs(model)(ids, mask)[0].sum(), embedding)
    losses = F.cross_entropy(model(ids, use_cache=False).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    (theirs,) = torch.autograd.grad(-losses[mask[:, 1:]].sum(), embedding)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_export_loads_as_it_is_and_says_the_same(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids, _ = rows(8)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert load_tokenizer(tmp_path).chat_template == tokenizer.chat_template


def test_published_weights_have_the_names_and_values_of_the_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    published = dict(as_saved(model, model.named_parameters()))
    assert published.keys() == written.keys()
    assert all(torch.equal(published[name], written[name]) for name in written)


def test_a_scalar_head_on_a_language_model_keeps_the_trunk_and_is_seeded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path)
    critic, again, other = (load_scalar(str(tmp_path), "float32", seed) for seed in (0, 0, 1))
    assert torch.equal(critic.get_input_embeddings().weight, model.get_input_embeddings().weight)
    ids, _ = rows(8)
    values = TokenValues(critic)(ids)
    assert values.shape == (1, 9) and torch.equal(values, TokenValues(again)(ids)) and not torch.equal(values, TokenValues(other)(ids))
    assert not TokenValues(load_scalar(str(tmp_path), "float32", seed=None))(ids).any()


def test_a_reward_model_keeps_its_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path / "policy")
    trained = load_scalar(str(tmp_path / "policy"), "float32", seed=3)
    export(trained, tokenizer, tmp_path / "reward")
    assert torch.equal(load_scalar(str(tmp_path / "reward"), "float32", seed=9).score.weight, trained.score.weight)


def test_a_stage_of_the_run_comes_before_a_directory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path / "sft" / "model")
    assert resolve_model("sft", tmp_path) == str(tmp_path / "sft" / "model")
    assert resolve_model(str(tmp_path / "sft" / "model"), tmp_path / "elsewhere") == str(tmp_path / "sft" / "model")
    assert resolve_model("someone/model", tmp_path) == "someone/model"
    with pytest.raises(FileNotFoundError, match=r"init_from='dpo' is neither a finished stage of this run .* nor a model directory"):
        resolve_model("dpo", tmp_path)


def test_an_unknown_preset_is_refused_with_the_known_ones(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"preset='huge' is unknown; choose one of nano"):
        build_causal("huge", tokenizer, seed=0)


def test_load_causal_takes_the_dtype(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    export(model, tokenizer, tmp_path)
    assert load_causal(str(tmp_path), "bfloat16").dtype == torch.bfloat16
