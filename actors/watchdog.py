"""Calls that do not end: which rank of which role is in which method, where in the code; then its process is killed, and so counts as dead.

A process that hangs cannot be asked. So a task on its host sends it SIGUSR1, at which faulthandler writes the stacks of all
threads into a file in memory that the process opened at its beginning. One that was stopped (SIGSTOP) goes on for this
moment. Then it is killed, with all that it has started.
"""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.stacks import examine_and_kill

logger = logging.getLogger(__name__)

START_SECONDS = 1800.0
"""How long the start of a role may take at least: processes, imports, downloads, compilation."""
REPORT_SECONDS = 60.0
"""How long its host may take to say so."""
NODE_SECONDS = 90.0
"""How long Ray may take to know that a host is gone: it gives a node up after five unanswered questions, which is about a minute."""
CONNECT_SECONDS = 5.0
"""How long a process may take to accept a connection."""


def collective_timeout(hang_after_s: float) -> timedelta:
    """How long a rank waits for others in a collective: longer than a call or a start may take, so that the one that hangs is found, and not the one that waits."""
    return timedelta(seconds=2 * max(hang_after_s, START_SECONDS))


def outlast(hang_after_s: float) -> None:
    """The process groups that this process makes from now on, DeepSpeed's among them, wait for `collective_timeout`."""
    from torch.distributed import distributed_c10d

    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = collective_timeout(hang_after_s)


@dataclass(frozen=True)
class Limit:
    """How long calls may take, and who is told which of them did not end."""

    seconds: float
    exceeded: Callable[[Sequence[int]], None]
    look_after: float = math.inf
    """Seconds after which, and after as many again, `silent` is asked; where calls may take long, that is before `seconds` are over."""
    silent: Callable[[Sequence[int]], list[int]] = list
    """Which of the calls that have not ended are in processes without a sign of life; these have exceeded the limit too."""


@dataclass(frozen=True)
class Whereabouts:
    """Where a process is."""

    node: str
    """Id of its node."""
    address: str
    pid: int

    @classmethod
    def mine(cls) -> "Whereabouts":
        """Of the process that asks."""
        return cls(ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address(), os.getpid())


def record_of(host: Any) -> dict[str, Any]:
    """What Ray knows of an actor, also of a dead one."""
    return dict(ray_state.actors(host._actor_id.hex()))


def place_of(host: Any) -> str:
    """`process 4711 on 10.0.0.5`: where an actor is, or was."""
    actor = record_of(host)
    return f"process {actor['Pid']} on {actor['Address']['IPAddress']}" if actor["Pid"] else "not begun yet"


def has_begun(host: Any) -> bool:
    """Whether an actor has, or had, a process."""
    return bool(record_of(host)["Pid"])


def is_dead(host: Any) -> bool:
    """Whether an actor's process has ended, as far as Ray knows."""
    return bool(record_of(host)["State"] == "DEAD")


def answers(host: Any) -> bool:
    """Whether an actor's process takes connections, as far as it has begun; one that does not is dead, or its host is gone, before Ray knows of it."""
    actor = record_of(host)
    if not actor["Pid"]:
        return True
    try:
        socket.create_connection((actor["Address"]["IPAddress"], actor["Address"]["Port"]), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def wait_for_word(hosts: Sequence[Any]) -> None:
    """Until Ray knows of the death of each of these actors that takes no connections, so that none is started again on a host that is gone."""
    end = time.monotonic() + NODE_SECONDS
    while not all(is_dead(host) or answers(host) for host in hosts) and time.monotonic() < end:
        time.sleep(0.2)


def end_hung(hosts: Mapping[str, Any], method: str, seconds: float, runtime_env: Mapping[str, Any]) -> None:
    """Say where each of these actors hangs, and kill their processes; names and runtime_env as in `end_hung_processes`."""
    found = {name: record_of(host) for name, host in hosts.items()}
    for name in [name for name, actor in found.items() if not actor["Pid"]]:
        logger.warning("%s has not begun after %.0f s and counts as dead; see `ray status` for what its node lacks", name, seconds)
        ray.kill(hosts[name])
        del found[name]
    places = {name: Whereabouts(actor["Address"]["NodeID"], actor["Address"]["IPAddress"], actor["Pid"]) for name, actor in found.items()}
    end_hung_processes(places, method, seconds, runtime_env)
    for name in places:
        ray.kill(hosts[name])  # also when its host is gone, or its process ends by no signal: for Ray it is dead, and its calls fail


def end_hung_processes(places: Mapping[str, Whereabouts], method: str, seconds: float, runtime_env: Mapping[str, Any]) -> None:
    """Say where each of these processes hangs, and kill them.

    places: by what to call the process, `policy rank 1 of 2`. runtime_env: of the tasks that look for them.
    """
    reports = {}
    for name, place in places.items():
        there = NodeAffinitySchedulingStrategy(place.node, soft=False)
        task: Any = ray.remote(examine_and_kill).options(num_cpus=0, scheduling_strategy=there, runtime_env=dict(runtime_env))
        reports[name] = task.remote(place.pid)
    ray.wait(list(reports.values()), num_returns=len(reports), timeout=REPORT_SECONDS)
    for name, report in reports.items():
        try:
            state, stacks = ray.get(report, timeout=0)
        except ray.exceptions.RayError as error:
            state, stacks = "on a host that does not answer", str(error)
        where = f"process {places[name].pid} on {places[name].address}, {state}"
        logger.warning("%s (%s) has been in %s for %.0f s and counts as dead; it was\n%s", name, where, method, seconds, stacks)
