"""A generator engine on transformers alone: for unit tests and platforms without vLLM. Slower, same contract."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from actors.generator_worker import Completion, Key, Request
from minigpt_ray.config import GeneratorConfig, SamplingConfig
from minigpt_ray.models import TokenLogprobs, as_saved, load_causal
from minigpt_ray.tokenizer import load_tokenizer

T = TypeVar("T")


class TransformersEngine:
    """Generates with a KV cache, one batch at a time, prompts padded on the left."""

    def __init__(self, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: PreTrainedModel = load_causal(path, config.dtype).eval().to(self.device)
        self.tokenizer = load_tokenizer(path)
        self.batch_size = config.max_num_seqs
        self._waiting: dict[Key, tuple[Request, SamplingConfig]] = {}
        self.parameters = dict(self.model.named_parameters())
        numbered = ((name, torch.arange(p.numel(), device=self.device).view(p.shape)) for name, p in self.parameters.items())
        self.places = {saved: (name, places) for name, own in numbered for saved, places in as_saved(self.model, [(name, own)])}
        """Name of a saved tensor -> the parameter that it is a part of, and where in it."""

    def submit(self, key: Key, request: Request, sampling: SamplingConfig) -> None:
        """Take a request; it is begun after those that came before it."""
        self._waiting[key] = request, sampling

    def step(self) -> list[tuple[Key, Completion]]:
        """Answer one batch of those that came first and have the same sampling."""
        sampling = next((asked for _, asked in self._waiting.values()), None)
        keys = [key for key, (_, asked) in self._waiting.items() if asked == sampling][: self.batch_size]
        if sampling is None:
            return []
        requests = [self._waiting.pop(key)[0] for key in keys]
        return list(zip(keys, self._generate(requests, sampling), strict=True))

    def cancel(self, keys: Sequence[Key]) -> None:
        """Forget requests; a batch is never left unfinished, so none has been begun."""
        for key in keys:
            self._waiting.pop(key, None)

    @torch.no_grad()
    def _generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
        width = max(len(r.token_ids) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros(len(requests), width, dtype=torch.long)
        for row, request in enumerate(requests):
            ids[row, width - len(request.token_ids) :] = torch.from_numpy(np.array(request.token_ids, np.int64))
            mask[row, width - len(request.token_ids) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        draws = [torch.Generator().manual_seed(r.seed) for r in requests]
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        reasons = ["length"] * len(requests)
        running = set(range(len(requests)))
        for _ in range(sampling.max_tokens):
            output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            scores = filtered_logprobs(output.logits[:, -1].float(), sampling).cpu()
            chosen = torch.stack([self._draw(scores[row], draws[row], sampling) for row in range(len(requests))])
            for row in sorted(running):
                token = int(chosen[row])
                tokens[row].append(token)
                logprobs[row].append(float(scores[row, token]))
                if token == self.tokenizer.eos_token_id or self._stopped(tokens[row], sampling):
                    reasons[row] = "stop"
                    running.discard(row)
            if not running:
                break
            ids = chosen[:, None].to(self.device)
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return [Completion(np.asarray(t, np.int32), np.asarray(p, np.float32), r) for t, p, r in zip(tokens, logprobs, reasons, strict=True)]

    @staticmethod
    def _draw(scores: Tensor, generator: torch.Generator, sampling: SamplingConfig) -> Tensor:
        if sampling.temperature == 0:
            return scores.argmax()
        return (scores.exp() / torch.empty_like(scores).exponential_(generator=generator)).argmax()

    def _stopped(self, tokens: list[int], sampling: SamplingConfig) -> bool:
        return bool(sampling.stop) and any(s in self.tokenizer.decode(tokens) for s in sampling.stop)

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replace weights in place; tied ones follow."""
        with torch.no_grad():
            for saved, tensor in tensors:
                name, places = self.places[saved]
                parameter = self.parameters[name]
                parameter.view(-1)[places.view(-1)] = tensor.reshape(-1).to(self.device, parameter.dtype)

    def load_by(self, loader: Callable[..., T], *args: Any) -> list[T]:
        """Call `loader(part, load, *args)`: the model is in this process, in one part."""
        return [loader(0, self.load, *args)]

    @torch.no_grad()
    def probe(self, token_ids: Sequence[int]) -> list[float]:
        """log p(token t | tokens < t) of tokens 1 to the last, at temperature 1."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[:, 0] = False
        return [float(p) for p in TokenLogprobs(self.model)(ids, mask)[0][0, 1:]]

    def sleep(self) -> None:
        """Nothing to give back: this engine keeps no pool of memory."""

    def wake(self) -> None:
        """The counterpart of sleep."""


def filtered_logprobs(logits: Tensor, sampling: SamplingConfig) -> Tensor:
    """Log of the distribution that is sampled from: temperature, then top-k, top-p and min-p, renormalised."""
    logprobs = (logits / (sampling.temperature or 1.0)).log_softmax(-1)
    if sampling.top_k:
        logprobs = logprobs.masked_fill(logprobs < logprobs.topk(min(sampling.top_k, logprobs.shape[-1])).values[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logprobs.log_softmax(-1).sort(descending=True)
        outside = ordered.exp().cumsum(-1) - ordered.exp() >= sampling.top_p
        logprobs = logprobs.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)
    if sampling.min_p > 0:
        logprobs = logprobs.masked_fill(logprobs < logprobs.amax(-1, keepdim=True) + float(np.log(sampling.min_p)), -torch.inf)
    return logprobs.log_softmax(-1)
