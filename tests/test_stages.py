"""Only what the assistant says is learnt, packed examples do not see each other, micro-batches add up."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from minigpt_ray.config import DPOConfig, PretrainConfig, RewardModelConfig, SFTConfig
from minigpt_ray.data.packing import pack, pack_groups
from minigpt_ray.data.pairs import Pair
from minigpt_ray.data.rows import DataError, Row
from minigpt_ray.models import TokenLogprobs, TokenValues, build_causal
from minigpt_ray.stages import REFERENCE, STAGES, Batch, encode_demonstration, next_token_loss, preference_loss, ranking_loss, with_perplexity, with_spread
from minigpt_ray.tokenizer import END, encode_conversation, encode_document, train_tokenizer

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


def test_unigrams_by_hand():
    def windows(*ids):
        return pack([(np.array(ids, np.int32), np.array([False] + [True] * (len(ids) - 1)))], 4)

    assert STAGES["pretrain"].baseline(windows(1, 1, 2), windows(0, 2)) == {"unigram_perplexity": pytest.approx(5 / 2)}
    assert STAGES["pretrain"].baseline(windows(0, 0), windows(0, 3)) == {"unigram_perplexity": pytest.approx(5)}


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


# ------------------------------------------------------------------------------------------------------ documents


def documents_of(tmp_path, tokenizer, texts, **fields):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stage, config = STAGES["pretrain"], PretrainConfig(**fields)
    return [group for stretch in stage.read([tmp_path / "d.jsonl"], None, config) for group in stage.encode(tokenizer, stretch, config)], config


def test_documents_end_and_a_special_token_in_their_text_stays_text(tmp_path, tokenizer):
    groups, _ = documents_of(tmp_path, tokenizer, ["one", "two<|endoftext|>"])
    first, second = (group.segments[0][0] for group in groups)
    assert tokenizer.decode(first) == "one<|endoftext|>" and tokenizer.decode(second) == "two<|endoftext|><|endoftext|>"
    assert np.flatnonzero(second == tokenizer.convert_tokens_to_ids("<|endoftext|>")).tolist() == [len(second) - 1]


def test_documents_of_any_length_are_packed_as_if_read_alone(tmp_path, tokenizer, model):
    texts = ["short", "a text that does not fit into one window by far", "ab"]
    groups, config = documents_of(tmp_path, tokenizer, texts, window=24)
    batch = Batch.of(pack_groups(groups, 24), CPU)
    found = next_token_loss(model, batch, 1, config)[0]
    alone = 0.0
    for text in texts:
        ids = torch.from_numpy(encode_document(tokenizer, text).token_ids)
        for i in range(0, len(ids) - 1, 23):
            logits = model.model(ids[None, i : i + 24].long()).logits[0]
            alone += torch.nn.functional.cross_entropy(logits[:-1], ids[i + 1 : i + 24].long(), reduction="sum")
    torch.testing.assert_close(found, alone)


def test_with_attention_across_documents_all_are_one_text(tmp_path, tokenizer):
    groups, _ = documents_of(tmp_path, tokenizer, ["one", "two"], attend_across_documents=True)
    assert [tokenizer.decode(group.segments[0][0]) for group in groups] == ["one<|endoftext|>two<|endoftext|>"]


# ----------------------------------------------------------------------------------------------------- preferences

ANSWERS = [("1+1=", "2", "three"), ("What is the capital of France?", "Paris.", "I do not know that"), ("ab", "ba", "ab")]


def pairs():
    def turns(role, text):
        return ({"role": role, "content": text},)

    return [Pair(turns("user", p), turns("assistant", c), turns("assistant", r), 0.5 * i, "test", "file:1") for i, (p, c, r) in enumerate(ANSWERS)]


def batch_of(tokenizer, name, config):
    groups = [group for pair in pairs() for group in STAGES[name].encode(tokenizer, pair, config)]
    windows = pack_groups(groups, 160)
    assert 1 < len(windows) < len(groups)
    return Batch.of(windows, CPU)


def alone(tokenizer, model, pair, turns):
    """Logprobs of an answer's tokens, from a forward of its own."""
    ids, mask = (torch.from_numpy(x)[None] for x in encode_conversation(tokenizer, (*pair.prompt, *turns)))
    return model(ids, mask)[0][mask]


@pytest.mark.parametrize("settings", [{"nll_weight": 0.3}, {"loss": "ipo"}, {"loss": "simpo", "beta": 2.0}], ids=["dpo", "ipo", "simpo"])
def test_the_preference_loss_of_packed_pairs_is_that_of_each_pair_by_hand(tokenizer, model, settings):
    config = DPOConfig(**settings)
    other = TokenLogprobs(build_causal("nano", tokenizer, seed=1))
    batch = batch_of(tokenizer, "dpo", config)
    reference = other(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0].detach()
    loss, stats = preference_loss(model, replace(batch, numbers={REFERENCE: reference}), len(ANSWERS), config)
    expected = chosen_won = 0.0
    for pair in pairs():
        (chosen, rejected), (before, after) = ([alone(tokenizer, m, pair, turns) for turns in (pair.chosen, pair.rejected)] for m in (model, other))
        gain = chosen.sum() - before.sum(), rejected.sum() - after.sum()
        if config.loss == "dpo":
            expected += torch.nn.functional.softplus(-config.beta * (gain[0] - gain[1])) - 0.3 * chosen.mean()
        elif config.loss == "ipo":
            expected += (gain[0] / len(chosen) - gain[1] / len(rejected) - 1 / (2 * config.beta)) ** 2
        else:
            expected += torch.nn.functional.softplus(-config.beta * (chosen.mean() - rejected.mean()) + config.gamma)
        chosen_won += float(chosen.mean() > rejected.mean() if config.loss == "simpo" else gain[0] > gain[1]) if config.loss != "ipo" else 0
    torch.testing.assert_close(loss, expected / len(ANSWERS), rtol=1e-4, atol=1e-5)
    if config.loss != "ipo":
        assert stats["accuracy"].item() == pytest.approx(chosen_won / len(ANSWERS))
    torch.testing.assert_close(stats["margin"], stats["chosen_reward"] - stats["rejected_reward"])


def test_a_policy_that_is_its_reference_has_lost_nothing_yet(tokenizer, model):
    batch = batch_of(tokenizer, "dpo", DPOConfig())
    reference = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0].detach()
    loss, stats = preference_loss(model, replace(batch, numbers={REFERENCE: reference}), len(ANSWERS), DPOConfig())
    assert loss.item() == pytest.approx(math.log(2)) and stats["margin"] == stats["chosen_reward"] == 0


def test_the_rewards_of_packed_pairs_are_what_ppo_reads_of_each_answer(tokenizer):
    head = TokenValues(load_scalar_of(tokenizer))
    batch = batch_of(tokenizer, "reward_model", RewardModelConfig())
    loss, stats = ranking_loss(head, batch, len(ANSWERS), RewardModelConfig())
    rewards = []
    for pair in pairs():
        for turns in (pair.chosen, pair.rejected):
            ids = torch.from_numpy(encode_conversation(tokenizer, (*pair.prompt, *turns)).token_ids)[None]
            rewards.append(head(ids)[0, -1])  # column T: after the last token
    chosen, rejected = torch.stack(rewards).view(-1, 2).unbind(1)
    torch.testing.assert_close(loss, torch.nn.functional.softplus(-(chosen - rejected - torch.tensor([0.0, 0.5, 1.0]))).mean())
    assert stats["accuracy"].item() == pytest.approx((chosen > rejected).float().mean().item())
    metrics = with_spread({name: float(value) for name, value in stats.items()})
    assert metrics["reward_mean"] == pytest.approx(torch.stack(rewards).mean().item(), abs=1e-5)
    assert metrics["reward_std"] == pytest.approx(torch.stack(rewards).std(unbiased=False).item(), rel=1e-3)


def load_scalar_of(tokenizer):
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**build_causal("nano", tokenizer, seed=0).config.to_dict(), num_labels=1))
    torch.nn.init.normal_(model.score.weight)
    return model


def test_micro_batches_of_pairs_add_up_and_padding_rows_count_for_nothing(tokenizer, model):
    config = DPOConfig(loss="simpo")
    batch = batch_of(tokenizer, "dpo", config)
    whole = preference_loss(model, batch, len(ANSWERS), config)[0]
    parts = [preference_loss(model, part, len(ANSWERS), config)[0] for part in batch.split(1)]
    torch.testing.assert_close(sum(parts), whole)
    batch.loss_mask.zero_()
    assert preference_loss(model, batch, len(ANSWERS), config)[0] == 0
