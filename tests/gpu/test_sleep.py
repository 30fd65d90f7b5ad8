"""A generator that sleeps gives the GPU's memory back, and says the same when it is awake again."""

from pathlib import Path
from typing import Any

import pytest

from .common import GREEDY, PROMPTS, learn, started, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.ray]

GIB = 2**30


@pytest.mark.parametrize("transport", ["object_store", "cuda_ipc"])
def test_sleep_gives_memory_back_and_the_next_call_finds_the_published_weights(ray_cluster: None, model: Path, transport: str) -> None:
    def free(worker: Any) -> int:
        import torch

        return int(torch.cuda.mem_get_info()[0])

    with started(model, 0.5, transport=transport, generator={"sleep_between_phases": True}) as (policy, generator):
        learn(policy)
        generator.receive(policy.publish(1))
        awake = generator.first(free).result()
        rollouts = generator.generate(PROMPTS, GREEDY)
        asleep = generator.first(free).result()
        assert asleep - awake > GIB  # the KV cache alone was several
        assert generator.first(lambda worker: (worker.version, worker.asleep)).result() == (-1, True)
        assert tokens(generator.generate(PROMPTS, GREEDY)) == tokens(rollouts)
        learn(policy)
        generator.receive(policy.publish(2))
        assert generator.first(lambda worker: (worker.version, worker.asleep)).result() == (2, False)
