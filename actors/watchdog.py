"""Calls that do not end: which rank of which role is in which method, where in the code; then its process is killed, and so counts as dead.

A process that hangs cannot be asked. So a task on its host sends it SIGUSR1, at which faulthandler writes the stacks of all
threads into a file in memory that the process opened at its beginning. One that was stopped (SIGSTOP) goes on for this
moment. Then it is killed, with all that it has started.
"""

import faulthandler
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

logger = logging.getLogger(__name__)

START_SECONDS = 1800.0
"""How long the start of a role may take at least: processes, imports, downloads, compilation."""
STACKS = "minigpt_ray_stacks"
"""Name of the file in memory."""
STACK_SECONDS = 3.0
"""How long a process may take to write its stacks."""
REPORT_SECONDS = 60.0
"""How long its host may take to say so."""
LONGEST_REPORT = 80
"""Lines of stacks."""


def keep_stacks_at_hand() -> None:
    """For a process that may hang, at its beginning."""
    faulthandler.register(signal.SIGUSR1, file=os.memfd_create(STACKS), all_threads=True)


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


def end_hung(hosts: Mapping[str, Any], method: str, seconds: float, runtime_env: Mapping[str, Any]) -> None:
    """Say where each of these actors hangs, and kill their processes; names and runtime_env as in `end_hung_processes`."""
    found = {name: ray_state.actors(host._actor_id.hex()) for name, host in hosts.items()}
    for name in [name for name, actor in found.items() if not actor["Pid"]]:
        logger.warning("%s has not begun after %.0f s and counts as dead; see `ray status` for what its node lacks", name, seconds)
        ray.kill(hosts[name])
        del found[name]
    places = {name: Whereabouts(actor["Address"]["NodeID"], actor["Address"]["IPAddress"], actor["Pid"]) for name, actor in found.items()}
    end_hung_processes(places, method, seconds, runtime_env)


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


def examine_and_kill(pid: int) -> tuple[str, str]:
    """State and stacks of a process of this host, which ends here with its children."""
    try:
        process = psutil.Process(pid)
        state, stacks = process.status(), _stacks(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return "gone", ""
    for member in family:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    return state, stacks


def _stacks(pid: int) -> str:
    file = next((fd for fd in Path(f"/proc/{pid}/fd").iterdir() if STACKS in os.readlink(fd)), None)
    if file is None:
        return "in code that keeps no stacks at hand"
    os.kill(pid, signal.SIGUSR1)
    os.kill(pid, signal.SIGCONT)
    end = time.monotonic() + STACK_SECONDS
    text = before = ""
    while (not text or text != before) and time.monotonic() < end:  # it is complete once it has stopped to grow
        time.sleep(0.2)
        before, text = text, file.read_text(errors="replace")
    lines = text.splitlines()
    return "\n".join(lines[:LONGEST_REPORT]) or "in a state in which it answers no signal"
