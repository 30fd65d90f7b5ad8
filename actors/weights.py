"""Publication of the policy's weights: packed buckets in Ray's object store, pulled by whoever needs the newest version.

No collective links the policy to the generator, so workers may come and go. A publication is proved twice: by the
fingerprint of its bytes, and by the logprobs of a fixed probe sequence, because bytes can arrive and still not be
what the engine computes with (a tied head that keeps its old packed weights, for example).
"""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
import xxhash
from torch import Tensor

PROBE_LENGTH = 32


class WeightsError(RuntimeError):
    """A publication did not arrive as it was sent, or the engine does not compute with it."""


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
    """References to uint8 arrays in the object store."""
    fingerprint: str
    probe: Probe

    @property
    def num_bytes(self) -> int:
        return sum(spec.size for spec in self.manifest)


def pack(tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int) -> tuple[tuple[TensorSpec, ...], list[np.ndarray]]:
    """Named tensors -> manifest and uint8 buckets of about `bucket_bytes`; tensors start at multiples of 16 bytes."""
    manifest: list[TensorSpec] = []
    buckets: list[np.ndarray] = []
    parts: list[np.ndarray] = []
    offset = 0
    for name, tensor in tensors:
        data = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        if parts and offset + data.size > bucket_bytes:
            buckets.append(np.concatenate(parts))
            parts, offset = [], 0
        manifest.append(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), len(buckets), offset, data.size))
        padding = -data.size % 16
        parts += [data, np.zeros(padding, np.uint8)]
        offset += data.size + padding
    return tuple(manifest), [*buckets, np.concatenate(parts)]


def unpack(manifest: Iterable[TensorSpec], buckets: list[np.ndarray]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, as views of the buckets: not to be written to."""
    for spec in manifest:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the object store's memory is read-only, and torch has no such tensor
            data = torch.frombuffer(buckets[spec.bucket].data, dtype=torch.uint8, count=spec.size, offset=spec.offset)
        yield spec.name, data.view(getattr(torch, spec.dtype)).reshape(spec.shape)


def fingerprint(buckets: Iterable[np.ndarray]) -> str:
    """128-bit hash (XXH3) of all bytes, in order."""
    digest = xxhash.xxh3_128()
    for bucket in buckets:
        digest.update(bucket.data)
    return digest.hexdigest()


def probe_tokens(vocab_size: int) -> tuple[int, ...]:
    """The same tokens in every run and process."""
    return tuple(int(i) for i in np.random.default_rng(0).integers(0, vocab_size, PROBE_LENGTH))


def publish(version: int, tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, probe: Probe) -> Publication:
    """Put a version into the object store."""
    manifest, buckets = pack(tensors, bucket_bytes)
    return Publication(version, manifest, tuple(ray.put(bucket) for bucket in buckets), fingerprint(buckets), probe)


def fetch(publication: Publication) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a publication; raises WeightsError when the bytes are not those that were published."""
    buckets = ray.get(list(publication.buckets))
    found = fingerprint(buckets)
    if found != publication.fingerprint:
        raise WeightsError(f"weights version {publication.version} arrived with fingerprint {found}, published was {publication.fingerprint}")
    return unpack(publication.manifest, buckets)


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
