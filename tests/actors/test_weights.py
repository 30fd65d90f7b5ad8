"""Weights arrive as they were sent, and an engine that does not compute with them is found out."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from torch import Tensor

from actors.generator import GeneratorWorker, Order, Request
from actors.placement import environment
from actors.rank_host import Rank
from actors.weights import Probe, Publication, PublicationLost, WeightsError, fetch, fingerprint, pack, probe_gap, probe_tokens, publish, unpack
from minigpt_ray.config import GeneratorConfig, SamplingConfig
from minigpt_ray.models import TokenLogprobs, load_causal

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def tensors() -> dict[str, Tensor]:
    """Sizes that are no multiples of 16 bytes, a scalar, and a matrix that is not contiguous."""
    torch.manual_seed(0)
    named = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    return named | {"scalar": torch.tensor(1.5), "transposed": torch.randn(4, 7).T, "large": torch.randn(100, 30)}


@pytest.mark.parametrize("bucket_bytes", [1, 64, 1000, 1 << 20])
def test_tensors_come_out_as_they_went_in(bucket_bytes: int) -> None:
    manifest, buckets = pack(tensors().items(), bucket_bytes)
    unpacked = dict(unpack(manifest, buckets))
    assert list(unpacked) == list(tensors())
    for name, tensor in tensors().items():
        assert unpacked[name].dtype == tensor.dtype
        assert torch.equal(unpacked[name], tensor)


def test_a_bucket_holds_what_fits_and_a_tensor_lies_in_one_piece() -> None:
    manifest, buckets = pack(tensors().items(), 1000)
    assert len(buckets) == 2 and buckets[1].nbytes == 100 * 30 * 4  # the large one alone, above the limit
    assert all(spec.offset % 16 == 0 for spec in manifest)
    assert sum(spec.size for spec in manifest) == sum(t.numel() * t.element_size() for t in tensors().values())


def test_every_byte_counts_in_the_fingerprint() -> None:
    _, buckets = pack(tensors().items(), 1000)
    before = fingerprint(buckets)
    for bucket in buckets:
        for position in (0, bucket.size // 2, bucket.size - 1):
            bucket[position] ^= 1
            assert fingerprint(buckets) != before
            bucket[position] ^= 1
    assert fingerprint(buckets) == before


@pytest.mark.ray
def test_a_publication_is_lost_with_the_process_that_made_it(ray_cluster: None) -> None:
    @ray.remote
    class Publisher:
        def publish(self) -> Publication:
            return publish(1, [("a", torch.ones(1 << 18))], 1 << 20, Probe((1, 2), (0.0,)))

    publisher = Publisher.options(runtime_env=environment(1)).remote()  # type: ignore[attr-defined]
    publication = ray.get(publisher.publish.remote())
    ray.kill(publisher)
    deadline = time.monotonic() + 60
    with pytest.raises(PublicationLost, match="the buckets went with the process that published them"):
        while time.monotonic() < deadline:  # for a while the node has them still
            fetch(publication)
            time.sleep(0.5)


def test_probe_tokens_are_fixed_and_of_the_vocabulary() -> None:
    assert probe_tokens(260) == probe_tokens(260) and len(probe_tokens(260)) == 32
    assert probe_tokens(260)[:4] == (221, 165, 132, 70)
    assert max(probe_tokens(7)) < 7 and len(set(probe_tokens(260))) > 20


def gap(found: float, tolerance: float = 1e-3) -> float:
    publication = Publication(3, (), (), "", Probe((1, 2, 3), (-1.0, -2.0)))
    return probe_gap(publication, [-1.0, found], tolerance)


def test_the_gap_is_the_largest_difference() -> None:
    assert gap(-2.0) == 0.0
    assert gap(-2.0005) == pytest.approx(0.0005)


@pytest.mark.parametrize(("found", "shown"), [(-2.5, "0.5"), (float("nan"), "nan"), (float("-inf"), "inf")])
def test_a_gap_above_the_tolerance_or_not_a_number_is_refused(found: float, shown: str) -> None:
    with pytest.raises(WeightsError, match=rf"after loading weights version 3 .* differ by {shown} nats .*weights.probe_tolerance=0.001"):
        gap(found)


# --------------------------------------------------------------------------------- through Ray, to a generator worker


def published(path: Path, version: int, change: float = 0.0) -> Publication:
    """The model at `path`, every weight moved by `change` in a direction of its own, as the policy publishes it."""
    model = load_causal(str(path), "float32").eval()
    torch.manual_seed(version)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += change * torch.randn_like(parameter)
        tokens = probe_tokens(model.config.vocab_size)
        ids = torch.tensor([tokens])
        mask = torch.arange(ids.shape[1])[None] > 0
        logprobs = TokenLogprobs(model)(ids, mask)[0][0, 1:].tolist()
    return publish(version, model.named_parameters(), 1 << 16, Probe(tokens, tuple(logprobs)))


@pytest.fixture(scope="module")
def publication(ray_cluster: None, nano: Path) -> Publication:
    return published(nano, version=1, change=0.05)


@pytest.fixture
def worker(nano: Path) -> Iterator[GeneratorWorker]:
    yield GeneratorWorker(Rank(0, 1, "cpu"), str(nano), GeneratorConfig(backend="transformers"), 64, 1, 0, probe_tolerance=1e-3)


ORDERS = [Order(0, (Request(np.array([1, 2, 3], np.int32), seed=0),))]
SAMPLING = SamplingConfig(max_tokens=2)


@pytest.mark.ray
def test_a_publication_is_fetched_as_it_was_published(publication: Publication) -> None:
    specs = {spec.name: spec for spec in publication.manifest}
    fetched = dict(fetch(publication))
    assert list(fetched) == list(specs)
    assert "lm_head.weight" not in fetched  # tied: written once, as save_pretrained does
    assert publication.num_bytes == sum(t.numel() * 4 for t in fetched.values())
    assert len(publication.buckets) > 1


@pytest.mark.ray
def test_a_corrupted_byte_is_refused_by_both_fingerprints(publication: Publication) -> None:
    bucket = ray.get(publication.buckets[1]).copy()
    bucket[1234] ^= 4
    corrupted = replace(publication, buckets=(publication.buckets[0], ray.put(bucket), *publication.buckets[2:]))
    found = fingerprint(ray.get(list(corrupted.buckets)))
    assert found != publication.fingerprint
    with pytest.raises(WeightsError, match=f"weights version 1 arrived with fingerprint {found}, published was {publication.fingerprint}"):
        fetch(corrupted)


@pytest.mark.ray
def test_a_worker_generates_with_no_version_that_it_has_not_proved(worker: GeneratorWorker, publication: Publication) -> None:
    with pytest.raises(RuntimeError, match="has proved weights version -1 and was asked to generate with 1"):
        worker.work(ORDERS, [], SAMPLING, version=1)
    received = worker.receive(publication)
    assert (received.version, worker.version) == (1, 1) and received.probe_gap < 1e-5
    assert len(worker.work(ORDERS, [], SAMPLING, version=1)) == 1
    for other in (0, 2):
        with pytest.raises(RuntimeError, match=f"asked to generate with {other}"):
            worker.work(ORDERS, [], SAMPLING, version=other)


@pytest.mark.ray
@pytest.mark.parametrize("missing", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_tensor_that_was_not_copied_is_found_by_the_probe(worker: GeneratorWorker, publication: Publication, missing: str) -> None:
    """The fingerprint of the bytes is right; the engine still computes with one old tensor."""
    incomplete = replace(publication, manifest=tuple(spec for spec in publication.manifest if spec.name != missing))
    assert len(incomplete.manifest) == len(publication.manifest) - 1
    with pytest.raises(WeightsError, match="a tensor was not applied"):
        worker.receive(incomplete)
    with pytest.raises(RuntimeError, match="has proved weights version -1"):
        worker.work(ORDERS, [], SAMPLING, version=1)
    assert worker.receive(publication).probe_gap < 1e-5


@pytest.mark.ray
def test_weights_that_are_not_numbers_are_refused(worker: GeneratorWorker, publication: Publication, nano: Path) -> None:
    broken = published(nano, version=2, change=float("nan"))
    assert worker.receive(publication).version == 1
    with pytest.raises(WeightsError, match="differ by nan nats"):
        worker.receive(broken)
    with pytest.raises(RuntimeError, match="has proved weights version -1"):
        worker.work(ORDERS, [], SAMPLING, version=1)


@pytest.mark.ray
def test_a_worker_may_start_from_its_checkpoint_without_a_proof(worker: GeneratorWorker, nano: Path) -> None:
    worker.load_checkpoint(0, str(nano))
    assert len(worker.work(ORDERS, [], SAMPLING, version=0)) == 1
