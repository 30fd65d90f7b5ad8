"""Groups of ranks: how the driver talks to the processes that compute.

A role is a plain class with one instance per rank, built by tests without Ray. A RankHost is the Ray actor that holds
rank objects, of one role or of several that share it. A Group is the role as the driver sees it: it sends a method,
never its name, and gets a Pending back.
"""

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar, overload

import ray

from actors.attempts import first_line
from actors.rank_host import PULSE, Disconnected, RankHost, Shared, Timed
from actors.watchdog import START_SECONDS, Limit, is_dead, place_of, wait_for_word
from minigpt_ray.timeline import Mark, Span

if TYPE_CHECKING:
    from actors.placement import Cluster

logger = logging.getLogger(__name__)
GRACE_SECONDS = 5.0
"""How long, after a rank failed, another one's death may take to show: a collective breaks before Ray reports the process that broke it."""

A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")
D = TypeVar("D")
R = TypeVar("R")
T = TypeVar("T")
P = ParamSpec("P")


_shared: dict[int, tuple[weakref.ref[Any], Shared]] = {}


def by_reference(value: Any) -> Any:
    """A dataclass value (a batch, an experience) goes into the object store, once per living object; the rest travels as it is."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    key = id(value)
    if key not in _shared:
        _shared[key] = (weakref.ref(value, lambda _: _shared.pop(key, None)), Shared(ray.put(value)))
    return _shared[key][1]


class Pending(Generic[T]):
    """A result that is being computed elsewhere."""

    def __init__(self, result: Callable[[], T]) -> None:
        self._result = result

    def result(self) -> T:
        """Wait for it. An exception of a rank is raised here with its own type and the remote traceback."""
        return self._result()

    def then(self, change: Callable[[T], B]) -> "Pending[B]":
        return Pending(lambda: change(self._result()))

    @classmethod
    def done(cls, value: T) -> "Pending[T]":
        return cls(lambda: value)


@overload
def gather(a: Pending[A], b: Pending[B], /) -> Pending[tuple[A, B]]: ...
@overload
def gather(a: Pending[A], b: Pending[B], c: Pending[C], /) -> Pending[tuple[A, B, C]]: ...
@overload
def gather(a: Pending[A], b: Pending[B], c: Pending[C], d: Pending[D], /) -> Pending[tuple[A, B, C, D]]: ...
def gather(*pending: Pending[Any]) -> Pending[Any]:
    """Several results that are computed side by side, as one."""
    return Pending(lambda: tuple(p.result() for p in pending))


@dataclass
class Usage:
    """What a role's ranks have done since the counting began."""

    busy_seconds: float = 0.0
    """Of the busiest rank, summed over calls."""
    memory_bytes: int = 0
    """Of all its ranks together."""
    spans: list[Span] = field(default_factory=list)
    """Every call on every rank."""

    def span(self, name: str, calls: Mapping[int, Timed]) -> None:
        """A call, and what it took each rank."""
        self.spans += [Span(rank, name, timed.start, timed.start + timed.seconds) for rank, timed in calls.items()]


def covered_seconds(spans: Iterable[Span]) -> float:
    """Length of the union of time spans, which may overlap: how long at least one of them lasted."""
    covered, end = 0.0, -math.inf
    for start, stop in sorted((span.start, span.stop) for span in spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered


class RoleLost(RuntimeError):
    """A process of a role died, or lost the others, and the role cannot be brought back without its state."""

    def __init__(self, role: str, what: str = "") -> None:
        """`what` happened to which of its processes, and where, as far as this is known."""
        super().__init__(what or f"a process of {role} died")
        self.role = role


class PublicationUnsent(RoleLost):
    """The weights of a role did not reach who was to load them, so a process of it may have died."""


class OutOfRestarts(RuntimeError):
    """Processes of a role died more often than they may be replaced."""

    def __init__(self, role: str, limit: str, last: object = "") -> None:
        """`last`: what happened the last time."""
        cause = f"see their logs for the cause{f' (the last time: {last})' if last else ''}"
        super().__init__(f"processes of {role} died more often than {limit} allows; {cause}; PPO goes on with checkpoint.resume=auto")


class Group(Generic[R]):
    """One role on its ranks."""

    def __init__(self, cluster: "Cluster", role: str, build: Callable[..., R], *args: Any, form_group: bool = False, restarts: int = 0) -> None:
        """Starts to build the rank objects, all at the same time; `ready` waits for them.

        form_group: the ranks join one process group. restarts: how often the processes are replaced when one of them dies,
        and the call repeated, which suits roles that keep no state; else, and after that, the caller gets a RoleLost.
        """
        self.cluster, self.role, self._form_group = cluster, role, form_group
        self._build, self._args = build, args
        self._places: list[dict[str, Any]] = []
        self._joining: list[Any] = []
        self._restart_limit = self._restarts_left = restarts
        self.restarts = 0
        self.usage = Usage()
        self.marks: list[Mark] = []
        """What happened to its processes, until somebody takes it."""
        self.start()

    def start(self) -> None:
        """Start processes and build the rank objects in them; raises RoleLost when one that is to bring them together dies before."""
        self.hosts = self.cluster.hosts(self.role)
        try:
            self._joining = self.cluster.form_group(self.role) if self._form_group else []
        except ray.exceptions.RayActorError as death:
            raise self._lost(death) from death
        self._building = [host.build.remote(self.role, self._build, *self._args) for host in self.hosts]

    def ready(self) -> None:
        """Wait until the rank objects are built; raises RoleLost when a process dies before."""
        try:
            self._places = get_all([*self._building, *self._joining], self._limit(RankHost.build, START_SECONDS))[: len(self._building)]
        except (ray.exceptions.RayActorError, Disconnected) as death:
            raise self._lost(death) from death

    def _limit(self, method: Callable[..., Any], at_least: float = 0.0) -> Limit:
        """Of calls to all processes of this role, in their order: those that exceed it are ended. Calls to others may follow, which are let be."""
        begin, seconds = time.monotonic(), max(self.cluster.patience(self.role), at_least)

        def exceeded(indices: Sequence[int]) -> None:
            self._end_hung(method, [index for index in indices if index < len(self.hosts)], time.monotonic() - begin)

        look_after = self.cluster.config.hang_after_s
        if at_least or seconds <= look_after or not self.cluster.with_pulse(self.role):
            return Limit(seconds, exceeded)
        return Limit(seconds, exceeded, look_after, self._silent)

    def _end_hung(self, method: Callable[..., Any], indices: Sequence[int], seconds: float) -> None:
        """Say where these processes hang in a method, for so many seconds, and kill them."""
        self.cluster.end_hung({self.name_of(index): self.hosts[index] for index in indices}, method.__qualname__, seconds)

    def _silent(self, indices: Sequence[int]) -> list[int]:
        """Which of these processes give no sign of life, in as long as a call may take that was granted no more."""
        pulses = {index: self.hosts[index].pulse.options(concurrency_group=PULSE).remote() for index in indices}
        given, _ = ray.wait(list(pulses.values()), num_returns=len(pulses), timeout=self.cluster.config.hang_after_s)
        return [index for index, pulse in pulses.items() if pulse not in given]

    def name_of(self, index: int) -> str:
        """What a process of the role is called in a message."""
        return f"{self.role} rank {index} of {len(self.hosts)}"

    def each(self, method: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Pending[list[T]]:
        """The method on every rank, each with arguments of its own; results in rank order."""
        return self._submit(method, lambda: arguments)

    def _submit(self, method: Callable[..., T], arguments: Callable[[], Sequence[tuple[Any, ...]]]) -> Pending[list[T]]:
        """`arguments`: of those ranks that there are when the call is made, which may be made again."""

        def submit() -> tuple[list[Any], list[Any]]:
            return self.hosts, [host.call.remote(self.role, method, tuple(map(by_reference, args))) for host, args in zip(self.hosts, arguments(), strict=True)]

        hosts, refs = submit()

        def result() -> list[T]:
            nonlocal hosts, refs
            while True:
                try:
                    timed = get_all(refs, self._limit(method))
                    break
                except (ray.exceptions.RayActorError, Disconnected) as death:
                    if self.hosts is hosts:
                        self._revive(self._lost(death))
                    elif self.cluster.with_a_learner(self.role):  # a call to what they were before they started again
                        raise RoleLost(self.role) from death
                    hosts, refs = submit()
            self.usage.busy_seconds += max((t.seconds for t in timed), default=0.0)
            self.usage.memory_bytes = sum(t.memory_bytes for t in timed)
            self.usage.span(method.__name__, dict(enumerate(timed)))
            return [t.value for t in timed]

        return Pending(result)

    def _revive(self, lost: RoleLost) -> None:
        """Replace the processes, and those too that die while they start, as on a host that is gone and not yet known to be."""
        if self._restarts_left == 0 or self.cluster.with_a_learner(self.role):
            raise lost
        self._restarts_left -= 1
        logger.warning("%s; the role is started again and the call repeated", lost)
        try:
            self.restart()
        except RoleLost as again:
            self._revive(again)

    def _lost(self, failure: ray.exceptions.RayActorError | Disconnected) -> RoleLost:
        """Names those that died; else what failed."""
        dead = self._dead()
        if not dead:
            if isinstance(failure, Disconnected):
                return RoleLost(self.role, f"ranks of {self.role} lost each other, and none of them died ({reason_of(failure)})")
            dead = [index for index, host in enumerate(self.hosts) if host._actor_id.hex() == failure.actor_id]
        return RoleLost(self.role, self._died(dead))

    def _dead(self) -> list[int]:
        """Processes that Ray reports as dead, soon, or some time later where one takes no connections."""
        end = time.monotonic() + GRACE_SECONDS
        while not any(map(is_dead, self.hosts)) and time.monotonic() < end:
            time.sleep(0.1)
        wait_for_word(self.hosts)
        return [index for index, host in enumerate(self.hosts) if is_dead(host)]

    def _died(self, indices: Sequence[int]) -> str:
        return f"{', '.join(f'{self.name_of(index)} ({place_of(self.hosts[index])})' for index in indices)} died" if indices else ""

    def who_died(self) -> str:
        """`policy rank 0 of 2 (process 4711 on 10.0.0.5) died`, of all that did; empty when none has."""
        return self._died(self._dead())

    def restart(self) -> None:
        """End the processes, start new ones and wait until they are ready."""
        self.mark_restart()
        self.close()
        self.start()
        self.ready()

    def refill(self) -> None:
        """The run has got further since processes were replaced, so as many may be replaced again."""
        self._restarts_left = self._restart_limit

    def mark_restart(self) -> None:
        """Processes of the role are replaced."""
        self.restarts += 1
        self.marks.append(Mark(f"{self.role} restarted", time.time()))

    def call(self, method: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[list[T]]:
        """The method on every rank, with the same arguments; one result per rank."""
        assert not kwargs, "remote methods take positional arguments"
        return self._submit(method, lambda: [args] * len(self.hosts))

    def first(self, method: Callable[Concatenate[R, P], T], *args: P.args, **kwargs: P.kwargs) -> Pending[T]:
        """The method on every rank; the result of rank 0."""
        return self.call(method, *args, **kwargs).then(lambda results: results[0])

    def scatter(self, method: Callable[[R, A], T], batch: A, join: Callable[[list[T]], T]) -> Pending[T]:
        """The method on every rank, each of which takes its share of the rows of `batch`; results are joined in rank order."""
        return self.each(method, [(batch,)] * len(self.hosts)).then(join)

    @property
    def changes(self) -> int:
        """How often processes of this role have come or gone since the first were there."""
        return self.restarts

    def whereabouts(self) -> list[dict[str, Any]]:
        """Where each rank's process is, as it said when it was ready."""
        return [{"rank": index, **place} for index, place in enumerate(self._places)]

    def close(self) -> None:
        """End the processes, so that their place is free."""
        for host in self.hosts:
            ray.kill(host)

    def reset_usage(self) -> None:
        """Begin to count: what was done before, an evaluation for example, belongs to no step."""
        self.usage = Usage()

    def usage_metrics(self, seconds: float) -> dict[str, float]:
        """Idle share (0 to 1) over the last `seconds`, in which the counting began, resident memory in GiB, and restarts."""
        usage = self.usage
        return {
            f"time/idle_share/{self.role}": max(0.0, 1 - usage.busy_seconds / seconds),
            f"memory/{self.role}_gib": usage.memory_bytes / 2**30,
            f"restarts/{self.role}": float(self.restarts),
        }


def get_all(refs: Sequence[Any], limit: Limit | None = None) -> list[Any]:
    """Results in order. Raises as soon as one call fails: RayActorError when a process died, even if another rank was the first to notice.

    limit: of the seconds from now, and of silence; calls that exceed it end as if their processes had died, since then they have, or exceed it again.
    """
    waiting = list(refs)
    end = math.inf if limit is None else time.monotonic() + limit.seconds
    look = math.inf if limit is None else time.monotonic() + limit.look_after
    while waiting:
        until = min(end, look)
        done, waiting = ray.wait(waiting, num_returns=1, timeout=None if until == math.inf else max(0.0, until - time.monotonic()))
        if not done:
            assert limit is not None
            late = [index for index, ref in enumerate(refs) if ref in waiting]
            is_over = end <= look
            late = late if is_over else limit.silent(late)
            if late:
                limit.exceeded(late)
            end = time.monotonic() + max(limit.seconds, GRACE_SECONDS) if is_over else end
            look = time.monotonic() + limit.look_after
            continue
        try:
            ray.get(done)
        except ray.exceptions.RayActorError:
            raise
        except Exception as first:
            failed, _ = ray.wait(waiting, num_returns=len(waiting), timeout=GRACE_SECONDS) if waiting else ([], [])
            others = [failure for ref in failed if (failure := failure_of(ref)) is not None]
            deaths = [failure for failure in others if isinstance(failure, ray.exceptions.RayActorError)]
            causes = [failure for failure in others if not isinstance(failure, Disconnected)] if isinstance(first, Disconnected) else []
            for cause in [*deaths, *causes][:1]:
                raise cause from None
            raise
    return ray.get(list(refs))


def reason_of(failure: BaseException) -> str:
    """Type and first line of what a call failed with, as the rank raised it."""
    return first_line(failure.cause if isinstance(failure, ray.exceptions.RayTaskError) else failure)


def has_died(ref: Any) -> bool:
    """Whether a call ended, now or within the grace, because its process died."""
    return isinstance(failure_of(ref), ray.exceptions.RayActorError)


def failure_of(ref: Any) -> Exception | None:
    """With what a call failed, now or within the grace; None when it did not."""
    done, _ = ray.wait([ref], timeout=GRACE_SECONDS)
    try:
        ray.get(done)
    except ray.exceptions.RayError as error:
        return error
    return None
