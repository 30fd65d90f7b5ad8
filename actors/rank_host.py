"""The process that holds rank objects, of one role or of several that share it."""

import gc
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psutil
import ray

from actors.stacks import keep_stacks_at_hand
from actors.watchdog import outlast
from minigpt_ray.imports import without_collection

if TYPE_CHECKING:
    from torch.distributed import TCPStore

PULSE = "pulse"
"""The concurrency group of RankHost.pulse."""


@dataclass(frozen=True)
class Rank:
    """Where a rank object stands among its peers."""

    index: int
    world: int
    device: str
    """`cpu` or `cuda`."""

    def share(self, size: int) -> slice:
        """The contiguous part of `size` rows that is this rank's; parts differ by at most one row."""
        return slice(size * self.index // self.world, size * (self.index + 1) // self.world)


@dataclass(frozen=True)
class Timed:
    """A result and what it took."""

    value: Any
    start: float
    """When it began, in seconds since the epoch by the clock of its machine."""
    seconds: float
    memory_bytes: int
    """Resident memory of the process."""


class RankHost:
    """The process that holds rank objects. Made a Ray actor by placement.Cluster. Imports torch when a role asks for it: rewards do not."""

    def __init__(self, index: int, world: int, device: str, shares_gpu: bool = False) -> None:
        """`shares_gpu`: other processes compute on its GPU too, and need what memory torch would keep there between two calls."""
        gc.disable()  # until a role is built: its arguments bring imports with them
        keep_stacks_at_hand()
        self.rank, self._shares_gpu = Rank(index, world, device), shares_gpu
        self.roles: dict[str, Any] = {}

    def address(self) -> tuple[str, int]:
        """This host's address and a port that is free on it."""
        address = ray.util.get_node_ip_address()
        with socket.create_server((address, 0), family=family(address)) as probe:
            return address, probe.getsockname()[1]

    def join(self, address: str, port: int, hang_after_s: float) -> None:
        """Form the process group of all hosts of this set."""
        import torch
        import torch.distributed as dist

        names = {"MASTER_ADDR": address, "MASTER_PORT": port, "RANK": self.rank.index, "WORLD_SIZE": self.rank.world, "LOCAL_RANK": 0, "LOCAL_SIZE": 1}
        os.environ.update({name: str(value) for name, value in names.items()})
        if self.rank.device == "cuda":
            torch.cuda.set_device(0)
        outlast(hang_after_s)
        if ipaddress.ip_address(address).is_loopback:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        with telling_disconnections():
            store = meet(address, port, self.rank.world, self.rank.index == 0)
            dist.init_process_group("nccl" if self.rank.device == "cuda" else "gloo", store=store, rank=self.rank.index, world_size=self.rank.world)

    def build(self, role: str, build: Callable[..., Any], *args: Any) -> dict[str, Any]:
        """Build a rank object; where this process is."""
        with without_collection(), telling_disconnections():
            self.roles[role] = build(self.rank, *args)
        self._leave_gpu()
        return {"host": ray.util.get_node_ip_address(), "pid": os.getpid(), "device": self._device_name()}

    def _device_name(self) -> str:
        """`cpu`, or the name of this process's GPU."""
        if self.rank.device == "cpu":
            return "cpu"
        import torch

        return torch.cuda.get_device_name()

    def _leave_gpu(self) -> None:
        """Give memory that is free, and that torch would keep for the next call, to those who share the GPU: an engine that wakes takes its whole part of it."""
        if self._shares_gpu:
            import torch

            torch.cuda.empty_cache()

    def pulse(self) -> None:
        """Returns at once, also while a call computes, if this process lives."""

    def call(self, role: str, method: Callable[..., Any], args: tuple[Any, ...]) -> Timed:
        """Run a method of a role's rank object; arguments that were put into the object store arrive as values."""
        values = [ray.get(a.ref) if isinstance(a, Shared) else a for a in args]
        began, start = time.time(), time.perf_counter()
        with telling_disconnections():
            value = method(self.roles[role], *values)
        self._leave_gpu()
        return Timed(value, began, time.perf_counter() - start, psutil.Process().memory_info().rss)


OF_THE_CODE = ("[enforce fail", "ncclInvalid", "Duplicate GPU", "out of memory", "CUDA calloc")
"""Words of what gloo and NCCL say of a call that is wrong, or too large, with every rank there."""


class Disconnected(Exception):
    """A collective broke: another rank has died, or its host or the network is gone, which the rank that says so cannot tell apart.

    No RuntimeError, as what it is made of: torch's writer has these for a full disk.
    """


@contextmanager
def telling_disconnections() -> Iterator[None]:
    """What torch and its libraries raise when another rank is gone becomes Disconnected; it is the machines' failure, not the code's."""
    try:
        yield
    except Exception as error:
        distributed = sys.modules.get("torch.distributed")
        if distributed is None:
            raise
        kinds = (distributed.DistBackendError, distributed.DistNetworkError, distributed.DistStoreError)
        of_gloo = type(error) is RuntimeError and "/gloo/" in str(error)  # it has no type of its own, and names its source file
        if (isinstance(error, kinds) or of_gloo) and not any(words in str(error) for words in OF_THE_CODE):
            raise Disconnected(f"{type(error).__name__}: {error}") from error
        raise


def family(address: str) -> socket.AddressFamily:
    """That of an IP address."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def meet(address: str, port: int, world: int, is_master: bool, timeout: timedelta | None = None) -> "TCPStore":
    """torch's store for forming a process group. The master listens at `address` alone, where torch by itself would listen at every address of the machine."""
    from torch.distributed import TCPStore
    from torch.distributed.distributed_c10d import default_pg_timeout

    timeout = timeout or default_pg_timeout
    if not is_master:
        return TCPStore(address, port, world, False, timeout)
    listening = socket.create_server((address, port), family=family(address))
    port, handle = listening.getsockname()[1], listening.detach()
    return TCPStore(address, port, world, True, timeout, wait_for_workers=False, master_listen_fd=handle)


@dataclass(frozen=True)
class Shared:
    """An argument that lies in the object store once, for every role that reads it."""

    ref: Any
