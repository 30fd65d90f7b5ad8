"""A worker of the generator: an engine, what it is asked for, and the proof that it computes with the right weights.

A sampling seed is a function of (run seed, prompt serial number, sample), so the same weights give the same tokens
whoever generates them, and a prompt that is handed out again changes nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from torch import Tensor

from actors.rank_host import Rank
from actors.stacks import end_family
from actors.weights import TRANSPORTS, Publication, PublicationLost, WeightsError, probe_gap
from minigpt_ray.config import GeneratorConfig, SamplingConfig
from minigpt_ray.imports import without_collection
from minigpt_ray.models import saved_weights
from minigpt_ray.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
WORK_SECONDS = 0.5
"""Longest call of a worker: so soon it hears of new orders."""
RETURN_SECONDS = 0.1
"""Shortest one, unless nothing is left to do: answers that come soon after one another travel together, which spares the driver."""

T = TypeVar("T")
Key = tuple[int, int]
"""Number of the order, and which of its responses."""


@dataclass(frozen=True)
class Request:
    """One response that is wanted."""

    token_ids: np.ndarray
    """int32 (prompt tokens,)."""
    seed: int


@dataclass(frozen=True)
class Completion:
    """One response as an engine gives it."""

    token_ids: np.ndarray
    """int32 (tokens,): the end token included when it was drawn."""
    logprobs: np.ndarray
    """float32 (tokens,): of the distribution that was sampled from."""
    finish_reason: str
    """`stop` or `length`, `failed` for a prompt that was given up."""


@dataclass(frozen=True)
class Answer:
    """One response as a worker gives it."""

    completion: Completion
    text: str


@dataclass(frozen=True)
class Order:
    """The responses to one prompt that are wanted."""

    number: int
    requests: tuple[Request, ...]
    """One for each sample."""


class GeneratorEngine(Protocol):
    """What a generator worker needs of an engine."""

    def submit(self, key: Key, request: Request, sampling: SamplingConfig) -> None:
        """Take a request; it is begun after those that came before it."""
        ...

    def step(self) -> list[tuple[Key, Completion]]:
        """Compute for a moment; the requests that have ended."""
        ...

    def cancel(self, keys: Sequence[Key]) -> None:
        """Forget requests, begun or not."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def load_by(self, loader: Callable[..., T], *args: Any) -> list[T]: ...
    def probe(self, token_ids: Sequence[int]) -> list[float]: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


def complete(engine: GeneratorEngine, requests: Sequence[Request], sampling: SamplingConfig) -> list[Completion]:
    """A completion for each request, of an engine that has nothing else to do."""
    for index, request in enumerate(requests):
        engine.submit((index, 0), request, sampling)
    found: dict[Key, Completion] = {}
    while len(found) < len(requests):
        found |= dict(engine.step())
    return [found[index, 0] for index in range(len(requests))]


def _vllm(path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int) -> GeneratorEngine:
    with without_collection():
        from actors.vllm_engine import VLLMEngine

    return VLLMEngine(path, config, max_model_len, tensor_parallel, seed)


def _transformers(path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int) -> GeneratorEngine:
    from actors.transformers_engine import TransformersEngine

    return TransformersEngine(path, config, max_model_len, tensor_parallel, seed)


ENGINES: dict[str, Callable[[str, GeneratorConfig, int, int, int], GeneratorEngine]] = {"vllm": _vllm, "transformers": _transformers}


@dataclass(frozen=True)
class Received:
    """Proof that a worker generates with a version."""

    version: int
    probe_gap: float
    """Nats."""
    seconds: float


@dataclass
class _Open:
    """An order that is being answered."""

    order: Order
    answers: dict[int, Answer] = field(default_factory=dict)
    """By sample."""

    @property
    def keys(self) -> list[Key]:
        return [(self.order.number, sample) for sample in range(len(self.order.requests))]


@contextmanager
def dying_with_the_engine() -> Iterator[None]:
    """Nobody knows what an engine that failed computes next: its process ends with all that it has started, and counts as one that died.

    WeightsError and PublicationLost are raised: another engine would be given the same bytes, or none.
    """
    try:
        yield
    except (WeightsError, PublicationLost):
        raise
    except Exception:
        logger.exception("the engine of this generator worker failed, so its process ends")
        end_family()


class GeneratorWorker:
    """One engine. It generates only with weights whose version it has proved."""

    def __init__(self, rank: Rank, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int, probe_tolerance: float) -> None:
        self.engine = ENGINES[config.backend](path, config, max_model_len, tensor_parallel, seed)
        self.tokenizer = load_tokenizer(path)
        self.config, self.probe_tolerance = config, probe_tolerance
        self._path = path
        self.version = -1
        self.asleep = False
        self._open: dict[int, _Open] = {}

    def receive(self, publication: Publication) -> Received:
        """Load a publication and prove it, awake again if it slept; raises WeightsError when the bytes or the probe do not agree."""
        start = time.perf_counter()
        self.version, self._path = -1, ""
        with dying_with_the_engine():
            self.drop(list(self._open))
            if self.asleep:
                self.engine.wake()
                self.asleep = False
            TRANSPORTS[publication.transport].receive(publication, self.engine)
            gap = probe_gap(publication, self.engine.probe(publication.probe.token_ids), self.probe_tolerance)
        self.version = publication.version
        return Received(self.version, gap, time.perf_counter() - start)

    def work(self, orders: Sequence[Order], dropped: Sequence[int], sampling: SamplingConfig, version: int) -> list[tuple[int, list[Answer]]]:
        """Forget the orders `dropped`, take new ones, and compute for a while: until one is complete and RETURN_SECONDS have passed, all are, or WORK_SECONDS have.

        Returns numbers and answers of the orders that are complete. Those of others are found by the next calls.
        """
        if version != self.version:
            raise RuntimeError(f"this worker has proved weights version {self.version} and was asked to generate with {version}")
        with dying_with_the_engine():
            self.drop(dropped)
            for order in orders:
                self._open[order.number] = taken = _Open(order)
                for key, request in zip(taken.keys, order.requests, strict=True):
                    self.engine.submit(key, request, sampling)
            return self._compute()

    def _compute(self) -> list[tuple[int, list[Answer]]]:
        complete: list[tuple[int, list[Answer]]] = []
        begin = time.monotonic()
        while self._open and time.monotonic() - begin < (RETURN_SECONDS if complete else WORK_SECONDS):
            for (number, sample), completion in self.engine.step():
                text = str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True))
                answers = self._open[number].answers
                answers[sample] = Answer(completion, text)
                if len(answers) == len(self._open[number].order.requests):
                    complete.append((number, [answers[sample] for sample in range(len(answers))]))
                    del self._open[number]
        return complete

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget orders; of those that are complete there is nothing left to forget."""
        taken = [self._open.pop(number) for number in numbers if number in self._open]
        self.engine.cancel([key for one in taken for key in one.keys])

    def load_checkpoint(self, version: int, path: str) -> None:
        """Generate with a checkpoint as `version`: the one that the engine was built from, or one that differs from it in its weights alone."""
        if path != self._path:
            self.version, tensors = -1, saved_weights(path)
            with dying_with_the_engine():
                self.drop(list(self._open))
                self.engine.load(tensors)
            self._path = path
        self.version = version

    def sleep(self) -> None:
        """Give the GPU to others; the weights are lost, so nothing is generated before the next `receive`."""
        self.version = -1
        with dying_with_the_engine():
            self.drop(list(self._open))
            if not self.asleep:
                self.engine.sleep()
        self.asleep = True


def sampling_seed(run_seed: int, serial: int, sample: int, turn: int = 0) -> int:
    """31-bit seed of one response."""
    return int(np.random.SeedSequence([run_seed, serial, sample, turn]).generate_state(1)[0]) >> 1
