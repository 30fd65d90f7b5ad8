"""What benchmarks measure is what they say: lengths of prompts and responses, memory that processes share."""

import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.dataset import pack_windows, store
from benchmarks.inputs import PROMPT_TOKENS, WORKLOADS, countdown, endless, prompt_numbers, word, words_tokenizer
from benchmarks.prepare_data import documents
from benchmarks.processes import BenchmarkError, watch
from benchmarks.supervised_inputs import write_inputs as write_supervised
from benchmarks.supervised_vs_torch import Arrivals
from benchmarks.torch_loop import main as torch_loop
from minigpt_ray.cli import write_resolved
from minigpt_ray.config import SFTConfig
from minigpt_ray.config.supervised import ModelConfig
from minigpt_ray.stages import STAGES
from minigpt_ray.tokenizer import encode_prompt, load_tokenizer


def test_natural_lengths_have_a_mean_of_48_and_spread_more_than_5_to_1() -> None:
    lengths = np.array(WORKLOADS["natural"].lengths)
    assert abs(lengths.mean() - 48) < 0.5 and lengths.max() < WORKLOADS["natural"].max_tokens
    assert np.quantile(lengths, 0.95) > 5 * np.quantile(lengths, 0.05)


def test_a_prompt_is_as_many_tokens_as_numbers_and_ends_with_the_last() -> None:
    tokenizer, random = words_tokenizer(), np.random.default_rng(0)
    for last in range(1, 130):
        numbers = prompt_numbers(random, last)
        ids = encode_prompt(tokenizer, [{"role": "user", "content": "".join(map(word, numbers))}])
        assert len(ids) == len(numbers) and PROMPT_TOKENS[0] <= len(ids) <= PROMPT_TOKENS[1]
        assert tokenizer.decode(ids[-1:]) == word(last)


@torch.no_grad()
def test_the_uniform_policy_gives_the_end_token_no_chance() -> None:
    tokenizer = words_tokenizer()
    logprobs = endless(tokenizer, [])(input_ids=torch.randint(4, len(tokenizer), (4, 96))).logits.log_softmax(-1)
    assert logprobs[..., [tokenizer.eos_token_id, tokenizer.pad_token_id]].max() < -25
    others = torch.ones(len(tokenizer), dtype=torch.bool)
    others[[tokenizer.eos_token_id, tokenizer.pad_token_id]] = False
    assert logprobs[..., others].min() > -10


@pytest.mark.slow
@torch.no_grad()
def test_the_natural_policy_counts_down_and_ends() -> None:
    tokenizer = words_tokenizer()
    with torch.enable_grad():
        model = countdown(tokenizer, [5, 124])
    ids = tokenizer("".join(map(word, [300, 400, 7, *range(124, 0, -1)])), return_tensors="pt")["input_ids"]
    logprobs = model(input_ids=ids).logits.log_softmax(-1)[0, 3:]
    following = [*ids[0, 4:].tolist(), tokenizer.eos_token_id]
    assert logprobs[range(124), following].min() > -1e-3


def test_memory_that_processes_share_counts_once(tmp_path: Path) -> None:
    program = "import os, time; held = bytearray(b'x') * (256 << 20); os.fork(); time.sleep(4)"
    found = watch([sys.executable, "-c", program], {}, tmp_path / "log", tmp_path / "none", "row", every=0.1)
    assert found.processes == 2 and 0.25 < found.peak_pss_gib < 0.4


def test_a_program_that_fails_ends_the_benchmark_with_its_log(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"ended with code 3; its output is in .*log"):
        watch([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log", tmp_path / "none", "row")


def test_the_bare_loop_learns_from_the_windows_of_a_stage(tmp_path: Path) -> None:
    write_supervised(tmp_path / "r", preset="nano", rows=30)
    config = SFTConfig(run="r", output_dir=tmp_path, model=ModelConfig(init_from="start"), steps=6, batch_size=4, window=256)
    directory, tokenizer = config.stage_dir("sft"), load_tokenizer(tmp_path / "r" / "start" / "model")
    write_resolved(config, directory)
    items = STAGES["sft"].read([tmp_path / "r" / "prepare_data" / "demonstrations.jsonl"], None, config)
    windows = pack_windows([group for item in items for group in STAGES["sft"].encode(tokenizer, item, config)], config.window)
    store(directory / "windows" / "made" / "train", [windows])
    (directory / "windows" / "made" / "manifest.json").touch()
    torch_loop(directory, steps=6)
    rows = json.loads((directory / "torch_loop.json").read_text())
    assert rows[0]["loss"] == pytest.approx(np.log(1024), abs=0.5) and rows[-1]["loss"] < rows[0]["loss"]
    assert all(0 < row["tokens"] <= 4 * 256 and row["seconds"] > 0 for row in rows)


def test_a_row_is_timed_when_it_comes(tmp_path: Path) -> None:
    with Arrivals(tmp_path / "metrics.jsonl") as arrivals, (tmp_path / "metrics.jsonl").open("w", buffering=1) as file:
        for step in (1, 2, 3):
            time.sleep(0.2)
            file.write(json.dumps({"step": step, "train/loss": 1.0}) + "\n")
        time.sleep(0.1)
    assert list(arrivals.at) == [1, 2, 3] and 0.3 < arrivals.at[3] - arrivals.at[1] < 0.6


def test_of_the_documents_to_prepare_every_20th_is_a_duplicate_and_every_20th_nearly_one() -> None:
    texts = list(itertools.islice(documents(0), 200))
    assert len(set(texts)) == 200 - 10
    assert sum("Changed" in text for text in texts) == 10
    assert 150 < np.mean([len(text.split()) for text in texts]) < 600
