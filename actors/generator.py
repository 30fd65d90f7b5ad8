"""The rollout generator as the driver sees it: a pool of workers with an engine each, their weights, and who answers what."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray

from actors.dispatch import SLOW, SLOW_SECONDS, Dispatch, Lengths
from actors.fatal_prompts import GivenUp
from actors.generator_worker import Answer, Completion, GeneratorWorker, Order, Received, Request, sampling_seed
from actors.group import PublicationUnsent, by_reference, get_all, has_died, reason_of
from actors.placement import Cluster
from actors.pool import POLL_SECONDS, Pool, Worker
from actors.rank_host import Disconnected, Timed
from actors.watchdog import Limit, wait_for_word
from actors.weights import TRANSPORTS, Publication, PublicationLost
from minigpt_ray.config import GeneratorConfig, SamplingConfig
from minigpt_ray.model_directory import same_but_for_weights
from minigpt_ray.rl.experience import Prompt, Rollout
from minigpt_ray.scaling import Autoscaler
from minigpt_ray.timeline import Mark

CALLS_AHEAD = 2
"""Calls that a worker has at a time, so that it need not wait for the driver between two of them."""
GIVEN_UP = Answer(Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), "failed"), "")
"""The answer to a prompt of which workers die."""


@dataclass(frozen=True)
class _Load:
    """Weights that a worker loads while nobody waits for it."""

    worker: Worker
    publication: Publication | None
    """None: a checkpoint. Two publications may have one version, the step that they follow, when learners were lost in between."""


@dataclass
class Meter:
    """What the pool did since the counting began, while it was asked for answers."""

    workers: int = 0
    """At most, at a time."""
    seconds: float = 0.0
    present: float = 0.0
    """Seconds of all workers that could have worked, summed."""
    busy: float = 0.0
    """Seconds of all workers that did."""
    waited: float = 0.0
    """Prompts that nobody had begun times seconds."""

    def passed(self, seconds: float, workers: int, queue_depth: int) -> None:
        """Some time went by with so many workers and so many prompts that waited."""
        self.workers = max(self.workers, workers)
        self.seconds += seconds
        self.present += seconds * workers
        self.waited += seconds * queue_depth

    @property
    def idle_share(self) -> float:
        return max(0.0, 1 - self.busy / self.present) if self.present else 0.0

    @property
    def queue_depth(self) -> float:
        return self.waited / self.seconds if self.seconds else 0.0


class Generator(Pool[GeneratorWorker]):
    """The pool of workers as the driver sees it."""

    def __init__(
        self, cluster: Cluster, path: str, config: GeneratorConfig, max_model_len: int, tensor_parallel: int, seed: int, probe_tolerance: float = 0.0
    ) -> None:
        """`path`: the checkpoint that engines are built from; `max_model_len`: longest prompt and response together."""
        self._config, self._seed, self._tensor_parallel = config, seed, tensor_parallel
        self._built_from = self._checkpoint = path
        self._asleep = False
        self._publication: Publication | None = None
        self.version = -1
        self.received: list[Received] = []
        self.meter = Meter()
        self._loading: dict[Any, _Load] = {}
        self.lengths = Lengths()
        self._orders = 0
        self.given_up = GivenUp(config.fatal_prompt_limit)
        options = (config, max_model_len, tensor_parallel, seed, probe_tolerance)
        super().__init__(cluster, "generator", GeneratorWorker, path, *options, restarts=config.restart_limit)
        self._autoscaler = Autoscaler(self.placement)

    # ------------------------------------------------------------------------------------------------- weights

    def receive(self, publication: Publication) -> None:
        """Every worker that is there loads and proves a publication before it generates again; one that is being built will."""
        self._publication, self.version = publication, publication.version
        self._see_loads()
        if self.placement.autoscale and not self._wishes and not self._coming and self.meter.seconds:
            depth, idle = self.meter.queue_depth, self.meter.idle_share
            if (wanted := self._autoscaler.wanted(self.size, depth, idle)) != self.size:
                self._say(
                    f"the {self.role} goes from {self.size} to {wanted} workers: {depth:.1f} prompts waited, the workers were idle for {idle:.0%} of the time"
                )
            self.resize(wanted)
        self.advance()
        self._deliver()

    def _deliver(self) -> None:
        """All workers load and prove the current publication, and are awake; one that dies at it is replaced, and the others load it again.

        Those that are late may generate once they are done.
        """
        while True:
            workers = self._wait_for_some()
            calls: dict[Any, Worker] = {}
            self._asleep = False  # workers wake before they fetch
            try:
                sent, sending = self._send(workers)
                calls = dict(zip(sent, workers, strict=True))
                in_time, limit = self._in_time(calls)
                timed = get_all([*in_time, *sending], limit)[: len(in_time)]
                break
            except (PublicationLost, ray.exceptions.RayActorError, Disconnected) as death:
                wait_for_word([worker.host for worker in calls.values()])
                dead = [worker for call, worker in calls.items() if has_died(call)]
                if not dead:
                    raise self._unsent(death) from death
                for worker in dead:
                    self.replace(worker, death)
        self.usage.busy_seconds += max(t.seconds for t in timed)
        self.usage.span("receive", {calls[call].number: t for call, t in zip(in_time, timed, strict=True)})
        self.marks.append(Mark(f"weights version {self.version}", time.time()))
        self.received = [t.value for t in timed]
        for call in in_time:
            self._has_proved(calls[call])
        self._loading.update({call: _Load(worker, self._publication) for call, worker in calls.items() if call not in in_time})

    def _unsent(self, failure: Exception) -> PublicationUnsent:
        """The publication could not be had, and no worker died of it: its sender is the one that is lost."""
        return PublicationUnsent("policy", f"the policy's weights {self.version} did not reach the {self.role} ({reason_of(failure)})")

    def _in_time(self, calls: Mapping[Any, Worker]) -> tuple[list[Any], Limit]:
        """Those of some calls to load weights that the driver waits for, in their order, and for how long.

        These are all, unless workers load by themselves (transport `object_store`): then it waits SLOW times as long as
        the first one took, at least SLOW_SECONDS.
        """
        begin, workers, of_all = time.monotonic(), list(calls.values()), self._limit(GeneratorWorker.receive)
        limit = Limit(of_all.seconds, lambda late: of_all.exceeded([self.workers.index(workers[index]) for index in late if index < len(workers)]))
        assert self._publication is not None
        if self._publication.transport != "object_store":
            return list(calls), limit
        for worker in workers:
            worker.since = begin
        if not ray.wait(list(calls), num_returns=1, timeout=limit.seconds)[0]:
            return list(calls), replace(limit, seconds=0.0)
        patience = max(SLOW_SECONDS, SLOW * (time.monotonic() - begin))
        ended = ray.wait(list(calls), num_returns=len(calls), timeout=patience)[0]
        return [call for call in calls if call in ended], limit

    def _send(self, workers: Sequence[Worker]) -> tuple[list[Any], list[Any]]:
        """Calls by which workers load the current publication, and those by which it is sent."""
        publication = self._publication
        assert publication is not None
        for worker in workers:
            worker.version = -1  # after a rewind there may be other weights of the same version
        hosts = [worker.host for worker in workers]
        publications, sending = TRANSPORTS[publication.transport].dispatch(publication, hosts, self._tensor_parallel)
        calls = [host.call.remote(self.role, GeneratorWorker.receive, (by_reference(mine),)) for host, mine in zip(hosts, publications, strict=True)]
        return calls, sending

    def _wait_for_some(self) -> list[Worker]:
        """Workers that do not load older weights still, once there are some; those that do are seen to while prompts are answered."""
        while not (found := [worker for worker in self.workers if worker not in self._at_a_load]):
            ray.wait(self.changing, num_returns=1, timeout=POLL_SECONDS)
            self.advance()
            self._see_loads()
            self.end_hung((), 0.0)
        return found

    @property
    def changing(self) -> list[Any]:
        """What ends when a worker can do more than before: it is there, or has loaded the current weights."""
        return [*self.on_their_way, *self._loading]

    @property
    def _at_a_load(self) -> list[Worker]:
        return [load.worker for load in self._loading.values()]

    def bring_up_to_date(self) -> None:
        """Workers that came since the last publication load it, without anybody waiting; raises WeightsError when one cannot prove it."""
        under_way = self._at_a_load
        for worker in self.workers:
            if worker.version != self.version and worker not in under_way:
                worker.since = time.monotonic()
                try:
                    self._loading[self._load(worker)] = _Load(worker, self._publication)
                except (PublicationLost, Disconnected, ray.exceptions.RayActorError) as lost:
                    raise self._unsent(lost) from lost
        self._see_loads()

    def _see_loads(self) -> None:
        """Which workers have loaded the current weights, that nobody waited for; what became of older ones does not matter, but to a worker that died."""
        for call in ray.wait(list(self._loading), num_returns=len(self._loading), timeout=0)[0] if self._loading else []:
            load = self._loading.pop(call)
            worker, is_current = load.worker, load.publication is self._publication
            try:
                ray.get(call)
            except (ray.exceptions.RayActorError, Disconnected) as death:
                if worker in self.workers:  # else it was sent away meanwhile
                    self.replace(worker, death)
                continue
            except PublicationLost as lost:
                if is_current:
                    raise self._unsent(lost) from lost
                continue
            if is_current:
                self._has_proved(worker)

    def _load(self, worker: Worker) -> Any:
        if self._publication is None:
            return worker.host.call.remote(self.role, GeneratorWorker.load_checkpoint, (self.version, self._checkpoint))
        (call,), _ = self._send([worker])
        return call

    def _has_proved(self, worker: Worker) -> None:
        worker.version = self.version
        if worker.newcomer:
            worker.newcomer = False
            self.joined += 1
            self.marks.append(Mark(f"{self.role} worker {worker.number} joined", time.time()))
            self._say(f"a {self.role} worker has joined, with weights version {self.version}; {len(self.workers)} of {self.size} are there")

    def end_hung(self, working: Collection[Worker], seconds: float, alone: Collection[int] = ()) -> None:
        """Some had work for so many seconds more. End workers that answered no prompt, or loaded weights, for placement.hang_after_s.

        `alone`: numbers of those whose prompts nobody else answers meanwhile.

        Their calls fail as those of the dead. A call that ended is no answer: an engine may take steps that lead nowhere.
        """
        for worker in working:
            worker.silent += seconds
        longest, now = self.cluster.config.hang_after_s, time.monotonic()
        hung = [index for index, worker in enumerate(self.workers) if worker.silent > longest]
        if self._restarts_left == 0 and len(hung) < len(self.able):
            hung = [index for index in hung if self.workers[index].number in alone]  # others answer what it holds, and none can take its place
        late = [index for index, worker in enumerate(self.workers) if worker in self._at_a_load and now - worker.since > longest]
        for index in hung + late:
            self.workers[index].silent, self.workers[index].since = 0.0, now
        for method, indices in ((GeneratorWorker.work, hung), (GeneratorWorker.receive, late)):
            if indices:
                self._end_hung(method, indices, longest)

    def can_use(self, path: str) -> bool:
        """Whether the engines can load the checkpoint at `path` in place of the one that they were built from."""
        return same_but_for_weights(path, self._built_from)

    def use_checkpoint(self, version: int = 0, path: str | None = None) -> None:
        """Generate with the checkpoint that the workers were built from, or one that they can use."""
        self._publication, self._checkpoint, self.version = None, path or self._built_from, version
        self.call(GeneratorWorker.load_checkpoint, version, self._checkpoint).result()
        for worker in self.workers:
            self._has_proved(worker)

    @property
    def able(self) -> list[Worker]:
        """Workers that may be given prompts: they have proved the current weights, and stay."""
        return [worker for worker in self.workers if worker.version == self.version and not worker.leaving]

    # ----------------------------------------------------------------------------------------------- generation

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Rollout]:
        """`sampling.n` rollouts per prompt, ordered by prompt and sample, whoever generated them."""
        return [rollout for chunk in self.stream(prompts, sampling, len(prompts)) for rollout in chunk]

    def stream(self, prompts: Sequence[Prompt], sampling: SamplingConfig, chunk: int) -> Iterator[list[Rollout]]:
        """The same in chunks of so many consecutive prompts, each as soon as it is whole, while the rest still generates.

        Which prompts make a chunk depends on nothing but their order. Workers may join, leave or die meanwhile; one that
        dies is replaced, up to generator.restart_limit times between two checkpoints, and what it had not finished is generated
        again, with the same tokens. A prompt of which workers die, again and again, gets rollouts without tokens that are not valid. With generator.sleep_between_phases workers sleep afterwards, and load the current
        publication again if they are asked for more before the next one.
        """
        if self._asleep and self._publication is not None:
            self._deliver()
        self.advance(look=True)  # what was asked between two steps counts for the next one
        finished: dict[int, list[Rollout]] = {}
        for position, answers in Generation(self, prompts, sampling, chunk).answers():
            finished[position] = [_rollout(prompts[position], sample, answer, self.version) for sample, answer in enumerate(answers)]
            members = range(position - position % chunk, min(position - position % chunk + chunk, len(prompts)))
            if all(member in finished for member in members):
                yield [rollout for member in members for rollout in finished[member]]
        self.rest()

    def rest(self) -> None:
        """Leave GPUs to the others until the next publication, or `stream`, with generator.sleep_between_phases; what was asked and not answered is forgotten."""
        if not self._config.sleep_between_phases or self._publication is None or self._asleep:
            return
        self._advance_until(self._nobody_is_being_built)  # else it would take its part of the GPU afterwards
        self.call(GeneratorWorker.sleep).result()
        for worker in self.workers:
            worker.version = -1
        self._loading.clear()  # these have ended too, and what was loaded is gone
        self._asleep = True

    def orders(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Order]:
        """An order for each prompt, with a number that no other has."""
        first, self._orders = self._orders, self._orders + len(prompts)
        seeds = [[sampling_seed(self._seed, prompt.serial, sample) for sample in range(sampling.n)] for prompt in prompts]
        return [Order(first + place, tuple(Request(prompt.token_ids, seed) for seed in seeds[place])) for place, prompt in enumerate(prompts)]

    def give_up(self, prompt: Prompt) -> None:
        """Ask nobody for an answer any more, since workers die of it; raises FatalPrompts."""
        self._say(self.given_up.add(prompt))

    def refill(self) -> None:
        super().refill()
        self.given_up.refill()

    def capacity(self, sampling: SamplingConfig) -> int:
        """Prompts that a worker computes at a time."""
        return max(1, self._config.max_num_seqs // sampling.n)

    # --------------------------------------------------------------------------------------------------- metrics

    def reset_usage(self) -> None:
        super().reset_usage()
        self.meter = Meter()

    def metrics(self) -> dict[str, float]:
        """About the last publication, and the pool in the step."""
        if not self.received or self._publication is None:
            return {}
        return {
            "weights/version": float(self.version),
            "weights/publish_bytes": float(self._publication.num_bytes),
            "weights/probe_gap": max(r.probe_gap for r in self.received),
            "weights/receive_s": max(r.seconds for r in self.received),
            "pool/generator/workers": float(self.meter.workers),
            "pool/generator/joined": float(self.joined),
            "pool/generator/left": float(self.left),
            "pool/generator/fatal_prompts": float(len(self.given_up)),
            "pool/generator/idle_share": self.meter.idle_share,
            "pool/generator/queue_depth": self.meter.queue_depth,
        }


class Generation:
    """Some prompts on their way to their answers."""

    def __init__(self, generator: Generator, prompts: Sequence[Prompt], sampling: SamplingConfig, chunk: int) -> None:
        self.generator, self.prompts, self.sampling = generator, prompts, sampling
        self.orders = generator.orders(prompts, sampling)
        # Chunk by chunk, so that the first can be scored early.
        longest_first = generator.lengths.longest_first([(prompt.source, len(prompt.token_ids)) for prompt in prompts], chunk)
        self.given_up = [position for position in longest_first if prompts[position] in generator.given_up]
        self.dispatch = Dispatch([position for position in longest_first if position not in self.given_up], generator.capacity(sampling))
        self.calls: dict[Any, Worker] = {}
        self.seconds: dict[int, float] = {}
        """Worker -> seconds that it computed."""

    def answers(self) -> Iterator[tuple[int, list[Answer]]]:
        """Position of a prompt and the answers to it, in the order in which they are complete; GIVEN_UP for one of which workers die."""
        generator, now = self.generator, time.monotonic()
        try:
            yield from ((position, [GIVEN_UP] * self.sampling.n) for position in self.given_up)
            while self.dispatch.open:
                self._hand_out()
                refs = [*self.calls, *generator.changing]
                done, _ = ray.wait(refs, num_returns=1, timeout=POLL_SECONDS)
                for call in [call for call in done if call in self.calls]:
                    yield from self._take(call)
                before, now = now, time.monotonic()
                generator.meter.passed(now - before, len(generator.able), self.dispatch.queue_depth)
                alone = [worker.number for worker in generator.workers if self.dispatch.holds_suspects(worker.number)]
                generator.end_hung(set(self.calls.values()), min(now - before, 2 * POLL_SECONDS), alone)  # no longer: this process may have been stopped
        finally:
            self._end()

    def _hand_out(self) -> None:
        """Everybody comes, goes and is told what to do."""
        generator, dispatch = self.generator, self.dispatch
        generator.advance(busy={worker.number for worker in generator.workers if dispatch.holds(worker.number)})
        generator.bring_up_to_date()
        for worker in generator.workers:
            if worker.leaving:
                dispatch.take_back(worker.number)
        dispatch.balance([worker.number for worker in generator.able], time.monotonic())
        for worker in generator.workers:
            while list(self.calls.values()).count(worker) < CALLS_AHEAD and dispatch.has_work(worker.number):
                self._call(worker)

    def _call(self, worker: Worker) -> None:
        told = self.dispatch.orders(worker.number)
        orders, dropped = [self.orders[position] for position in told.new], [self.orders[position].number for position in told.dropped]
        call = worker.host.call.remote(self.generator.role, GeneratorWorker.work, (orders, dropped, self.sampling, self.generator.version))
        self.calls[call] = worker

    def _take(self, call: Any) -> Iterator[tuple[int, list[Answer]]]:
        """The answers that a call has brought and nobody has given before."""
        worker = self.calls.pop(call)
        try:
            timed: Timed = ray.get(call)
        except ray.exceptions.RayActorError as death:
            if worker in self.generator.workers:  # else it has left, or its other call has said so
                yield from self._lose(worker, death)
            return
        self.seconds[worker.number] = self.seconds.get(worker.number, 0.0) + timed.seconds
        worker.memory_bytes = timed.memory_bytes
        self.generator.usage.span("generate", {worker.number: timed})
        self.generator.meter.busy += timed.seconds
        if timed.value:
            worker.silent = 0.0
        for number, answers in timed.value:
            position = number - self.orders[0].number
            if self.dispatch.finish(worker.number, position, time.monotonic()):
                for answer in answers:
                    self.generator.lengths.see(self.prompts[position].source, len(answer.completion.token_ids))
                yield position, answers

    def _lose(self, worker: Worker, death: Exception) -> Iterator[tuple[int, list[Answer]]]:
        """A worker died; GIVEN_UP as answers to the prompt of which it did, wherever that stands."""
        generator, now = self.generator, time.monotonic()
        fatal, seen_before = self.dispatch.lost(worker.number, now, blameless=generator.is_leaving_or_gone(worker))
        generator.replace(worker, death, by_a_prompt=seen_before)
        if fatal is not None:
            generator.give_up(self.prompts[fatal])
            twins = [position for position in self.dispatch.open if self.prompts[position] in generator.given_up]
            for position in twins:
                self.dispatch.close(position, now)
            yield from ((position, [GIVEN_UP] * self.sampling.n) for position in [fatal, *twins])

    def _end(self) -> None:
        """Count, and have workers forget what they were asked for and is not needed."""
        numbers = [order.number for order in self.orders]
        for worker in set(self.calls.values()) & set(self.generator.workers):
            worker.host.call.remote(self.generator.role, GeneratorWorker.drop, (numbers,))
        self.generator.usage.busy_seconds += max(self.seconds.values(), default=0.0)
        self.generator.usage.memory_bytes = sum(worker.memory_bytes for worker in self.generator.workers)


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
        valid=answer is not GIVEN_UP,
    )
