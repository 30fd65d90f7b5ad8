"""Workers join and leave while prompts are answered, nobody waits for them, and the tokens are those of one worker."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from ray._private.node import Node
from ray._private.parameter import RayParams

from actors import pool
from actors.generator import Generation, Generator
from actors.generator_worker import GeneratorWorker
from actors.group import OutOfRestarts
from actors.parent import RESTARTS
from actors.placement import Cluster
from actors.rank_host import Rank
from actors.weights import PublicationLost, fetch
from minigpt_ray.config import GeneratorConfig, GeneratorPlacement, PlacementConfig, SamplingConfig
from minigpt_ray.models import load_causal
from minigpt_ray.rl.experience import Prompt, Rollout
from minigpt_ray.scaling import PATIENCE, Autoscaler, Requests
from tests.actors.test_generator import published

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers' processes cannot import a test
pytestmark = [pytest.mark.ray, pytest.mark.slow]

SAMPLING = SamplingConfig(max_tokens=24, n=2)
PROMPTS = [Prompt(i, ({"role": "user", "content": "?"},), np.arange(5, 8 + i % 7, dtype=np.int32), "source", None) for i in range(24)]


class Elastic:
    """A pool of one worker that takes four prompts at a time, what it said, and what a lone worker answers with the weights of version 1."""

    def __init__(self, generator: Generator, cluster: Cluster, directory: Path) -> None:
        self.generator, self.cluster, self.requests, self.said = generator, cluster, Requests(directory), list[str]()
        generator.obey(self.requests, self.said.append)
        generator.ready()
        generator.receive(published(load_causal(generator._args[0], "float32").eval(), version=1))
        self.alone = tokens(generator.generate(PROMPTS, SAMPLING))

    def ask(self, workers: int) -> None:
        self.requests.ask(workers)
        self.generator._looked = 0.0  # it looks once a second

    @property
    def pids(self) -> list[int]:
        return [place["pid"] for place in self.generator.whereabouts()]


def tokens(rollouts: Sequence[Rollout]) -> list[tuple[int, int, list[int]]]:
    return [(r.group, r.sample, r.token_ids.tolist()) for r in rollouts]


@pytest.fixture(scope="module")
def elastic(ray_cluster: None, nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elastic]:
    placement = PlacementConfig(generator=GeneratorPlacement())
    with Cluster(placement, {"generator": placement.generator}) as cluster:
        config = GeneratorConfig(backend="transformers", max_num_seqs=8)
        yield Elastic(Generator(cluster, str(nano), config, 64, 1, seed=3, probe_tolerance=1e-3), cluster, tmp_path_factory.mktemp("stage"))


def test_workers_that_join_are_not_waited_for_and_change_no_token(elastic: Elastic) -> None:
    generator = elastic.generator
    elastic.ask(3)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    assert len(generator.workers) == 1 and elastic.said[-1] == "the generator goes from 1 to 3 workers"  # libraries take seconds to load
    generator.ready()
    assert [worker.version for worker in generator.workers] == [1, -1, -1]
    generator.reset_usage()
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone  # they load the weights while the first one answers
    while len(generator.able) < 3:
        generator.bring_up_to_date()
    assert elastic.said[-1] == "a generator worker has joined, with weights version 1; 3 of 3 are there"
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    assert min(worker.memory_bytes for worker in generator.workers) > 0  # all of them answered
    metrics = generator.metrics()
    assert (metrics["pool/generator/workers"], metrics["pool/generator/joined"], metrics["pool/generator/left"]) == (3, 2, 0)
    assert 0 <= metrics["pool/generator/idle_share"] <= 1 and metrics["pool/generator/queue_depth"] > 0


def test_a_worker_that_stands_still_does_not_hold_the_others(elastic: Elastic) -> None:
    generator = elastic.generator
    still = elastic.pids[0]
    os.kill(still, signal.SIGSTOP)
    try:
        assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    finally:
        os.kill(still, signal.SIGCONT)
    assert generator.restarts == 0
    assert tokens(generator.generate(PROMPTS[::-1], SAMPLING))[-2:] == elastic.alone[:2]  # and is of use again


class Owner:
    """What it puts into the object store goes with it."""

    def put(self, values: Sequence[Any]) -> list[Any]:
        return [ray.put(value) for value in values]


@pytest.mark.parametrize("is_lost", [False, True], ids=["older weights arrive late", "older weights are gone"])
def test_after_a_rewind_a_late_worker_proves_the_version_that_it_had_before_again(elastic: Elastic, is_lost: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions are steps, so after a rewind other weights have the version that everybody proved; what became of those in between does not matter."""
    monkeypatch.setattr("actors.generator.SLOW_SECONDS", 0.5)
    generator, model = elastic.generator, load_causal(elastic.generator._args[0], "float32").eval()
    right = published(model, version=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    wrong, before = published(model, version=2), published(model, version=1)
    owner: Any = ray.remote(Owner).options(num_cpus=0).remote()
    before = replace(before, buckets=tuple(ray.get(owner.put.remote(ray.get(list(before.buckets))))))
    generator.receive(wrong)
    late = generator.workers[0]
    os.kill(elastic.pids[0], signal.SIGSTOP)
    try:
        generator.receive(before)
        generator.receive(right)
        assert late not in generator.able and len(generator.able) == 2
        if is_lost:
            ray.kill(owner)
            with pytest.raises(PublicationLost):
                while True:  # for a while the node has them still
                    fetch(before)
                    time.sleep(0.5)
    finally:
        os.kill(elastic.pids[0], signal.SIGCONT)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    while late not in generator.able:
        assert late in generator.workers
        generator.bring_up_to_date()
    late.memory_bytes = 0
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    assert late.memory_bytes > 0  # it answered its share
    generator.receive(published(load_causal(generator._args[0], "float32").eval(), version=1))


def test_workers_that_leave_finish_and_give_their_room_back(elastic: Elastic) -> None:
    generator = elastic.generator
    pids, free = elastic.pids, ray.available_resources()["CPU"]
    elastic.ask(1)
    generator._looked = float("inf")  # found in the middle of an answer
    look = threading.Timer(0.05, lambda: setattr(generator, "_looked", 0.0))
    look.start()
    assert tokens(generator.generate(PROMPTS * 2, SAMPLING)) == elastic.alone * 2
    generator.advance()
    assert len(generator.workers) == 1 and generator.left == 2 and generator.restarts == 0
    assert elastic.pids == pids[:1]
    for _ in range(100):
        if ray.available_resources()["CPU"] == free + 2:
            break
        threading.Event().wait(0.1)
    assert ray.available_resources()["CPU"] == free + 2
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone


def test_a_call_to_all_that_is_made_again_reaches_who_has_come_meanwhile(elastic: Elastic) -> None:
    generator = elastic.generator
    os.kill(elastic.pids[0], signal.SIGKILL)
    call = generator.call(GeneratorWorker.load_checkpoint, 1, generator._args[0])
    generator.resize(2)
    generator.ready()  # the newcomer is there, and nobody has noticed the death
    assert call.result() == [None, None] and generator.restarts == 1
    generator.use_checkpoint(1)
    assert len(generator.able) == 2 and elastic.said[-1].endswith("has joined, with weights version 1; 2 of 2 are there")
    generator.resize(1)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone


def no_model(*_: object) -> GeneratorWorker:
    raise ValueError("no memory for a model")


def test_a_newcomer_that_cannot_start_is_given_up(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = elastic.generator
    monkeypatch.setattr(generator, "_build", no_model)
    generator.resize(2)
    generator.ready()
    assert elastic.said[-1] == "a generator worker that was to join could not start (ValueError: no memory for a model); the job goes on with 1"
    assert generator.size == 1 and tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone


def test_a_worker_that_cannot_start_in_the_place_of_another_counts_as_one_that_died(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, start = elastic.generator, elastic.generator._start
    built = [no_model, generator._build]

    def start_next(*args: Any, **kwargs: Any) -> None:
        generator._build = built.pop(0)
        start(*args, **kwargs)

    monkeypatch.setattr(generator, "_start", start_next)
    before = generator.restarts
    os.kill(elastic.pids[0], signal.SIGKILL)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    assert not built and generator.restarts == before + 2
    generator.refill()


def test_the_last_workers_death_waits_for_a_newcomer_and_ends_the_job_when_that_cannot_start(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = elastic.generator
    monkeypatch.setattr(generator, "_restarts_left", 0)
    generator.resize(2)
    os.kill(elastic.pids[0], signal.SIGKILL)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone  # the newcomer answers
    assert "generator.restart_limit is used up until the next checkpoint; the job goes on with 1" in elastic.said[-2] and generator.size == 1

    monkeypatch.setattr(generator, "_build", no_model)
    generator.resize(2)
    os.kill(elastic.pids[0], signal.SIGKILL)
    with pytest.raises(OutOfRestarts, match=r"processes of generator died more often than generator\.restart_limit allows"):
        generator.generate(PROMPTS, SAMPLING)
    monkeypatch.undo()
    generator.refill()
    generator.resize(1)
    generator.ready()
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone


def test_a_worker_that_dies_while_it_leaves_is_not_replaced(elastic: Elastic) -> None:
    generator = elastic.generator
    generator.resize(2)
    generator.ready()
    generator.resize(1)
    before, left = generator.restarts, generator.left
    generator.replace(generator.workers[1], RuntimeError())
    assert (generator.restarts, generator.left) == (before, left + 1) and len(generator.workers) == 1 and not generator.on_their_way
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone


def never_built(*_: object) -> GeneratorWorker:
    threading.Event().wait()
    raise AssertionError


def test_a_newcomer_that_is_never_built_is_ended_and_given_up(elastic: Elastic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    generator = elastic.generator
    monkeypatch.setattr(pool, "START_SECONDS", 8.0)
    monkeypatch.setattr(elastic.cluster, "config", elastic.cluster.config.model_copy(update={"hang_after_s": 8.0}))
    monkeypatch.setattr(generator, "_build", never_built)
    generator.resize(2)
    generator.ready()
    assert re.search(r"generator worker \d+ \(process \d+ on [\d.]+, \w+\) has been in RankHost\.build for 8 s and counts as dead", caplog.text)
    assert "most recent call first" in caplog.text  # on a busy machine it may still be importing
    assert elastic.said[-1].endswith("the job goes on with 1")


def test_a_pool_that_may_scale_itself_grows_with_the_queue_and_shrinks_when_it_is_idle(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = elastic.generator
    monkeypatch.setattr(generator, "placement", GeneratorPlacement(max_workers=2, autoscale=True))
    monkeypatch.setattr(generator, "_autoscaler", Autoscaler(generator.placement))

    def step(prompts: Sequence[Prompt]) -> None:
        generator.reset_usage()
        generator.generate(prompts, SAMPLING)
        generator.receive(published(load_causal(generator._args[0], "float32").eval(), version=1))

    step(PROMPTS * 4)
    assert generator.size == 2
    assert any(
        re.fullmatch(r"the generator goes from 1 to 2 workers: [\d.]+ prompts waited, the workers were idle for \d+% of the time", said)
        for said in elastic.said
    )
    generator.ready()
    for _ in range(PATIENCE + 2):  # in the first of them the second worker has yet to load the weights
        step(PROMPTS[:1])
    generator.advance()
    assert generator.size == len(generator.workers) == 1


def test_of_a_chunk_the_longest_prompt_is_handed_out_first(elastic: Elastic) -> None:
    dispatch = Generation(elastic.generator, PROMPTS, SAMPLING, chunk=8).dispatch
    dispatch.balance([0], now=0.0)
    order = dispatch.orders(0).new
    assert [place // 8 for place in order] == sorted(place // 8 for place in range(24))
    lengths = [len(PROMPTS[place].token_ids) for place in order]
    assert all(lengths[start : start + 8] == sorted(lengths[start : start + 8], reverse=True) for start in (0, 8, 16)) and len(set(lengths)) > 2


def test_what_the_cluster_cannot_hold_is_said_and_the_job_goes_on(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = elastic.generator
    monkeypatch.setattr(pool, "ROOM_SECONDS", 0.0)
    room = int(ray.available_resources()["CPU"])
    monkeypatch.setattr(generator, "_start", lambda place, newcomer: elastic.cluster.give_back("generator", place))  # whom there is room for need not start
    elastic.ask(room + 3)
    assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
    (sentence,) = [said for said in elastic.said if "has no room" in said]
    assert "(1 CPU each); the job goes on with" in sentence and "the others join when nodes are added" in sentence
    generator.resize(1)
    assert not generator._wishes and [worker.leaving for worker in generator.workers] == [False]


def test_what_was_asked_before_the_job_began_is_forgotten(elastic: Elastic) -> None:
    elastic.ask(3)
    elastic.generator.obey(elastic.requests, elastic.said.append)
    elastic.ask(1)
    elastic.generator.advance()
    assert elastic.generator.size == 1


def test_what_a_dead_driver_was_asked_its_successor_remembers(elastic: Elastic, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = elastic.generator
    monkeypatch.setattr(generator, "resize", lambda size: setattr(generator, "size", size))  # nobody need start for it
    elastic.ask(3)
    generator.advance()
    generator.size = 1
    monkeypatch.setenv(RESTARTS, "1")
    generator.obey(elastic.requests, elastic.said.append)
    assert generator.size == 3
    elastic.requests.ask(2)  # while there was no driver
    generator.obey(elastic.requests, elastic.said.append)
    assert generator.size == 2
    monkeypatch.delenv(RESTARTS)
    generator.size = 1
    generator.obey(elastic.requests, elastic.said.append)
    assert generator.size == 1 and not elastic.requests.taken_path.exists()


def test_a_number_outside_the_bounds_is_refused_by_the_job_as_well(elastic: Elastic) -> None:
    elastic.ask(0)
    elastic.generator.advance()
    assert elastic.generator.size == 1 and elastic.said[-1].startswith("generator=0 is outside")


# ------------------------------------------------------------------------------------------------ a node that ends


@contextmanager
def away(cpus: int = 1) -> Iterator[str]:
    """One more node of the cluster, labelled `zone=away`; its id."""
    address = ray.get_runtime_context().gcs_address
    options = RayParams(gcs_address=address, num_cpus=cpus, labels={"zone": "away"}, object_store_memory=100_000_000)
    node = Node(options, head=False, shutdown_at_exit=False, spawn_reaper=False)  # `ray start` would make it the machine's own cluster
    try:
        while not any(found["Alive"] and found["NodeID"] == node.node_id for found in ray.nodes()):
            time.sleep(0.1)
        yield node.node_id
    finally:
        node.kill_all_processes(check_alive=False, allow_graceful=False)
        while any(found["Alive"] and found["NodeID"] == node.node_id for found in ray.nodes()):
            time.sleep(0.1)


def test_a_node_that_joins_is_used_and_one_that_announces_its_end_is_left_before_it(
    ray_cluster: None, nano: Path, elastic: Elastic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the one that ends the worker answers until another one is there, which costs no restart and changes no token."""
    monkeypatch.setattr(pool, "ROOM_SECONDS", 0.0)
    placement = PlacementConfig(generator=GeneratorPlacement(labels={"zone": "away"}))
    with away() as first, Cluster(placement, {"generator": placement.generator}) as cluster, ExitStack() as nodes:
        generator = Generator(cluster, str(nano), GeneratorConfig(backend="transformers", max_num_seqs=8), 64, 1, seed=3, probe_tolerance=1e-3)
        said: list[str] = []
        generator.obey(Requests(nano), said.append)
        generator.ready()
        generator.receive(published(load_causal(str(nano), "float32").eval(), version=1))
        assert [worker.node for worker in generator.workers] == [first]
        generator.resize(2)
        assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
        assert len(said) == 1 and said[0].startswith("the cluster has no room for 1 of 2 generator workers (1 CPU each); the job goes on with 1")
        monkeypatch.setattr(pool, "ROOM_SECONDS", 100.0)
        second = nodes.enter_context(away())
        while len(generator.able) < 2:
            assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
        assert [worker.node for worker in generator.workers] == [first, second]
        assert said.pop() == "a generator worker has joined, with weights version 1; 2 of 2 are there"
        generator.resize(1)
        generator.advance()
        assert [worker.node for worker in generator.workers] == [first] and said.pop() == "a generator worker has left; workers now: 1"
        drain = ["drain-node", f"--address={ray.get_runtime_context().gcs_address}", f"--node-id={first}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        subprocess.run([Path(sys.executable).parent / "ray", *drain, "--reason-message=test", "--deadline-remaining-seconds=300"], check=True)
        while [worker.node for worker in generator.workers] != [second]:
            assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
        assert said[1:] == ["the node of generator worker 0 is about to end; another one is started elsewhere", "a generator worker has left; workers now: 1"]
        assert generator.restarts == 0


class Idle:
    def __init__(self, rank: Rank) -> None:
        pass


def test_a_driver_that_follows_a_dead_one_begins_with_the_workers_for_which_there_is_room(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTS, "1")
    monkeypatch.setattr(pool, "ROOM_SECONDS", 0.5)
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2, labels={"zone": "away"}))
    with away() as first, Cluster(placement, {"generator": placement.generator}) as cluster:
        workers, said = pool.Pool(cluster, "generator", Idle, restarts=0), list[str]()
        workers._say = said.append
        workers.ready()
        assert [worker.node for worker in workers.workers] == [first] and workers.size == 2
        assert said[0].startswith(
            "the cluster has no room for 1 of 2 generator workers (1 CPU each); the job goes on with 1, and the others join when nodes are added"
        )
        with away() as second:
            while workers.on_their_way:
                workers.advance()
            assert [worker.node for worker in workers.workers] == [first, second]


def test_workers_that_die_with_their_node_cost_one_restart_and_come_back_when_there_is_room(
    ray_cluster: None, nano: Path, elastic: Elastic, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first node is gone for good; for a while there is no worker at all."""
    monkeypatch.setattr(pool, "ROOM_SECONDS", 0.0)
    monkeypatch.setattr(pool, "SAY_AGAIN_SECONDS", 1.0)
    placement = PlacementConfig(generator=GeneratorPlacement(workers=2, labels={"zone": "away"}))
    with ExitStack() as nodes:
        first = ExitStack()
        nodes.enter_context(first)
        gone = first.enter_context(away(cpus=2))
        cluster = nodes.enter_context(Cluster(placement, {"generator": placement.generator}))
        config = GeneratorConfig(backend="transformers", max_num_seqs=8, restart_limit=1)
        generator = Generator(cluster, str(nano), config, 64, 1, seed=3, probe_tolerance=1e-3)
        generator.ready()
        generator.receive(published(load_causal(str(nano), "float32").eval(), version=1))
        assert [worker.node for worker in generator.workers] == [gone, gone]
        first.close()
        coming = threading.Timer(3.0, lambda: nodes.enter_context(away(cpus=2)))
        coming.start()
        assert tokens(generator.generate(PROMPTS, SAMPLING)) == elastic.alone
        coming.join()
        generator.ready()
        assert generator.size == len(generator.workers) == 2 and generator.restarts == 2 and generator._restarts_left == 0
        assert gone not in [worker.node for worker in generator.workers]
        assert "the cluster has no room for 2 of 2 generator workers (1 CPU each); the job goes on when nodes are added" in caplog.text
        generator.refill()
        assert generator._restarts_left == 1
