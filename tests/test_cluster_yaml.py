"""cluster.yaml: what Ray's own schema accepts, and enough for the job that it is written for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from actors.placement import roles_of
from minigpt_ray.cli import read_config
from minigpt_ray.config import PPOConfig

ROOT = Path(__file__).parents[1]
SCHEMA = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
CLUSTER: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
NODES: dict[str, Any] = CLUSTER["available_node_types"]
WORKERS = {name: node for name, node in NODES.items() if name != CLUSTER["head_node_type"]}


def test_rays_own_schema_accepts_it() -> None:
    validator = jsonschema.validators.validator_for(SCHEMA)(SCHEMA)
    assert [error.message for error in validator.iter_errors(CLUSTER)] == []


def test_the_schema_refuses_a_misspelt_field() -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(CLUSTER | {"min_worker": 1}, SCHEMA)


def test_the_head_has_no_gpu_and_learners_and_generators_have() -> None:
    assert not NODES[CLUSTER["head_node_type"]]["resources"].get("GPU")
    assert set(WORKERS) == {"learner", "generator"}
    assert all(node["resources"]["GPU"] > 0 for node in WORKERS.values())


def test_node_counts_are_ordered_and_the_generators_can_grow() -> None:
    assert all(0 <= node["min_workers"] <= node["max_workers"] for node in NODES.values())
    assert WORKERS["generator"]["min_workers"] < WORKERS["generator"]["max_workers"]
    assert sum(node["max_workers"] for node in WORKERS.values()) <= CLUSTER["max_workers"]


def test_the_smallest_cluster_holds_configs_ppo() -> None:
    config = read_config(PPOConfig, [str(ROOT / "configs/ppo.yaml")])
    roles = roles_of(config.placement, config.rewards).values()
    for resource, asked in (("CPU", sum(r.ranks * r.cpus for r in roles)), ("GPU", sum(r.ranks * r.gpus for r in roles))):
        present = sum(node["min_workers"] * node["resources"][resource] for node in WORKERS.values())
        assert asked <= present, f"configs/ppo.yaml asks for {asked} {resource}, the smallest cluster has {present}"


PLACES = """
import collections, json, sys
import ray
from ray.cluster_utils import Cluster as Nodes
from ray.util import placement_group_table
from actors.placement import Cluster, roles_of
from actors.preflight import PlacementError
from minigpt_ray.cli import read_config
from minigpt_ray.config import PPOConfig

nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 0})
kinds = {}
for name, kind in json.loads(sys.argv[1]).items():
    for _ in range(kind["min_workers"]):
        node = nodes.add_node(num_cpus=kind["resources"]["CPU"], num_gpus=kind["resources"]["GPU"], labels=kind["labels"], object_store_memory=100_000_000)
        kinds[node.node_id] = name
for labels in ([], ["placement.policy.labels={role: learner}"], [f"placement.{role}.labels={{role: learner}}" for role in ("policy", "critic", "reference")]):
    config = read_config(PPOConfig, ["configs/ppo.yaml", "placement.wait_seconds=30", f"placement.address={nodes.address}", *labels])
    with Cluster(config.placement, roles_of(config.placement, config.rewards)) as cluster:
        where = {}
        for role, places in cluster._places.items():
            tables = [placement_group_table(place.group)["bundles_to_node_id"][place.bundle] for place in places]
            where[role] = dict(collections.Counter(kinds[node] for node in tables))
        print(json.dumps(where))
ray.shutdown()
nodes.shutdown()
"""


@pytest.mark.ray
@pytest.mark.slow
def test_on_the_smallest_cluster_learners_and_generators_have_their_own_nodes_whether_they_ask_for_labels_or_not() -> None:
    """Real nodes of Ray that say that they have GPUs; places alone, no process of a role."""
    done = subprocess.run([sys.executable, "-c", PLACES, json.dumps(WORKERS)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(found) == 3
    for where in found:
        assert where.pop("rewards").keys() <= {"learner", "generator"}
        assert where == {"policy": {"learner": 2}, "critic": {"learner": 1}, "reference": {"learner": 1}, "generator": {"generator": 4}}


def test_every_node_installs_from_the_lock_and_asks_for_the_token() -> None:
    assert any("requirements/install.py --gpu" in command for command in CLUSTER["setup_commands"])
    for start in (CLUSTER["head_start_ray_commands"], CLUSTER["worker_start_ray_commands"]):
        assert any("ray start" in command and "RAY_AUTH_MODE=token" in command for command in start)
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]
