"""cluster.yaml: what Ray's own schema accepts, and enough for the job that it is written for."""

import json
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


def test_every_node_installs_from_the_lock_and_asks_for_the_token() -> None:
    assert any("requirements/install.py --gpu" in command for command in CLUSTER["setup_commands"])
    for start in (CLUSTER["head_start_ray_commands"], CLUSTER["worker_start_ray_commands"]):
        assert any("ray start" in command and "RAY_AUTH_MODE=token" in command for command in start)
    assert "~/.ray/auth_token" in CLUSTER["file_mounts"]
