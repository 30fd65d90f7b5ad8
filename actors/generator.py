"""The rollout generator: workers with an engine each, and the pool that the driver holds.

A sampling seed is a function of (run seed, prompt serial number, sample), so the same weights give the same tokens
whoever generates them, and a prompt that is handed out again after a worker's death changes nothing.
"""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import ray
from torch import Tensor

from actors.group import Group, OutOfRestarts, Rank, RoleLost, Timed, by_reference, get_all, has_died
from actors.placement import Cluster
from actors.weights import TRANSPORTS, Publication, probe_gap
from minigpt_ray.config import GeneratorConfig, SamplingConfig
from minigpt_ray.rl.experience import Prompt, Rollout
from minigpt_ray.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)
T = TypeVar("T")


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
    """`stop` or `length`."""


@dataclass(frozen=True)
class Answer:
    """One response as a worker gives it."""

    completion: Completion
    text: str


class GeneratorEngine(Protocol):
    """What a generator worker needs of an engine."""

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig) -> Iterator[tuple[int, Completion]]:
        """A completion for each request, with the request's index, in the order in which they end."""
        ...

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None: ...
    def load_by(self, loader: Callable[..., T], *args: Any) -> list[T]: ...
    def probe(self, token_ids: Sequence[int]) -> list[float]: ...
    def sleep(self) -> None: ...
    def wake(self) -> None: ...


def _vllm(path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int) -> GeneratorEngine:
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


class GeneratorWorker:
    """One engine. It generates only with weights whose version it has proved."""

    def __init__(self, rank: Rank, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int, probe_tolerance: float) -> None:
        self.engine = ENGINES[config.backend](path, config, max_model_len, tensor_parallel, seed)
        self.tokenizer = load_tokenizer(path)
        self.config, self.probe_tolerance = config, probe_tolerance
        self.version = -1
        self.asleep = False

    def receive(self, publication: Publication) -> Received:
        """Load a publication and prove it, awake again if it slept; raises WeightsError when the bytes or the probe do not agree."""
        start = time.perf_counter()
        self.version = -1
        if self.asleep:
            self.engine.wake()
            self.asleep = False
        TRANSPORTS[publication.transport].receive(publication, self.engine)
        gap = probe_gap(publication, self.engine.probe(publication.probe.token_ids), self.probe_tolerance)
        self.version = publication.version
        return Received(self.version, gap, time.perf_counter() - start)

    def generate(self, requests: Sequence[Request], sampling: SamplingConfig, version: int) -> Iterator[tuple[int, list[Answer]]]:
        """`sampling.n` consecutive requests are a group. Yields each group's number and answers as soon as all of them are there."""
        if version != self.version:
            raise RuntimeError(f"this worker has proved weights version {self.version} and was asked to generate with {version}")
        groups: dict[int, dict[int, Answer]] = {}
        for index, completion in self.engine.generate(requests, sampling):
            number, sample = divmod(index, sampling.n)
            group = groups.setdefault(number, {})
            group[sample] = Answer(completion, str(self.tokenizer.decode(completion.token_ids, skip_special_tokens=True)))
            if len(group) == sampling.n:
                yield number, [group[sample] for sample in range(sampling.n)]
                del groups[number]

    def load_checkpoint(self, version: int) -> None:
        """Generate with the checkpoint that the engine was built from, as `version`."""
        self.version = version

    def sleep(self) -> None:
        """Give the GPU to others; the weights are lost, so nothing is generated before the next `receive`."""
        self.version = -1
        self.engine.sleep()
        self.asleep = True


def sampling_seed(run_seed: int, serial: int, sample: int, turn: int = 0) -> int:
    """31-bit seed of one response."""
    return int(np.random.SeedSequence([run_seed, serial, sample, turn]).generate_state(1)[0]) >> 1


class Generator(Group[GeneratorWorker]):
    """The pool of workers as the driver sees it."""

    def __init__(
        self, cluster: Cluster, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int, probe_tolerance: float = 0.0
    ) -> None:
        """`path`: the checkpoint that engines are built from; `max_model_len`: longest prompt and response together."""
        self._seed = seed
        self._tensor_parallel, self._sleeps, self._asleep = tensor_parallel, config.sleep_between_phases, False
        self._publication: Publication | None = None
        self.version = -1
        self.received: list[Received] = []
        options = (config, max_model_len, tensor_parallel, seed, probe_tolerance)
        super().__init__(cluster, "generator", GeneratorWorker, path, *options, restarts=config.restart_limit)

    def receive(self, publication: Publication) -> None:
        """Every worker loads and proves a publication before it generates again."""
        self._publication, self.version = publication, publication.version
        self.received = self._deliver(range(len(self.hosts)))

    def _deliver(self, workers: Sequence[int]) -> list[Received]:
        """Workers load and prove the current publication, and are awake; one that dies at it is replaced, and all load it again."""
        publication = self._publication
        assert publication is not None
        while True:
            hosts = [self.hosts[worker] for worker in workers]
            publications, sending = TRANSPORTS[publication.transport].dispatch(publication, hosts, self._tensor_parallel)
            calls = [host.call.remote(self.role, GeneratorWorker.receive, (by_reference(mine),)) for host, mine in zip(hosts, publications, strict=True)]
            try:
                timed = get_all([*calls, *sending])[: len(calls)]
                break
            except ray.exceptions.RayActorError as death:
                dead = [worker for worker, call in zip(workers, calls, strict=True) if has_died(call)]
                if not dead:
                    raise RoleLost("policy") from death  # the sender
                for worker in dead:
                    self._start_anew(worker, death)
        self.usage.busy_seconds += max(t.seconds for t in timed)
        self.usage.span(timed)
        self._asleep = False
        return [t.value for t in timed]

    def use_checkpoint(self, version: int = 0) -> None:
        """Generate with the checkpoint that the workers were built from."""
        self.version = version
        self.call(GeneratorWorker.load_checkpoint, version).result()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, ordered by prompt and sample, whoever generated them."""
        return [rollout for chunk in self.stream(prompts, sampling, len(prompts)) for rollout in chunk]

    def stream(self, prompts: Sequence[Prompt], sampling: SamplingConfig, chunk: int) -> Iterator[list[Rollout]]:
        """The same in chunks of so many consecutive prompts, each as soon as it is whole, while the rest still generates.

        Which prompts make a chunk depends on nothing but their order. Each worker has a contiguous part of the prompts. A
        worker that dies is replaced, up to generator.restart_limit times in a run, and what it had not finished is
        generated again, with the same tokens. With generator.sleep_between_phases workers sleep afterwards, and load the
        current publication again if they are asked for more before the next one.
        """
        if self._asleep and self._publication is not None:
            self._deliver(range(len(self.hosts)))
        finished: dict[int, list[Rollout]] = {}
        for position, answers in self._groups(prompts, sampling):
            finished[position] = [_rollout(prompts[position], sample, answer, self.version) for sample, answer in enumerate(answers)]
            members = range(position - position % chunk, min(position - position % chunk + chunk, len(prompts)))
            if all(member in finished for member in members):
                yield [rollout for member in members for rollout in finished[member]]
        if self._sleeps and self._publication is not None:
            self.call(GeneratorWorker.sleep).result()
            self._asleep = True

    def _groups(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> Iterator[tuple[int, list[Answer]]]:
        """Position of a prompt and the answers to it, in the order in which they are complete."""
        seconds, memory = [0.0] * len(self.hosts), [0] * len(self.hosts)

        def submit(worker: int, positions: Sequence[int]) -> Any:
            requests = [Request(prompts[p].token_ids, sampling_seed(self._seed, prompts[p].serial, s)) for p in positions for s in range(sampling.n)]
            return self.hosts[worker].stream.remote(self.role, GeneratorWorker.generate, (requests, sampling, self.version))

        shares = [range(len(prompts))[Rank(worker, len(self.hosts), "cpu").share(len(prompts))] for worker in range(len(self.hosts))]
        streams = {submit(worker, share): (worker, list(share)) for worker, share in enumerate(shares)}
        left = set(range(len(prompts)))
        while streams:
            stream: Any = ray.wait(list(streams), num_returns=1)[0][0]
            worker, positions = streams[stream]
            try:
                timed: Timed = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
                continue
            except ray.exceptions.RayActorError as death:
                del streams[stream]
                self._replace(worker, death)
                again = [position for position in positions if position in left]
                streams[submit(worker, again)] = (worker, again)
                continue
            seconds[worker] += timed.seconds
            memory[worker] = timed.memory_bytes
            self.usage.span([timed])
            number, answers = timed.value
            left.discard(positions[number])
            yield positions[number], answers
        self.usage.busy_seconds += max(seconds)
        self.usage.memory_bytes = sum(memory)

    def _replace(self, worker: int, death: Exception) -> None:
        """Start a worker in the place of a dead one and bring it to the current version."""
        self._start_anew(worker, death)
        if self._publication is None:
            ray.get(self.hosts[worker].call.remote(self.role, GeneratorWorker.load_checkpoint, (self.version,)))
        else:
            self._deliver([worker])

    def _start_anew(self, worker: int, death: Exception) -> None:
        if self._restarts_left == 0:
            raise OutOfRestarts(self.role, "generator.restart_limit") from death
        self._restarts_left -= 1
        self.restarts += 1
        logger.warning("generator worker %d died; a new one takes its place and its prompts", worker)
        self.hosts[worker] = self.cluster.host(self.role, worker)
        ray.get(self.hosts[worker].build.remote(self.role, self._build, *self._args))

    def metrics(self) -> dict[str, float]:
        """About the last publication and the workers' health."""
        if not self.received or self._publication is None:
            return {}
        return {
            "weights/version": float(self.version),
            "weights/publish_bytes": float(self._publication.num_bytes),
            "weights/probe_gap": max(r.probe_gap for r in self.received),
            "weights/receive_s": max(r.seconds for r in self.received),
        }


def _rollout(prompt: Prompt, sample: int, answer: Answer, version: int) -> Rollout:
    completion = answer.completion
    size = len(completion.token_ids)
    return Rollout(
        prompt=prompt,
        sample=sample,
        token_ids=completion.token_ids,
        model_mask=np.ones(size, bool),
        logprobs=completion.logprobs,
        weight_versions=np.full(size, version, np.int32),
        text=answer.text,
        finish_reason=completion.finish_reason,
    )
