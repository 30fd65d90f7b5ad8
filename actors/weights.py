"""Publication of the policy's weights: packed buckets, three ways to carry them, and the proof that they arrived.

A publication is proved twice: by the fingerprint of its bytes, and by the logprobs of a fixed probe sequence, because
bytes can arrive and still not be what the engine computes with (a tied head that keeps its old packed weights, for
example). The transports of TRANSPORTS differ in nothing else than how the buckets travel.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import ray
import torch
import torch.distributed as dist
import xxhash
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from actors.rank_host import meet
from actors.watchdog import START_SECONDS
from minigpt_ray.config import MEETING_SECONDS

PROBE_LENGTH = 32
ALIGNMENT = 16
MEETING_TIMEOUT = timedelta(seconds=MEETING_SECONDS)

T = TypeVar("T")
NamedTensors = Iterable[tuple[str, Tensor]]


class WeightsError(RuntimeError):
    """A publication did not arrive as it was sent, or the engine does not compute with it."""


class PublicationLost(RuntimeError):
    """What was published cannot be had any more: who published it, or somebody in the broadcast, is gone. No fault of the engine that was to load it."""


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies in the buckets."""

    name: str
    """As save_pretrained writes it."""
    dtype: str
    shape: tuple[int, ...]
    bucket: int
    offset: int
    """In bytes."""
    size: int
    """In bytes."""


@dataclass(frozen=True)
class Probe:
    """A fixed token sequence and what the policy says about it."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of tokens 1 to the last, temperature 1."""


@dataclass(frozen=True)
class Publication:
    """One version of the policy's weights."""

    version: int
    manifest: tuple[TensorSpec, ...]
    buckets: tuple[Any, ...]
    """How a receiver comes by the buckets, as its transport needs it: references into Ray's object store, for example."""
    fingerprint: str
    probe: Probe
    transport: str = "object_store"
    """Name in TRANSPORTS."""

    @property
    def num_bytes(self) -> int:
        return sum(spec.size for spec in self.manifest)


# ---------------------------------------------------------------------------------------------- buckets and proof


def fill(tensors: NamedTensors, bucket_bytes: int) -> Iterator[tuple[list[TensorSpec], Tensor]]:
    """One uint8 bucket of about `bucket_bytes` after the other, on the tensors' device, and what lies in it where."""
    specs: list[TensorSpec] = []
    parts: list[Tensor] = []
    number = offset = 0
    for name, tensor in tensors:
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        if parts and offset + data.numel() > bucket_bytes:
            yield specs, torch.cat(parts)
            specs, parts, number, offset = [], [], number + 1, 0
        specs.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), number, offset, data.numel()))
        padding = -data.numel() % ALIGNMENT
        parts += [data, data.new_zeros(padding)]
        offset += data.numel() + padding
    yield specs, torch.cat(parts)


def pack(tensors: NamedTensors, bucket_bytes: int) -> tuple[tuple[TensorSpec, ...], list[np.ndarray]]:
    """Named tensors -> manifest and uint8 buckets of about `bucket_bytes` in host memory; tensors start at multiples of 16 bytes."""
    manifest: list[TensorSpec] = []
    buckets: list[np.ndarray] = []
    for specs, bucket in fill(tensors, bucket_bytes):
        manifest += specs
        buckets.append(bucket.cpu().numpy())
    return tuple(manifest), buckets


def unpack(manifest: Iterable[TensorSpec], buckets: Sequence[np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, as views of the buckets: not to be written to."""
    for spec in manifest:
        yield spec.name, _view(spec, _tensor(buckets[spec.bucket]))


def _tensor(bucket: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the object store's memory is read-only, and torch has no such tensor
        return torch.from_numpy(bucket)


def _view(spec: TensorSpec, bucket: Tensor) -> Tensor:
    return bucket[spec.offset : spec.offset + spec.size].view(getattr(torch, spec.dtype)).reshape(spec.shape)


def fingerprint(buckets: Iterable[np.ndarray]) -> str:
    """128-bit hash (XXH3) of all bytes, in order."""
    digest = xxhash.xxh3_128()
    for bucket in buckets:
        digest.update(bucket.data)
    return digest.hexdigest()


def check_fingerprint(publication: Publication, found: str) -> None:
    """Raises WeightsError when the bytes are not those that were published."""
    if found != publication.fingerprint:
        raise WeightsError(f"weights version {publication.version} arrived with fingerprint {found}, published was {publication.fingerprint}")


def probe_tokens(vocab_size: int) -> tuple[int, ...]:
    """The same tokens in every run and process."""
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab_size, PROBE_LENGTH))


def probe_gap(publication: Publication, logprobs: Iterable[float], tolerance: float) -> float:
    """Largest difference in nats between the engine's logprobs of the probe and the policy's.

    Raises WeightsError above `tolerance`: the engine does not compute with this version.
    """
    gap = float(np.max([abs(mine - theirs) for mine, theirs in zip(logprobs, publication.probe.logprobs, strict=True)]))  # max() would lose a nan
    if not gap <= tolerance:
        raise WeightsError(
            f"after loading weights version {publication.version} the generator's logprobs differ by {gap:.2g} nats from the policy's (weights.probe_tolerance={tolerance:g}); a tensor was not applied"
        )
    return gap


# ----------------------------------------------------------------------------------------------------- transports


class Loads(Protocol):
    """What a transport needs of a generator's engine."""

    def load(self, tensors: NamedTensors) -> None:
        """Replace weights by tensors that this process holds."""

    def load_by(self, loader: Callable[..., T], *args: Any) -> list[T]:
        """Call `loader(part, load, *args)` in every process that computes with a part of the model; what each returned."""
        ...


class Transport(Protocol):
    """One way for buckets to travel. The policy's rank 0 holds an instance, which keeps what receivers still need."""

    def publish(self, version: int, tensors: NamedTensors, bucket_bytes: int, probe: Probe) -> Publication:
        """On the policy's rank 0: make a version known."""
        ...

    @staticmethod
    def dispatch(publication: Publication, hosts: Sequence[Any], parts: int) -> tuple[list[Publication], list[Any]]:
        """In the driver: one publication for each worker, its model split in `parts`, and calls that run while they receive."""
        ...

    @staticmethod
    def receive(publication: Publication, engine: Loads) -> None:
        """In a worker: load what was published; raises WeightsError when other bytes arrive."""


@dataclass(frozen=True)
class Sender:
    """The process whose transport holds the buckets."""

    host: Any
    role: str

    def call(self, method: Callable[..., T], *args: Any) -> Any:
        """Reference to the result of `method(transport, *args)` there."""
        return self.host.call.remote(self.role, _on_transport, (method, args))

    def ask(self, method: Callable[..., T], *args: Any) -> T:
        """The result itself, once the process has time; raises PublicationLost when it is gone, or has none for START_SECONDS."""
        try:
            return cast(T, ray.get(self.call(method, *args), timeout=START_SECONDS).value)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            raise PublicationLost("the process that published the weights does not answer") from error

    @classmethod
    def here(cls) -> "Sender":
        return cls(ray.get_runtime_context().current_actor, "policy")


def _on_transport(rank: Any, method: Callable[..., T], args: tuple[Any, ...]) -> T:
    return method(rank.transport, *args)


def publish(version: int, tensors: NamedTensors, bucket_bytes: int, probe: Probe) -> Publication:
    """Put a version into the object store."""
    manifest, buckets = pack(tensors, bucket_bytes)
    return Publication(version, manifest, tuple(ray.put(bucket) for bucket in buckets), fingerprint(buckets), probe)


def fetch(publication: Publication) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a publication in the object store; raises WeightsError when the bytes are not those that were published."""
    try:
        buckets = ray.get(list(publication.buckets))
    except ray.exceptions.ObjectLostError as error:
        raise PublicationLost("the buckets went with the process that published them") from error
    check_fingerprint(publication, fingerprint(buckets))
    return unpack(publication.manifest, buckets)


class ObjectStore:
    """Ray's object store: whoever needs the newest version pulls it.

    No collective links the policy to the generator, so workers may come and go, and nothing here knows a device.
    """

    def publish(self, version: int, tensors: NamedTensors, bucket_bytes: int, probe: Probe) -> Publication:
        return publish(version, tensors, bucket_bytes, probe)

    @staticmethod
    def dispatch(publication: Publication, hosts: Sequence[Any], parts: int) -> tuple[list[Publication], list[Any]]:
        return [publication] * len(hosts), []

    @staticmethod
    def receive(publication: Publication, engine: Loads) -> None:
        engine.load(fetch(publication))


@dataclass(frozen=True)
class Meeting:
    """Where the sender of a broadcast, which is rank 0, and its receivers form a process group."""

    address: str
    port: int
    world: int


@dataclass(frozen=True)
class Seat:
    """A worker's place at a meeting."""

    meeting: Meeting
    first_rank: int
    """Of the worker's first part; the others follow it."""


class Broadcast:
    """NCCL between GPUs (gloo between CPUs, for tests): the policy's rank 0 broadcasts to all processes that compute with a part of a model.

    The group belongs to this module and not to the process-wide state of torch.distributed, which DeepSpeed and vLLM
    use for themselves. vLLM's own NCCL weight transfer is not used: its in-process `LLM` offers no call for it, and it
    neither shows the bytes to a fingerprint nor runs without GPUs. Buckets wait in host memory and pass through the
    device one at a time. The group is formed anew when the receivers change; a worker that dies in the middle of a
    broadcast makes the others wait for MEETING_TIMEOUT, which the object store would not.
    """

    def __init__(self) -> None:
        self._buckets: list[np.ndarray] = []
        self._audience: tuple[str, ...] = ()

    def publish(self, version: int, tensors: NamedTensors, bucket_bytes: int, probe: Probe) -> Publication:
        manifest, self._buckets = pack(tensors, bucket_bytes)
        return Publication(version, manifest, (Sender.here(),), fingerprint(self._buckets), probe, "nccl")

    def invite(self, audience: tuple[str, ...], world: int) -> Meeting:
        """Where to meet: at the last place when the same receivers come again."""
        if audience != self._audience:
            address = ray.util.get_node_ip_address()
            self._store = meet(address, 0, world, is_master=True, timeout=MEETING_TIMEOUT)
            self._audience, self._meeting = audience, Meeting(address, self._store.port, world)
        return self._meeting

    def send(self) -> None:
        """Broadcast all buckets to the receivers that were invited."""
        group = _group(self._meeting, 0)
        for bucket in self._buckets:
            group.broadcast(_tensor(bucket).to(_device()), 0).wait()
        _synchronize()

    @staticmethod
    def dispatch(publication: Publication, hosts: Sequence[Any], parts: int) -> tuple[list[Publication], list[Any]]:
        (sender,) = publication.buckets
        meeting = sender.ask(Broadcast.invite, tuple(map(str, hosts)), 1 + len(hosts) * parts)
        seats = [Seat(meeting, 1 + index * parts) for index in range(len(hosts))]
        return [replace(publication, buckets=(seat,)) for seat in seats], [sender.call(Broadcast.send)]

    @staticmethod
    def receive(publication: Publication, engine: Loads) -> None:
        (seat,) = publication.buckets
        for found in engine.load_by(load_broadcast, seat, publication.manifest):
            check_fingerprint(publication, found)


def load_broadcast(part: int, load: Callable[[NamedTensors], Any], seat: Seat, manifest: Sequence[TensorSpec]) -> str:
    """Receive and load bucket after bucket; the fingerprint of what came."""
    with _in_a_group():
        group = _group(seat.meeting, seat.first_rank + part)

    def received() -> Iterator[np.ndarray]:
        for _, group_of_specs in groupby(manifest, lambda spec: spec.bucket):
            specs = list(group_of_specs)
            end = specs[-1].offset + specs[-1].size
            bucket = torch.empty(end + -end % ALIGNMENT, dtype=torch.uint8, device=_device())
            with _in_a_group():
                group.broadcast(bucket, 0).wait()
            load((spec.name, _view(spec, bucket)) for spec in specs)
            yield bucket.cpu().numpy()

    return fingerprint(received())


@contextmanager
def _in_a_group() -> Iterator[None]:
    """What a collective raises when somebody in it is gone becomes PublicationLost."""
    try:
        yield
    except RuntimeError as error:  # so are torch.distributed's own kinds
        raise PublicationLost(f"a broadcast of weights failed: {error}") from error


_groups: dict[tuple[Meeting, int], Any] = {}
"""The one group that this process broadcasts in; the key tells whether it is still the right one."""


def _group(meeting: Meeting, rank: int) -> Any:
    if (meeting, rank) not in _groups:
        for group in _groups.values():
            group.abort()  # whoever was in it may be gone
        _groups.clear()
        store = meet(meeting.address, meeting.port, meeting.world, is_master=False, timeout=MEETING_TIMEOUT)
        if torch.cuda.is_available():
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = MEETING_TIMEOUT
            _groups[meeting, rank] = dist.ProcessGroupNCCL(store, rank, meeting.world, options)
        else:
            _groups[meeting, rank] = dist.ProcessGroupGloo(store, rank, meeting.world, MEETING_TIMEOUT)
    return _groups[meeting, rank]


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class SharedGPU:
    """CUDA IPC: the workers read the buckets where they are, in the memory of the GPU that they share with the policy's rank 0.

    The buckets, one copy of the weights, stay on that GPU until the next publication.
    """

    def __init__(self) -> None:
        self._buckets: list[Tensor] = []

    def publish(self, version: int, tensors: NamedTensors, bucket_bytes: int, probe: Probe) -> Publication:
        self._buckets = []
        torch.cuda.ipc_collect()  # else what the last receivers have let go of is kept
        filled = list(fill(tensors, bucket_bytes))
        self._buckets = [bucket for _, bucket in filled]
        manifest = tuple(spec for specs, _ in filled for spec in specs)
        return Publication(version, manifest, (Sender.here(),), fingerprint(bucket.cpu().numpy() for bucket in self._buckets), probe, "cuda_ipc")

    def share(self, receivers: int) -> list[tuple[str, list[tuple[Any, ...]]]]:
        """For each receiver the GPU and handles of its own: torch counts one reader for a handle."""
        _synchronize()
        return [(_gpu(), [reduce_tensor(bucket)[1] for bucket in self._buckets]) for _ in range(receivers)]

    @staticmethod
    def dispatch(publication: Publication, hosts: Sequence[Any], parts: int) -> tuple[list[Publication], list[Any]]:
        (sender,) = publication.buckets
        shared = sender.ask(SharedGPU.share, len(hosts))
        return [replace(publication, buckets=handles) for handles in shared], []

    @staticmethod
    def receive(publication: Publication, engine: Loads) -> None:
        gpu, handles = publication.buckets
        for found in engine.load_by(load_shared, gpu, handles, publication.manifest):
            check_fingerprint(publication, found)


def load_shared(part: int, load: Callable[[NamedTensors], Any], gpu: str, handles: Sequence[tuple[Any, ...]], manifest: Sequence[TensorSpec]) -> str:
    """Open and load the buckets on this GPU; their fingerprint."""
    if _gpu() != gpu:
        raise WeightsError(
            f"weights.transport=cuda_ipc needs policy and generator on one GPU, but the policy is on {gpu} and this worker on {_gpu()}; use nccl"
        )
    own = torch.cuda.current_device()  # handles carry the number that the GPU has in the policy's process
    buckets = [rebuild_cuda_tensor(*[own if position == 6 else value for position, value in enumerate(handle)]) for handle in handles]
    load((spec.name, _view(spec, buckets[spec.bucket])) for spec in manifest)
    found = fingerprint(bucket.cpu().numpy() for bucket in buckets)
    _synchronize()  # before the memory is closed
    return found


def _gpu() -> str:
    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


TRANSPORTS: dict[str, type[Transport]] = {"object_store": ObjectStore, "nccl": Broadcast, "cuda_ipc": SharedGPU}
