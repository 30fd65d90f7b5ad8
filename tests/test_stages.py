"""Only what the assistant says is learnt, packed examples do not see each other, micro-batches add up."""

import numpy as np
import pytest
import torch

from minigpt_ray.config import SFTConfig
from minigpt_ray.data.packing import pack
from minigpt_ray.data.rows import DataError, Row
from minigpt_ray.models import TokenLogprobs, build_causal
from minigpt_ray.stages import STAGES, Batch, encode_demonstration, next_token_loss, with_perplexity
from minigpt_ray.tokenizer import END, train_tokenizer

CPU = torch.device("cpu")
SFT = SFTConfig()
PAIRS = [("1+1=", "2"), ("What is the capital of France?", "Paris, of course."), ("ab", "ba"), ("repeat abc", "abc abc abc")]


def row(question, answer):
    return Row(({"role": "user", "content": question}, {"role": "assistant", "content": answer}), "test", None, "test.jsonl:1")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a"], 260)


@pytest.fixture(scope="module")
def examples(tokenizer):
    return [encode_demonstration(tokenizer, row(*pair)) for pair in PAIRS]


@pytest.fixture(scope="module", params=["nano", "llama-nano"])
def model(request, tokenizer):
    return TokenLogprobs(build_causal(request.param, tokenizer, seed=0))


def test_the_assistants_words_and_its_end_token_are_learnt_and_nothing_else(tokenizer, examples):
    for (_, answer), example in zip(PAIRS, examples, strict=True):
        assert tokenizer.decode(example.token_ids[example.loss_mask]) == answer + END


def test_a_row_without_an_answer_is_refused_with_its_place(tokenizer):
    with pytest.raises(DataError, match=r"test\.jsonl:1: the row ends with the user, so there is no answer to learn"):
        encode_demonstration(tokenizer, Row(({"role": "user", "content": "hello"},), "test", None, "test.jsonl:1"))


def test_packed_logprobs_are_those_of_each_example_alone(model, examples):
    windows = pack(examples, 160)
    assert len(windows) < len(examples)
    batch = Batch.of(windows, CPU)
    packed = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0][batch.loss_mask]
    alone = [model(torch.from_numpy(ids)[None], torch.from_numpy(mask)[None])[0][0][torch.from_numpy(mask)] for ids, mask in examples]
    torch.testing.assert_close(packed.sort().values, torch.cat(alone).sort().values, atol=1e-5, rtol=0)


def test_without_position_ids_packed_examples_would_see_each_other(model, examples):
    batch = Batch.of(pack(examples, 160), CPU)
    apart, together = (model(batch.token_ids, batch.loss_mask, position_ids=p)[0] for p in (batch.position_ids, None))
    assert (apart - together).abs().max() > 1e-3


def test_micro_batches_add_up_to_the_large_batch(model, examples):
    batch = Batch.of(pack(examples, 80), CPU)
    num_tokens = int(batch.loss_mask.sum())
    assert len(batch.split(1)) > 1 and len({int(part.loss_mask.sum()) for part in batch.split(1)}) > 1  # a mean of means would differ

    def gradient(parts):
        model.zero_grad()
        for part in parts:
            next_token_loss(model, part, num_tokens, SFT)[0].backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(gradient(batch.split(1)), gradient([batch]), atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_learnt_tokens(model, examples):
    batch = Batch.of(pack(examples, 80), CPU)
    loss, stats = next_token_loss(model, batch, int(batch.loss_mask.sum()), SFT)
    logprobs = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0]
    torch.testing.assert_close(loss, -logprobs[batch.loss_mask].mean())
    assert stats["loss"] == loss.detach()


def test_activation_checkpointing_changes_no_gradient(tokenizer, examples):
    batch = Batch.of(pack(examples, 160), CPU)
    gradients = []
    for recompute in (False, True):
        model = TokenLogprobs(build_causal("nano", tokenizer, seed=0)).train()
        if recompute:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        next_token_loss(model, batch, 10, SFT)[0].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_perplexity():
    assert with_perplexity({"loss": 0.0}) == {"loss": 0.0, "perplexity": 1.0}
    assert with_perplexity({"loss": 1e6})["perplexity"] == np.inf


def test_a_stage_is_found_under_its_name():
    assert all(stage.name == name for name, stage in STAGES.items())
