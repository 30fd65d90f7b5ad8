"""Prompts within the limit, and a stream that resumes from one number."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from minigpt_ray.config import PromptsConfig
from minigpt_ray.data.prompts import PromptStream, load_prompts
from minigpt_ray.data.rows import DataError
from minigpt_ray.rl.experience import Prompt
from minigpt_ray.tokenizer import encode_prompt, train_tokenizer

PROMPTS = [Prompt(i, ({"role": "user", "content": str(i)},), np.array([i], np.int32), "x", None) for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc"], 260)


def file_of(tmp_path: Path, *rows: object) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(prompts: list[Prompt]) -> list[tuple[int, int]]:
    return [(prompt.serial, int(prompt.token_ids[0])) for prompt in prompts]


def test_every_epoch_has_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(PROMPTS, seed=1)
    epochs = [[int(p.token_ids[0]) for p in stream.next(7)] for _ in range(4)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4


def test_serial_counts_the_draws() -> None:
    assert [p.serial for p in PromptStream(PROMPTS, seed=1).next(20)] == list(range(20))


@pytest.mark.parametrize("start", range(30))
def test_stream_resumed_at_any_cursor_goes_on_identically(start: int) -> None:
    whole = PromptStream(PROMPTS, seed=1)
    whole.next(start)
    resumed = PromptStream(PROMPTS, seed=1, start=whole.drawn)
    assert resumed.epoch == whole.epoch
    assert drawn(resumed.next(15)) == drawn(whole.next(15))


def test_the_order_does_not_depend_on_how_many_are_drawn_at_a_time() -> None:
    one, many = PromptStream(PROMPTS, seed=1), PromptStream(PROMPTS, seed=1)
    assert drawn([p for _ in range(20) for p in one.next(1)]) == drawn(many.next(20))


def test_another_seed_is_another_order() -> None:
    assert drawn(PromptStream(PROMPTS, seed=1).next(7)) != drawn(PromptStream(PROMPTS, seed=2).next(7))


def test_epoch_counts_the_passes_begun() -> None:
    stream = PromptStream(PROMPTS, seed=1)
    assert stream.epoch == 1
    for n, epoch in ((7, 1), (1, 2), (6, 2), (1, 3)):
        stream.next(n)
        assert stream.epoch == epoch


def test_prompts_carry_tokens_source_and_answer(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "q", "answer": "a", "source": "x"})
    (prompt,) = load_prompts(PromptsConfig(), path, tokenizer).prompts
    assert (prompt.serial, prompt.source, prompt.answer) == (0, "x", {"answer": "a"})
    assert prompt.token_ids.dtype == np.int32
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def test_demonstrations_give_their_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"question": "q", "answer": "work #### 3"})
    (prompt,) = load_prompts(PromptsConfig(files=(path,)), tmp_path / "nowhere", tokenizer).prompts
    assert prompt.messages == ({"role": "user", "content": "q"},)
    assert prompt.answer == {"answer": "3", "match": "number"}


def test_long_prompts_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "ab"}, {"prompt": "abc"}, {"prompt": "b"})
    limit = len(encode_prompt(tokenizer, [{"role": "user", "content": "ab"}]))
    loaded = load_prompts(PromptsConfig(max_prompt_tokens=limit), path, tokenizer)
    assert (len(loaded), loaded.dropped, loaded.truncated) == (2, 1, 0)
    assert [p.messages[0]["content"] for p in loaded.prompts] == ["ab", "b"]
    assert [p.serial for p in loaded.prompts] == [0, 1]


def test_long_prompts_are_refused_by_their_place(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "a"}, {"prompt": "a" * 100})
    with pytest.raises(DataError, match=r"prompts.jsonl:2: the prompt has 119 tokens, but max_prompt_tokens=50"):
        load_prompts(PromptsConfig(max_prompt_tokens=50, too_long="refuse"), path, tokenizer)


def test_truncation_cuts_the_left_of_the_last_message_and_keeps_the_template(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "0123456789" * 9},
    ]
    path = file_of(tmp_path, {"prompt": messages})
    limit = len(encode_prompt(tokenizer, messages)) - 85
    loaded = load_prompts(PromptsConfig(max_prompt_tokens=limit, too_long="truncate_left"), path, tokenizer)
    (prompt,) = loaded.prompts
    assert (loaded.dropped, loaded.truncated) == (0, 1)
    assert prompt.messages == (*messages[:3], {"role": "user", "content": "56789"})
    assert len(prompt.token_ids) == limit
    assert np.array_equal(prompt.token_ids, encode_prompt(tokenizer, prompt.messages))


def test_truncation_that_would_cut_the_template_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = file_of(tmp_path, {"prompt": "a" * 50})
    with pytest.raises(DataError, match=r"prompts.jsonl:1: the template .* take 19 tokens, but max_prompt_tokens=12"):
        load_prompts(PromptsConfig(max_prompt_tokens=12, too_long="truncate_left"), path, tokenizer)


def test_a_limit_that_leaves_no_prompt_is_refused(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="all 1 prompts are longer than max_prompt_tokens=3"):
        load_prompts(PromptsConfig(max_prompt_tokens=3), file_of(tmp_path, {"prompt": "q"}), tokenizer)


def test_missing_default_file_points_to_prepare_data(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run python -m jobs.prepare_data first or set data.files"):
        load_prompts(PromptsConfig(), tmp_path / "nowhere.jsonl", tokenizer)


def test_special_token_in_a_prompt_is_refused_by_its_place(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"prompts.jsonl:2: message 0 \(user\) contains the special token"):
        load_prompts(PromptsConfig(), file_of(tmp_path, {"prompt": "q"}, {"prompt": "<|im_end|>"}), tokenizer)
