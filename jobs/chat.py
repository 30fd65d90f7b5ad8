"""Talk to a model in the terminal.

    python -m jobs.chat outputs/demo/ppo/model
    python -m jobs.chat outputs/demo/ppo/model --temperature 0 --backend vllm

`/reset` forgets the conversation, `/quit` (or the end of input) ends it. With the transformers backend an answer appears as it is
written; vLLM answers in one piece, and sooner when the model is large.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from minigpt_ray.cli import one_sentence

Message = dict[str, str]

MOST_TOKENS = 8192
"""Longest conversation that vLLM keeps room for, where the model could read more."""


class Talker(Protocol):
    """A model that answers conversations."""

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation. Raises ValueError for one that the chat template, or the model's context, cannot hold."""
        ...

    def answer(self, prompt: list[int], write: Callable[[str], object]) -> str:
        """The answer; its text is handed to `write` as far as it is there."""
        ...


class Context:
    """The tokenizer of a model, and how much it can read."""

    def __init__(self, path: str, max_tokens: int) -> None:
        from transformers import AutoConfig

        from minigpt_ray.tokenizer import load_tokenizer

        self.tokenizer, self.max_tokens = load_tokenizer(path), max_tokens
        self.size: int = AutoConfig.from_pretrained(path, trust_remote_code=False).max_position_embeddings

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        from minigpt_ray.tokenizer import encode_prompt

        token_ids: list[int] = encode_prompt(self.tokenizer, messages).tolist()
        if len(token_ids) + self.max_tokens > self.size:
            raise ValueError(
                f"the conversation has {len(token_ids)} tokens, and with an answer of {self.max_tokens} more than the {self.size} that the model reads; "
                "begin anew with /reset, or lower --max-tokens"
            )
        return token_ids


class Transformers(Context):
    """Answers word by word, in this process."""

    def __init__(self, path: str, max_tokens: int, temperature: float, seed: int) -> None:
        import torch
        from transformers import logging

        from minigpt_ray.models import load_causal

        super().__init__(path, max_tokens)
        logging.disable_progress_bar()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_causal(path, "bfloat16" if self.device.type == "cuda" else "float32").eval().to(self.device)
        self.temperature = temperature
        torch.manual_seed(seed)

    def answer(self, prompt: list[int], write: Callable[[str], object]) -> str:
        import torch
        from transformers import GenerationConfig, TextStreamer

        pieces: list[str] = []

        class Streamer(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                pieces.append(text)
                write(text)

        drawn = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature > 0 else {"do_sample": False}
        ids = torch.tensor([prompt], device=self.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                max_new_tokens=self.max_tokens, eos_token_id=self.tokenizer.eos_token_id, pad_token_id=self.tokenizer.pad_token_id, **drawn
            ),
            streamer=Streamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        return "".join(pieces)


class VLLM(Context):
    """Answers in one piece, by the engine that generates rollouts."""

    def __init__(self, path: str, max_tokens: int, temperature: float, seed: int) -> None:
        from actors.placement import environment

        os.environ.update(environment(os.cpu_count() or 1)["env_vars"])  # as in a generator worker: one process, and quiet
        from actors.vllm_engine import VLLMEngine
        from minigpt_ray.config import GeneratorConfig, SamplingConfig

        super().__init__(path, max_tokens)
        self.size = min(self.size, MOST_TOKENS)
        self.sampling = SamplingConfig(temperature=temperature, max_tokens=max_tokens)
        self.engine = VLLMEngine(path, GeneratorConfig(max_num_seqs=1), self.size, tensor_parallel=1, seed=seed)
        self.seed = seed

    def answer(self, prompt: list[int], write: Callable[[str], object]) -> str:
        import numpy as np

        from actors.generator_worker import Request, complete

        self.seed += 1  # else the same question would have the same answer
        (completion,) = complete(self.engine, [Request(np.array(prompt, np.int32), self.seed)], self.sampling)
        text = str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
        write(text)
        return text


BACKENDS: dict[str, Callable[[str, int, float, int], Talker]] = {"transformers": Transformers, "vllm": VLLM}


def talk(talker: Talker, system: str | None) -> None:
    """Questions from the terminal, or one a line from a pipe; answers to stdout."""
    beginning: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(beginning)
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question == "/quit":
            return
        if question == "/reset":
            messages = list(beginning)
            print("the conversation begins anew")
            continue
        if not question:
            continue
        asked = [*messages, {"role": "user", "content": question}]
        try:
            prompt = talker.prompt(asked)
        except ValueError as error:  # this question cannot be asked; the conversation goes on without it
            print(error, file=sys.stderr)
            continue
        text = talker.answer(prompt, lambda piece: print(piece, end="", flush=True))
        print()
        messages = [*asked, {"role": "assistant", "content": text}]


def main(arguments: list[str]) -> None:
    """Load the model, then talk."""
    parser = argparse.ArgumentParser(prog="python -m jobs.chat", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory, as outputs/demo/ppo/model, or a hub id")
    parser.add_argument("--backend", choices=BACKENDS, default="transformers", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest answer; default: %(default)s")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    given = parser.parse_args(arguments)
    if given.temperature < 0 or given.max_tokens < 1:
        parser.error(f"--temperature {given.temperature:g} --max-tokens {given.max_tokens}: a temperature of at least 0 and at least one token are needed")
    with one_sentence():
        from minigpt_ray.model_directory import resolve_model

        path = resolve_model(given.model, Path())
        talker = BACKENDS[given.backend](path, given.max_tokens, given.temperature, given.seed)
    with suppress(KeyboardInterrupt):
        talk(talker, given.system)


if __name__ == "__main__":
    main(sys.argv[1:])
