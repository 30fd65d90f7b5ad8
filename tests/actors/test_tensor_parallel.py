"""One vLLM engine whose model is split over two processes: on a CPU the code that splits it over two GPUs."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from actors.generator import Generator
from actors.generator_worker import GeneratorWorker
from actors.policy import Policy, PolicyRank
from actors.weights import TRANSPORTS, WeightsError
from minigpt_ray.config import GeneratorConfig, GeneratorPlacement, PlacementConfig
from tests.actors.broadcasting import GREEDY, PROMPTS, corrupt, move, started, tokens

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PLACEMENT = PlacementConfig(generator=GeneratorPlacement(tensor_parallel=2))


@pytest.fixture(scope="module")
def roles(ray_cluster: None, nano: Path) -> Iterator[tuple[Policy, Generator]]:
    with started(nano, PLACEMENT, GeneratorConfig(kv_cache_mib=16, max_num_seqs=16), 64) as both:
        yield both


@pytest.mark.parametrize("transport", ["nccl", "object_store"])
def test_both_parts_compute_with_what_is_published(roles: tuple[Policy, Generator], transport: str) -> None:
    """The probe compares the logprobs of both parts together with the policy's own. Over `nccl`, here gloo, each part is a member of the group."""

    def travel_by(rank: PolicyRank) -> None:
        rank.transport = TRANSPORTS[transport]()

    policy, generator = roles
    policy.call(travel_by).result()
    answers = []
    for version in (1, 2):
        move(policy, 0.05)
        generator.receive(policy.publish(version))
        (received,) = generator.received
        assert received.version == version and received.probe_gap < 1e-5
        answers.append(tokens(generator.generate(PROMPTS, GREEDY)))
    assert answers[0] != answers[1]


def test_what_a_part_finds_wrong_is_told_as_what_it_is(roles: tuple[Policy, Generator]) -> None:
    """In a process of its own it finds a byte that has changed on the way."""

    policy, generator = roles
    policy.call(lambda rank: setattr(rank, "transport", TRANSPORTS["nccl"]())).result()
    publication = policy.publish(3)
    corrupt(policy)
    with pytest.raises(WeightsError, match=f"weights version 3 arrived with fingerprint .*, published was {publication.fingerprint}"):
        generator.receive(publication)
    generator.receive(policy.publish(4))
    assert generator.received[0].version == 4 and generator.restarts == 0


def test_the_parts_of_a_worker_that_is_killed_end_with_it(roles: tuple[Policy, Generator]) -> None:
    def processes(worker: GeneratorWorker) -> list[int]:
        import psutil

        own = psutil.Process()
        return [own.pid, *(child.pid for child in own.children(recursive=True))]

    _, generator = roles
    ((own, *others),) = generator.call(processes).result()
    parts = [psutil.Process(pid) for pid in others]
    assert len(parts) >= 2
    os.kill(own, signal.SIGKILL)
    assert psutil.wait_procs(parts, timeout=30)[1] == []
