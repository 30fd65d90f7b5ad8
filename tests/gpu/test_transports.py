"""Weights by every transport: what arrives is what was published, first and after an update, and again for a generator that slept."""

from pathlib import Path

import pytest

from .common import GREEDY, PROMPTS, learn, started, tokens, two_gpus

pytestmark = [pytest.mark.gpu, pytest.mark.ray]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("transport", "gpus"), [("object_store", 0.5), ("cuda_ipc", 0.5), pytest.param("nccl", 1, marks=two_gpus)])
def test_what_arrives_is_what_was_published(ray_cluster: None, model: Path, transport: str, gpus: float, dtype: str) -> None:
    with started(model, gpus, dtype=dtype, transport=transport, policy={"optimizer": {"lr": 1e-2}}) as (policy, generator):
        generator.receive(policy.publish(1))
        before = tokens(generator.generate(PROMPTS, GREEDY))
        learn(policy)
        publication = policy.publish(2)
        assert publication.transport == transport
        assert {spec.dtype for spec in publication.manifest} == {dtype}
        generator.receive(publication)
        assert [r.version for r in generator.received] == [2]
        after = tokens(generator.generate(PROMPTS, GREEDY))
        assert after != before
        generator.receive(publication)  # a transport hands a publication out as often as it is asked
        assert tokens(generator.generate(PROMPTS, GREEDY)) == after
