"""Who runs where: the cluster, its pre-flight, placement groups, the processes of a role."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants
from ray._private import state as ray_state
from ray._private.node import Node
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.group import get_all
from actors.parent import driver_restarts, ends_by
from actors.preflight import DECIMALS, PlacementError, bundle, in_order, preflight, table
from actors.rank_host import PULSE, RankHost
from actors.watchdog import START_SECONDS, Limit, end_hung, record_of
from minigpt_ray.config import AnyPlacement, AnyReward, GeneratorPlacement, ModelReward, PlacementConfig, RolePlacement
from minigpt_ray.flops import cpu_peak_flops, gpu_peak_flops
from minigpt_ray.imports import without_collection

logger = logging.getLogger(__name__)

CHECKOUT = Path(__file__).resolve().parents[1]

RESERVE_SECONDS = 30.0
"""How long Ray may take to reserve room that is there."""

PASSED_ON = ("CUDA_HOME", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE")
PASSED_ON_PREFIXES = ("GLOO_", "MALLOC_", "NCCL_")
"""Environment variables of the driver that all its processes get, on whichever node. No secret is among them: a runtime
environment is shown by Ray's dashboard and stands in its logs. HF_TOKEN belongs into the environment of the nodes."""


def environment(threads: int) -> dict[str, Any]:
    """Ray's runtime environment of one process: its threads, where to import from, quiet libraries, and PASSED_ON."""
    return {
        "env_vars": {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DEEPSPEED_LOG_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TORCH_LOGS": "-torch._library.triton",  # errors alone: it warns that there is no Triton, as on any CPU
            "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning:multiprocessing.resource_tracker",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **{name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(PASSED_ON_PREFIXES)},
        }
    }


def environment_of(cpus: int, gpus: float) -> dict[str, Any]:
    """That of a process: one that asked for no GPU sees none, also on a cluster that was started without being told so."""
    found = environment(cpus)
    return found if gpus else {"env_vars": {**found["env_vars"], "CUDA_VISIBLE_DEVICES": ""}}


def roles_of(config: PlacementConfig, rewards: Mapping[str, AnyReward], critic: bool = True) -> dict[str, AnyPlacement]:
    """The roles of a PPO job, with or without a critic, that have processes of their own; the others live in theirs."""
    learners = {"policy": config.policy, **({"critic": config.critic} if critic else {})}
    roles: dict[str, AnyPlacement] = {"generator": config.generator, **learners, "reference": config.reference, **_reward_roles(config, rewards)}
    return {name: role for name, role in roles.items() if config.home(name) == name}


def roles_of_evaluation(config: PlacementConfig, rewards: Mapping[str, AnyReward]) -> dict[str, AnyPlacement]:
    """The roles of an evaluation job."""
    return {"generator": config.generator, **_reward_roles(config, rewards)}


def _reward_roles(config: PlacementConfig, rewards: Mapping[str, AnyReward]) -> dict[str, RolePlacement]:
    models = sum(isinstance(source, ModelReward) for source in rewards.values())
    return {"rewards": RolePlacement(), **{f"reward_model_{i}": config.reward_model for i in range(models)}}


def _needed(role: AnyPlacement) -> AnyPlacement:
    """What must be there for a job to begin: of a pool, when a driver follows a dead one, the fewest workers; the others join when there is room."""
    if isinstance(role, GeneratorPlacement) and driver_restarts():
        return role.model_copy(update={"workers": role.min_workers})
    return role


def _both(rank: RolePlacement, worker: GeneratorPlacement) -> RolePlacement:
    """Room for a rank and a worker that share a GPU."""
    resources = {name: rank.resources.get(name, 0) + worker.resources.get(name, 0) for name in rank.resources | worker.resources}
    together = {"cpus": rank.cpus + worker.cpus, "gpus": round(rank.gpus + worker.gpus, DECIMALS), "resources": resources}
    return rank.model_copy(update=together | {"labels": rank.labels | worker.labels})


@dataclass(frozen=True)
class Place:
    """Room for one process: a bundle of a placement group."""

    group: PlacementGroup
    bundle: int
    made: Any
    """Reference that is there once the cluster has made the room."""
    shared: bool = False
    """A rank of another role lives here too."""

    def is_there(self) -> bool:
        return bool(ray.wait([self.made], timeout=0)[0])


@dataclass
class Started:
    """Processes that run, the roles that live in them, and whether they have formed a process group."""

    hosts: list[Any]
    tenants: set[str] = field(default_factory=set)
    joined: bool = False


class Cluster:
    """The Ray cluster while a job runs: checks that the request fits, then starts hosts where their bundles are."""

    def __init__(self, config: PlacementConfig, roles: Mapping[str, AnyPlacement], memory: Mapping[str, float] | None = None) -> None:
        """memory: estimated GiB of one rank, on its GPU or in its host, of those roles of which it is known."""
        self.config, self.roles = config, roles
        self._started: dict[str, Started] = {}
        self._patience: dict[str, float] = {}
        self._groups: set[PlacementGroup] = set()
        rooms = [(r.room if isinstance(r, GeneratorPlacement) else r.ranks) * r.cpus for r in roles.values()]
        own = connect(config.address, cpus=sum(rooms))
        memory, needed = dict(memory or {}) if config.check_memory else {}, {name: _needed(role) for name, role in roles.items()}
        home = config.home("policy")
        pair = f"{home} + generator" if config.pairs and {home, "generator"} <= roles.keys() else ""
        if pair:
            both = _both(getattr(config, home), config.generator)
            needed = {pair: both, **{name: role for name, role in needed.items() if name not in (home, "generator")}}
            memory |= {pair: memory[home] + memory["generator"]} if {home, "generator"} <= memory.keys() else {}
        preflight(needed, memory, config.wait_seconds, own)
        try:
            self._places = {name: self._reserve(name, needed[name]) for name in in_order(needed, memory)}
        except PlacementError as error:
            self.close()
            raise PlacementError("\n".join([str(error), *table(needed, memory)])) from None
        if pair:
            self._places[home] = self._places.pop(pair)
            self._places["generator"] = [replace(place, shared=True) for place in self._places[home]]

    def _reserve(self, name: str, role: AnyPlacement) -> list[Place]:
        """Places for the processes of a role; those of a pool have a placement group each, since they are given back one by one."""
        sizes = [1] * role.ranks if isinstance(role, GeneratorPlacement) else [role.ranks]
        groups = [self._group(role, size) for size in sizes]
        if not all(group.wait(RESERVE_SECONDS) for group in groups):
            raise PlacementError(
                f"Ray found no room for placement.{name} beside the roles that came before it, though there was some; "
                "give every role the labels of the nodes that are meant for it, or free what others took meanwhile"
            )
        return [Place(group, bundle, group.ready()) for group, size in zip(groups, sizes, strict=True) for bundle in range(size)]

    def _group(self, role: AnyPlacement, size: int) -> PlacementGroup:
        needs, labels = [bundle(role)] * size, [role.labels] * size
        strategy = (isinstance(role, RolePlacement) and role.strategy) or self.config.strategy
        group = placement_group(needs, strategy=strategy.upper(), bundle_label_selector=labels)
        self._groups.add(group)
        return group

    def needs(self, name: str) -> dict[str, float]:
        """What one process of a role takes of a node."""
        return bundle(self.roles[name])

    def place(self, name: str) -> Place:
        """Room for one more process of a pool: reserved and free, or else asked for, and there once the cluster has it."""
        if self._places[name]:
            return self._places[name].pop(0)
        group = self._group(self.roles[name], 1)
        return Place(group, 0, group.ready())

    def node_of(self, host: Any) -> str:
        """Id of the node on which a process runs."""
        return str(record_of(host)["Address"]["NodeID"])

    def is_gone(self, node: str) -> bool:
        """Whether a node has left the cluster, by its id."""
        return any(found["NodeID"] == node and not found["Alive"] for found in ray.nodes())

    def draining_nodes(self) -> set[str]:
        """Ids of the nodes that have announced their end: given up by the autoscaler, about to be taken away, or told so by `ray drain-node`."""
        return set(ray_state.state.get_draining_nodes())

    def keep(self, name: str, place: Place) -> None:
        """A place of a pool is free, and stays reserved."""
        self._places[name].append(place)

    def give_back(self, name: str, place: Place) -> None:
        """A place of a pool is not needed any more; what still runs in it ends, unless it is another role's, which keeps it."""
        if place.shared:
            self.keep(name, place)
            return
        remove_placement_group(place.group)
        self._groups.discard(place.group)

    def home(self, role: str) -> str:
        """The role whose processes `role` lives in."""
        return role if role in self.roles else self.config.home(role)

    def patience(self, role: str) -> float:
        """Seconds that a call to a role may take: placement.hang_after_s, or what it was granted, or a role whose calls come before it in the same processes."""
        return max(self.config.hang_after_s, self._patience.get(self.home(role), 0.0))

    def grant(self, role: str, seconds: float) -> None:
        """Calls to a role may take so long, even where placement.hang_after_s is less."""
        self._patience[self.home(role)] = max(seconds, self._patience.get(self.home(role), 0.0))

    def with_pulse(self, role: str) -> bool:
        """Whether the processes of a role answer while they compute: those that ask reward sources, whose calls may take long."""
        return self.home(role) == self.home("rewards")

    def with_a_learner(self, role: str) -> bool:
        """Whether a role lives in a learner's processes, or is one: their death takes the learner's state with it."""
        return self.home(role) in (self.home("policy"), self.home("critic"))

    def hosts(self, role: str) -> list[Any]:
        """The processes of a role, started now unless a role that shares them has."""
        name = self.home(role)
        if name not in self._started or role in self._started[name].tenants:  # a role that comes again has ended its processes
            self._started[name] = Started([self.host(name, index, place) for index, place in enumerate(self._places[name])])
        self._started[name].tenants.add(role)
        return list(self._started[name].hosts)

    def form_group(self, role: str) -> list[Any]:
        """Calls by which a role's processes join one process group, none when they have; RayActorError when the first of them has died."""
        name = self.home(role)
        started = self._started[name]
        if started.joined:
            return []
        first = {f"{name} rank 0 of {len(started.hosts)}": started.hosts[0]}
        limit = Limit(START_SECONDS, lambda _: self.end_hung(first, "its start", START_SECONDS))
        ((address, port),) = get_all([started.hosts[0].address.remote()], limit)
        started.joined = True
        return [host.join.remote(address, port, self.config.hang_after_s) for host in started.hosts]

    def host(self, name: str, index: int, place: Place) -> Any:
        """Start process `index` of a role in its place."""
        check_own_node()
        role = self.roles[name]
        remote: Any = ray.remote
        kind = remote(concurrency_groups={PULSE: 1})(RankHost) if self.with_pulse(name) else remote(RankHost)
        actor = kind.options(
            num_cpus=role.cpus,
            num_gpus=role.gpus,
            resources=role.resources,
            scheduling_strategy=PlacementGroupSchedulingStrategy(place.group, placement_group_bundle_index=place.bundle),
            runtime_env=environment_of(role.cpus, role.gpus),
        )
        shares_gpu = 0 < role.gpus < 1 and not isinstance(role, GeneratorPlacement)  # vLLM keeps its part, and gives it back when it sleeps
        return actor.remote(index, role.ranks, "cuda" if role.gpus else "cpu", shares_gpu)

    def end_hung(self, hosts: Mapping[str, Any], method: str, seconds: float) -> None:
        """Say where these processes hang, and kill them: their calls end with RayActorError."""
        end_hung(hosts, method, seconds, environment(1))

    def close(self) -> None:
        """End the roles' processes at once, since one that is asked to end may say what that interrupts; give the reservations back, and what is left in them ends."""
        for started in self._started.values():
            for host in started.hosts:
                ray.kill(host)
        for group in self._groups:
            remove_placement_group(group)

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def peak_flops(roles: Mapping[str, AnyPlacement], devices: Iterable[str]) -> float:
    """FLOP/s that all devices of the roles can do together: GPUs, all like the first of `devices` that is one, else this machine's cores."""
    gpus = sum(role.ranks * role.gpus for role in roles.values())
    if gpus:
        return gpus * gpu_peak_flops(next(device for device in devices if device != "cpu"), "bfloat16")
    return cpu_peak_flops(min(os.cpu_count() or 1, sum(role.ranks * role.cpus for role in roles.values())))


def connect(address: str | None, cpus: int) -> bool:
    """Join a cluster, or start one on this machine with as many logical CPUs as the roles ask for; whether it was started, and is this job's own."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers run at nice 15 and anything else starves them
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # every role has an environment of its own, which such workers lack
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # a role that asked for no GPU sees none
    if ray.is_initialized():
        return False
    if address is not None or "RAY_ADDRESS" in os.environ:
        ray.init(address=address or "auto", logging_level=logging.ERROR, log_to_driver=True)
        _answer_sigterm()
        return False
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # a local one that is gone never comes back
    os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # what every process did, each second, for a dashboard that is not there
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's switch for computers with a firewall: its processes then listen on the loopback address alone
    start = partial(ray.init, address="local", num_cpus=max(cpus, os.cpu_count() or 1), include_dashboard=False, logging_level=logging.ERROR)
    threading.Thread(target=import_module, args=("torch",)).start()  # what the driver imports next takes as long as Ray's processes
    with _without_needless_processes(), without_collection():
        try:
            start()
        except Exception as error:  # Ray has no type for it, and waits half a minute, which a busy machine may exceed
            if "timed out during startup" not in str(error):
                raise
            logger.warning("Ray did not start in time on this machine, which is busy; once more")
            ray.shutdown()
            start()
    _answer_sigterm()
    return True


def _answer_sigterm() -> None:
    """From now on SIGTERM ends this process as it did before Ray came, whose handlers print a stack and give another code; and in good order."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # `ray job stop` sends one to the driver, and its parent passes one on
        ends_by(number)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, end)


@contextmanager
def _without_needless_processes() -> Iterator[None]:
    """A Ray that starts meanwhile has no autoscaler and no server of the dashboard, which it has no switch for: seconds and 130 MiB less."""
    usual = {name: getattr(Node, name) for name in ("start_monitor", "start_api_server")}
    try:
        for name in usual:
            setattr(Node, name, lambda *_, **__: None)
        yield
    finally:
        for name, method in usual.items():
            setattr(Node, name, method)


def check_own_node() -> None:
    """Raise RaySystemError when the raylet of this machine is dead: what is started now would never run."""
    own = ray.get_runtime_context().get_node_id()
    if not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == own):
        raise ray.exceptions.RaySystemError("the raylet of the driver's machine died")
