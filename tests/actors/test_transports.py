"""Weights broadcast over a process group, here gloo between CPUs: the code that runs over NCCL between GPUs, through the real classes."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.generator import Generator
from actors.generator_worker import GeneratorWorker
from actors.group import PublicationUnsent, get_all
from actors.policy import Policy
from actors.weights import PublicationLost, WeightsError
from minigpt_ray.config import GeneratorConfig, GeneratorPlacement, PlacementConfig
from tests.actors.broadcasting import GREEDY, PROMPTS, corrupt, move, started, tokens

pytestmark = pytest.mark.ray

GENERATOR = GeneratorConfig(backend="transformers", restart_limit=1, sleep_between_phases=True)  # this engine gives back nothing, but forgets its version
PLACEMENT = PlacementConfig(generator=GeneratorPlacement(workers=2))


@pytest.fixture(scope="module")
def roles(ray_cluster: None, nano: Path) -> Iterator[tuple[Policy, Generator]]:
    with started(nano, PLACEMENT, GENERATOR, 32) as both:
        yield both


def of_workers(generator: Generator, ask: Callable[[GeneratorWorker], Any]) -> list[Any]:
    return generator.call(ask).result()


def versions(generator: Generator) -> list[int]:
    return of_workers(generator, lambda worker: worker.version)


def groups_of(generator: Generator) -> list[list[Any]]:
    def groups(worker: GeneratorWorker) -> list[Any]:
        from actors import weights

        return list(weights._groups)

    return of_workers(generator, groups)


def test_every_worker_proves_what_was_broadcast_and_the_group_is_kept(roles: tuple[Policy, Generator]) -> None:
    policy, generator = roles
    for version, change in ((1, 0.0), (2, 0.05)):
        move(policy, change)
        publication = policy.publish(version)
        assert publication.transport == "nccl" and max(spec.bucket for spec in publication.manifest) > 2
        generator.receive(publication)
        assert [r.version for r in generator.received] == [version, version]
        assert max(r.probe_gap for r in generator.received) < 1e-5
        ranks = groups_of(generator)
        assert [[rank for _, rank in group] for group in ranks] == [[1], [2]]
        meeting = ranks[0][0][0]
        if version == 1:
            first = meeting
    assert meeting == first and meeting.world == 3


def test_a_generator_that_slept_loads_the_publication_again_before_it_generates(roles: tuple[Policy, Generator]) -> None:
    policy, generator = roles
    generator.receive(policy.publish(3))
    rollouts = generator.generate(PROMPTS, GREEDY)
    assert versions(generator) == [-1, -1]
    assert of_workers(generator, lambda worker: worker.asleep) == [True, True]
    assert tokens(generator.generate(PROMPTS, GREEDY)) == tokens(rollouts)
    generator.receive(policy.publish(4))
    assert versions(generator) == [4, 4]
    assert of_workers(generator, lambda worker: worker.asleep) == [False, False]


def test_workers_rest_when_a_step_is_given_up_and_forget_what_they_were_asked(roles: tuple[Policy, Generator]) -> None:
    policy, generator = roles
    generator.receive(policy.publish(3))
    rollouts = generator.generate(PROMPTS, GREEDY)
    generator.receive(policy.publish(3))
    answers = generator.stream(PROMPTS, GREEDY, chunk=1)
    next(answers)
    answers.close()
    generator.rest()
    generator.rest()  # changes nothing
    assert of_workers(generator, lambda worker: (worker.version, worker.asleep, len(worker._open))) == [(-1, True, 0), (-1, True, 0)]
    assert tokens(generator.generate(PROMPTS, GREEDY)) == tokens(rollouts)


def test_workers_that_were_woken_for_weights_that_never_came_sleep_again(roles: tuple[Policy, Generator], monkeypatch: pytest.MonkeyPatch) -> None:
    policy, generator = roles
    generator.receive(policy.publish(3))
    generator.generate(PROMPTS, GREEDY)
    assert of_workers(generator, lambda worker: worker.asleep) == [True, True]

    def lose(*calls: Any) -> None:
        get_all(*calls)
        raise PublicationLost("the sender is gone")

    with monkeypatch.context() as patched, pytest.raises(PublicationUnsent):
        patched.setattr("actors.generator.get_all", lose)
        generator.receive(policy.publish(4))
    assert of_workers(generator, lambda worker: worker.asleep) == [False, False]
    generator.rest()
    assert of_workers(generator, lambda worker: worker.asleep) == [True, True]


def test_a_new_worker_is_brought_up_to_date_and_then_belongs_to_the_group(roles: tuple[Policy, Generator]) -> None:
    policy, generator = roles
    generator.receive(policy.publish(5))
    rollouts = generator.generate(PROMPTS, GREEDY)
    generator.receive(policy.publish(6))
    os.kill(of_workers(generator, lambda worker: __import__("os").getpid())[1], signal.SIGKILL)
    assert tokens(generator.generate(PROMPTS, GREEDY)) == tokens(rollouts)
    assert generator.restarts == 1
    generator.ready()  # the new worker may still be on its way
    generator.receive(policy.publish(7))
    assert versions(generator) == [7, 7]
    assert [[rank for _, rank in group] for group in groups_of(generator)] == [[1], [2]]


def test_a_byte_that_changes_on_the_way_is_found(roles: tuple[Policy, Generator]) -> None:
    policy, generator = roles
    publication = policy.publish(8)
    corrupt(policy)
    with pytest.raises(WeightsError, match=f"weights version 8 arrived with fingerprint .*, published was {publication.fingerprint}"):
        generator.receive(publication)
    assert versions(generator) == [-1, -1]
    generator.receive(policy.publish(9))
    assert versions(generator) == [9, 9]
