"""A role whose processes come and go while the job runs: asked for from outside, by autoscaling, or because one died.

A worker that joins is started beside the others, and is of use once it is built; nobody waits for it. One that leaves
first answers what it has begun.
"""

import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.group import Group, OutOfRestarts, R, RoleLost, has_died, reason_of
from actors.parent import driver_restarts
from actors.placement import Cluster, Place
from actors.rank_host import RankHost
from actors.watchdog import START_SECONDS, has_begun, place_of
from minigpt_ray.config import GeneratorPlacement
from minigpt_ray.scaling import Requests, refusal
from minigpt_ray.timeline import Mark

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""Longest time without a look at who joins, leaves or falls behind."""
LOOK_SECONDS = 1.0
"""Between two looks for a request."""
ROOM_SECONDS = 10.0
"""How long the cluster may take to make room before this is said; it goes on trying, since nodes may be on their way."""
SAY_AGAIN_SECONDS = 60.0
"""Between two times that this is said while there is no worker at all."""
INCIDENT_SECONDS = 5.0
"""Workers of one node that die within these are one incident."""


@dataclass(eq=False)
class Worker:
    """A process of the pool as the driver knows it."""

    number: int
    """Never given again."""
    place: Place
    host: Any
    newcomer: bool
    """It came to make the pool larger, and has not proved the weights yet."""
    version: int = -1
    """Weights that it has proved."""
    leaving: bool = False
    node: str = ""
    """Id of the node on which it runs."""
    whereabouts: dict[str, Any] = field(default_factory=dict)
    """As it said when it was built."""
    draining: bool = False
    """Its node has announced its end, and somebody else was started in its stead."""
    memory_bytes: int = 0
    started: float = field(default_factory=time.monotonic)
    """By the monotonic clock."""
    since: float = field(default_factory=time.monotonic)
    """When it was started, or began to load the weights that it loads, by the monotonic clock."""
    silent: float = 0.0
    """Seconds that it had work for since it last answered a prompt."""


@dataclass(eq=False)
class _Wish:
    """A place that the cluster has been asked for."""

    place: Place
    since: float
    newcomer: bool


class Pool(Group[R]):
    """The role as the driver sees it. `workers` are built and can be called; `size` is how many there should be."""

    def __init__(self, cluster: Cluster, role: str, build: Callable[..., R], *args: Any, restarts: int) -> None:
        """`restarts`: how often dead workers are replaced, together, until `refill`; after that the others go on without them, and the last one's death is an OutOfRestarts, unless another is on its way."""
        placement = cluster.roles[role]
        assert isinstance(placement, GeneratorPlacement)
        self.placement = placement
        self.size = placement.workers
        self.workers: list[Worker] = []
        self.joined = self.left = 0
        self._wishes: list[_Wish] = []
        self._coming: dict[Any, Worker] = {}
        self._numbers = 0
        self._asked: Callable[[], int | None] = lambda: None
        self._say: Callable[[str], object] = logger.warning
        self._looked, self._room_is_missed_at = 0.0, 0.0
        self._was_ready = False
        self._incident: tuple[str, float] = ("", 0.0)
        """The node on which workers died last, and when the first of them did."""
        super().__init__(cluster, role, build, *args, restarts=restarts)

    def start(self) -> None:
        """Begin to build as many workers as the configuration says; with a part of a GPU only in `ready`, since they measure what others have left of it."""
        self.hosts = []
        for _ in range(self.size):
            self._wish(newcomer=False)
        if self.placement.gpus == int(self.placement.gpus):
            self.advance()

    def ready(self) -> None:
        """Wait until everybody is there who was asked for, or the cluster has no room for those who are not."""
        self._advance_until(lambda: not self._coming and (not self._wishes or bool(self.workers and len(self._late_wishes) == len(self._wishes))))
        self._was_ready = True

    def _advance_until(self, enough: Callable[[], bool]) -> None:
        while not enough():
            ray.wait(self.on_their_way, num_returns=1, timeout=POLL_SECONDS)
            self.advance()

    @property
    def on_their_way(self) -> list[Any]:
        """References of which each, once it is there, is a reason to `advance`."""
        return [*(wish.place.made for wish in self._wishes), *self._coming]

    @property
    def changes(self) -> int:
        return self.restarts + self.joined + self.left

    def obey(self, requests: Requests, say: Callable[[str], object]) -> None:
        """From now on do what is asked for from outside, and `say` what becomes of it. What was asked of an earlier job is forgotten, not what a dead driver of this one was asked."""
        self._asked, self._say = requests.take, say
        if driver_restarts():
            self._obey(requests.take_again())
        else:
            requests.forget()

    def resize(self, size: int) -> None:
        """Be so many workers, in time: those that are too many leave, the youngest first; those that are missing are started."""
        self.size, self._room_is_missed_at = size, 0.0
        staying = [worker for worker in self.workers if not worker.draining]
        surplus = len(staying) + len(self._wishes) + len(self._coming) - size
        for wish in self._wishes[max(0, len(self._wishes) - max(0, surplus)) :]:
            self._wishes.remove(wish)
            self.cluster.give_back(self.role, wish.place)
            surplus -= 1
        for built in list(self._coming)[max(0, len(self._coming) - max(0, surplus)) :]:
            self._end(self._coming.pop(built))
            surplus -= 1
        for age, worker in enumerate(staying):
            worker.leaving = age >= len(staying) - surplus
        for _ in range(-surplus):
            self._wish(newcomer=True)

    def advance(self, busy: Collection[int] = (), look: bool = False) -> None:
        """Take the next step with everybody who comes or goes, without waiting; workers with the numbers `busy` do not end.

        Whether another size was asked for is seen once a second, and whenever the caller wants to `look`.
        """
        if look or time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()
        for wish in [wish for wish in self._wishes if wish.place.is_there()]:
            self._wishes.remove(wish)
            self._start(wish.place, wish.newcomer)
        self._miss_room()
        self._end_late()
        for built in ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0)[0] if self._coming else []:
            self._arrive(self._coming.pop(built), built)
        for worker in [worker for worker in self.workers if worker.leaving and worker.number not in busy]:
            self._leave(worker)

    def _leave(self, worker: Worker) -> None:
        self._end(worker)
        self.left += 1
        self.marks.append(Mark(f"{self.role} worker {worker.number} left", time.time()))
        self._say(f"a {self.role} worker has left; workers now: {len(self.workers)}")

    def replace(self, worker: Worker, death: Exception, by_a_prompt: bool = False) -> None:
        """Start another worker for a dead one: in its place, or, when its node is gone, where the cluster makes room.

        Those that died with one node cost one restart together, one that a prompt killed none. When none is left, the job
        goes on with the others.
        """
        if worker.leaving or worker.draining:  # nobody is to take its place, or somebody is on the way already
            self._leave(worker)
            return
        died, node = f"{self._name(worker)} ({place_of(worker.host)}) died", self._node_of(worker)
        is_gone = self.cluster.is_gone(node)
        if not by_a_prompt and not self._is_one_incident(worker, node, is_gone):
            if self._restarts_left == 0:
                self._do_without(worker, f"{died}, and {self._setting} is used up until the next checkpoint", death)
                return
            self._restarts_left -= 1
            self._incident = node, time.monotonic()
        self.mark_restart()
        logger.warning("%s%s; a new one takes its place, and the others its prompts", died, ", with prompts with which another one died" if by_a_prompt else "")
        if is_gone:
            self._end(worker)
            self._wish(newcomer=False)
        else:
            self._remove(worker)
            ray.kill(worker.host)  # it may have failed without a death of its process
            self._start(worker.place, newcomer=False)

    def is_leaving_or_gone(self, worker: Worker) -> bool:
        """Whether a worker was about to end, or its node has."""
        return worker.leaving or worker.draining or self.cluster.is_gone(self._node_of(worker))

    def _node_of(self, worker: Worker) -> str:
        return worker.node or self.cluster.node_of(worker.host)

    def _is_one_incident(self, worker: Worker, node: str, is_gone: bool) -> bool:
        """Whether a death has the cause of the one before: with the same node, which is gone, or soon after another one on it."""
        where, when = self._incident
        return bool(node) and node == where and (is_gone or (worker.started < when and time.monotonic() - when < INCIDENT_SECONDS))

    @property
    def _setting(self) -> str:
        """Name of the setting that says how often workers are replaced."""
        return f"{self.role}.restart_limit"

    def _do_without(self, worker: Worker, why: str, reason: Exception) -> None:
        """Nobody takes a worker's place; raises OutOfRestarts when no other is left, and none is on its way."""
        self._end(worker)
        self.size -= 1
        if not self._coming and not self._wishes and all(other.leaving for other in self.workers):
            raise OutOfRestarts(self.role, self._setting) from reason
        self._say(f"{why}; the job goes on with {self.size}")

    def name_of(self, index: int) -> str:
        return self._name(self.workers[index])

    def _name(self, worker: Worker) -> str:
        return f"{self.role} worker {worker.number}"

    def whereabouts(self) -> list[dict[str, Any]]:
        """Where each worker's process is; its rank is its number."""
        return [{"rank": worker.number, **worker.whereabouts} for worker in self.workers]

    def close(self) -> None:
        """End all processes; their places stay reserved."""
        for worker in [*self.workers, *self._coming.values()]:
            ray.kill(worker.host)
            self.cluster.keep(self.role, worker.place)
        for wish in self._wishes:
            self.cluster.keep(self.role, wish.place)
        self.workers, self._coming, self._wishes, self.hosts = [], {}, [], []

    def _wish(self, newcomer: bool) -> None:
        """Ask the cluster for room for one more worker."""
        self._wishes.append(_Wish(self.cluster.place(self.role), time.monotonic(), newcomer))

    @property
    def _late_wishes(self) -> list[_Wish]:
        return [wish for wish in self._wishes if time.monotonic() - wish.since > ROOM_SECONDS]

    def _revive(self, lost: RoleLost) -> None:
        """Replace those that are dead; all when none is known to be, so that what fails without a death is not repeated for ever."""
        for worker in [worker for worker in self.workers if has_died(worker.host.address.remote())] or list(self.workers):
            self.replace(worker, lost)
        self._advance_until(lambda: bool(self.hosts) and all(worker.newcomer for worker in self._coming.values()))

    def _nobody_is_being_built(self) -> bool:
        """Whether those that are on their way are newcomers, or have no process, since the room for it went with a node."""
        late = time.monotonic() - ROOM_SECONDS
        return all(worker.newcomer or (worker.since < late and not has_begun(worker.host)) for worker in self._coming.values())

    def _look(self) -> None:
        """See whether another size was asked for, and which nodes end."""
        self._looked = time.monotonic()
        self._leave_nodes()
        self._obey(self._asked())

    def _obey(self, asked: int | None) -> None:
        if asked is None:
            return
        refused = refusal(asked, self.placement)
        if not refused:
            self.resize(asked)
        self._say(refused or f"the {self.role} goes from {len(self.workers)} to {asked} workers")

    def _leave_nodes(self) -> None:
        """Where a node has announced its end, start a worker elsewhere for each that it holds; these leave once the others are there."""
        ending = self.cluster.draining_nodes()
        for worker in self.workers:
            if worker.node in ending and not worker.draining and not worker.leaving:
                worker.draining = True
                self._wish(newcomer=False)
                self._say(f"the node of {self.role} worker {worker.number} is about to end; another one is started elsewhere")
        if sum(not worker.draining for worker in self.workers) >= self.size:
            for worker in self.workers:
                worker.leaving = worker.leaving or worker.draining

    def _miss_room(self) -> None:
        """Say that the cluster has no room for everybody: once, but again and again while that keeps the job from going on."""
        late = self._late_wishes
        if not late:
            self._room_is_missed_at = 0.0
        elif not self._room_is_missed_at or (len(late) == self.size and time.monotonic() - self._room_is_missed_at > SAY_AGAIN_SECONDS):
            self._room_is_missed_at = time.monotonic()
            needs = ", ".join(f"{amount:g} {name}" for name, amount in self.cluster.needs(self.role).items())
            goes_on = f"the job goes on with {self.size - len(late)}, and the others join" if len(late) < self.size else "the job goes on"
            self._say(
                f"the cluster has no room for {len(late)} of {self.size} {self.role} workers ({needs} each); {goes_on} when nodes are added; "
                f"on one machine set placement.{self.role}.max_workers before the start"
            )

    def _end_late(self) -> None:
        """End workers that are being built for too long: their calls fail as those of the dead."""
        seconds = max(self.cluster.config.hang_after_s, START_SECONDS)
        for built, worker in list(self._coming.items()):
            if time.monotonic() - worker.since <= seconds:
                continue
            worker.since = time.monotonic()
            if has_begun(worker.host) or worker.newcomer:
                self.cluster.end_hung({self._name(worker): worker.host}, RankHost.build.__qualname__, seconds)
            else:  # it has no process: its room went with a node, and another one may come
                del self._coming[built]
                self._end(worker)
                self._wish(newcomer=False)

    def _start(self, place: Place, newcomer: bool) -> None:
        worker = Worker(self._numbers, place, self.cluster.host(self.role, self._numbers, place), newcomer)
        self._numbers += 1
        self._coming[worker.host.build.remote(self.role, self._build, *self._args)] = worker

    def _arrive(self, worker: Worker, built: Any) -> None:
        """The worker is built, or could not be: then the job goes on without a newcomer."""
        try:
            worker.whereabouts = ray.get(built)
        except ray.exceptions.RayError as error:
            reason = reason_of(error)
            if worker.newcomer:
                self._do_without(worker, f"a {self.role} worker that was to join could not start ({reason})", error)
            elif self._was_ready or isinstance(error, ray.exceptions.RayActorError):
                logger.warning("%s could not start (%s)", self._name(worker), reason)
                self.replace(worker, error)
            else:
                raise
            return
        worker.node = self.cluster.node_of(worker.host)
        self.workers.append(worker)
        self.hosts = [worker.host for worker in self.workers]

    def _end(self, worker: Worker) -> None:
        """End a worker's process and give its place back."""
        self._remove(worker)
        ray.kill(worker.host)
        self.cluster.give_back(self.role, worker.place)

    def _remove(self, worker: Worker) -> None:
        self.workers = [other for other in self.workers if other is not worker]
        self.hosts = [other.host for other in self.workers]
