"""What both systems read: a tokenizer of words, a policy, a reward model, a critic, 64 prompts.

Laid out as a run directory, so that the jobs find the parts by name: <run>/start/model, <run>/reward_model/model,
<run>/critic/model, <run>/prepare_data/prompts.jsonl. Every step of either system sees all 64 prompts, in its own order.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minigpt_ray.losses import language_model_loss
from minigpt_ray.models import TokenLogprobs, build_causal, export, load_scalar
from minigpt_ray.tokenizer import train_tokenizer

PRESET = "qwen3-3m"
VOCABULARY = 1024
PROMPTS = 64
PROMPT_TOKENS = (16, 32)
TEMPLATE = "{% for message in messages %}{{- message['content'] -}}{% if message['role'] == 'assistant' %}{{- eos_token -}}{% endif %}{% endfor %}"
"""A prompt is its words and nothing else, so that its length is chosen freely."""


def word(number: int) -> str:
    """The text of a token."""
    return f" {number}"


def words_tokenizer() -> PreTrainedTokenizerBase:
    """Bytes, and the numbers from 0 as one token each: VOCABULARY tokens together."""
    tokenizer = train_tokenizer([], 260)
    tokenizer.add_tokens([AddedToken(word(number), normalized=False) for number in range(VOCABULARY - len(tokenizer))])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


# --------------------------------------------------------------------------------------------------- checkpoints


def endless(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int]) -> PreTrainedModel:
    """Random weights that never draw an end token or padding after other tokens.

    Component 0 of every embedding is 2, which outweighs the rest of the hidden state, and of those two tokens' -2: the
    tied output layer gives them a logprob below -25.
    """
    model = build_causal(PRESET, tokenizer, seed=0)
    with torch.no_grad():
        rows = model.get_parameter("model.embed_tokens.weight")
        rows[:, 0] = 2.0
        rows[[tokenizer.eos_token_id, tokenizer.pad_token_id], 0] = -2.0
    return model


def countdown(tokenizer: PreTrainedTokenizerBase, lengths: Sequence[int], steps: int = 120) -> PreTrainedModel:
    """Trained to count down from the prompt's last number and then to end: the prompt says how long the response is.

    Attention begins with an output of zero, so the next token depends on the last one alone and the training set is the
    pairs of neighbours. In the end logits are made twice as large, so that hardly a response leaves the count.
    """
    model = build_causal(PRESET, tokenizer, seed=0)
    for name, parameter in model.named_parameters():
        if name.endswith("o_proj.weight"):
            torch.nn.init.zeros_(parameter).requires_grad_(False)
    ids = torch.tensor([tokenizer.eos_token_id, *(tokenizer.convert_tokens_to_ids(word(n)) for n in range(1, max(lengths) + 1))])
    pairs = torch.stack([ids[1:], ids[:-1]], dim=1)
    mask = torch.tensor([False, True]).expand(pairs.shape)
    learner, optimizer = TokenLogprobs(model), torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = language_model_loss(learner(pairs, mask)[0], mask, len(pairs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        model.get_parameter("model.norm.weight").mul_(2.0)
        print(f"a policy that counts down: {language_model_loss(learner(pairs, mask)[0], mask, len(pairs)):.1e} nats a token", flush=True)
    return model


# ------------------------------------------------------------------------------------------------------ workloads


def spread_lengths(mean: float = 48.0, smallest: int = 6, largest: int = 124) -> list[int]:
    """PROMPTS lengths at even quantiles of a Gamma distribution of shape 2, scaled and cut to these bounds and this mean."""
    draws = np.sort(np.random.default_rng(0).gamma(2.0, 1.0, 100_000))
    quantiles = draws[((np.arange(PROMPTS) + 0.5) / PROMPTS * len(draws)).astype(int)]
    scales = np.linspace(1.0, 100.0, 2000)
    cut = np.clip(np.rint(scales[:, None] * quantiles), smallest, largest)
    return [int(length) for length in cut[np.abs(cut.mean(1) - mean).argmin()]]


def prompt_numbers(random: np.random.Generator, last: int) -> list[int]:
    """A prompt of 16 to 32 tokens: numbers that say nothing, then the one that counts."""
    low, high = PROMPT_TOKENS
    return [*(int(n) for n in random.integers(200, 700, random.integers(low, high + 1) - 1)), last]


@dataclass(frozen=True)
class Workload:
    """One kind of rollouts."""

    lengths: Sequence[int]
    """Of the responses, by prompt; `max_tokens` where the model does not end."""
    max_tokens: int
    stops: bool
    """A response ends by the end token."""
    policy: Callable[[PreTrainedTokenizerBase, Sequence[int]], PreTrainedModel]


WORKLOADS = {
    "uniform": Workload([64] * PROMPTS, max_tokens=64, stops=False, policy=endless),
    "natural": Workload(spread_lengths(), max_tokens=128, stops=True, policy=countdown),
}


def write_inputs(directory: Path, workload: Workload) -> None:
    """Everything that a workload needs, below `directory`."""
    tokenizer = words_tokenizer()
    start = directory / "start" / "model"
    export(workload.policy(tokenizer, workload.lengths), tokenizer, start)
    export(load_scalar(str(start), "float32", seed=0), tokenizer, directory / "reward_model" / "model")
    export(load_scalar(str(start), "float32", seed=None), tokenizer, directory / "critic" / "model")
    random = np.random.default_rng(0)
    prompts = ["".join(map(word, prompt_numbers(random, length))) for length in workload.lengths]
    (directory / "prepare_data").mkdir(parents=True, exist_ok=True)
    for name, rows in (("prompts", prompts), ("held_out", prompts[:1])):
        (directory / "prepare_data" / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in rows))
