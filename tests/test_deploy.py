"""The manifest for KubeRay, by the schema of its definition, by Kubernetes' and by Ray's own reader; the SLURM script, run with a SLURM of one host."""

import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import psutil
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from actors.placement import roles_of
from minigpt_ray.cli import read_config
from minigpt_ray.config import PPOConfig

ROOT = Path(__file__).parents[1]
MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


def closed(schema: Any) -> Any:
    """A schema that takes no property but those that it names: Kubernetes refuses others, or drops them, by how strict it is asked to be."""
    if isinstance(schema, list):
        return [closed(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: closed(part) for key, part in schema.items()} | ({"additionalProperties": False} if isinstance(schema.get("properties"), dict) else {})


SCHEMA = jsonschema.Draft202012Validator(closed(yaml.safe_load((ROOT / "tests" / "rayjob_schema.yaml").read_text())))


def pods() -> list[dict[str, Any]]:
    """The head's, and that of each group of workers."""
    cluster = MANIFEST["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def assert_is_a_pod(spec: dict[str, Any]) -> None:
    """By the schema of Kubernetes, as a pod, which is what an operator makes of it."""
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": spec}, kubernetes_validate.latest_version(), strict=True
    )


def test_the_manifest_is_what_the_definition_of_a_rayjob_takes() -> None:
    SCHEMA.validate(MANIFEST)
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", MANIFEST["metadata"]["name"])


def changed(path: str, value: Any) -> dict[str, Any]:
    """The manifest with something else at a path; None takes away what is there."""
    manifest = deepcopy(MANIFEST)
    place: Any = manifest
    *way, last = [int(word) if word.isdigit() else word for word in path.split(".")]
    for word in way:
        place = place[word]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return manifest


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("spec.shutdownAfterJobFinished", True, "'shutdownAfterJobFinished' was unexpected"),
        ("spec.rayClusterSpec.autoscaler", {}, "'autoscaler' was unexpected"),
        ("spec.backoffLimit", "3", "'3' is not of type 'integer'"),
        ("spec.rayClusterSpec.authOptions.mode", "password", "'password' is not one of"),
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0, "0 is not of type 'string'"),
        ("spec.rayClusterSpec.workerGroupSpecs.1.maxReplicas", None, "'maxReplicas' is a required property"),
        ("spec.rayClusterSpec.headGroupSpec.template", None, "'template' is a required property"),
        ("apiVersion", "ray.io/v1alpha1", "'ray.io/v1' was expected"),
    ],
)
def test_what_the_definition_does_not_take_is_refused(path: str, value: Any, message: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=re.escape(message)):
        SCHEMA.validate(changed(path, value))


def test_its_pods_are_what_kubernetes_takes() -> None:
    for pod in pods():
        assert_is_a_pod(pod)
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        assert_is_a_pod(pods()[0] | {"containers": [{"name": "ray", "volumeMount": []}]})


def test_groups_pods_and_variables_fit_together() -> None:
    for group in MANIFEST["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in pods():
        (container,) = pod["containers"]
        assert container["image"] and container["resources"].keys() == {"limits", "requests"}
        assert all(isinstance(amount, str) for amounts in container["resources"].values() for amount in amounts.values())
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        secrets = [entry for entry in container["env"] if entry["name"] in ("WANDB_API_KEY", "HF_TOKEN")]
        assert secrets and all("value" not in entry for entry in secrets)
    assert yaml.safe_load(MANIFEST["spec"]["runtimeEnvYAML"])["env_vars"] == yaml.safe_load((ROOT / "deploy/runtime_env.yaml").read_text())["env_vars"]


def test_rays_autoscaler_reads_it_and_the_smallest_cluster_holds_configs_ppo() -> None:
    """As it does in a cluster, where the operator hands it the RayCluster."""
    cluster = {"metadata": MANIFEST["metadata"], "spec": MANIFEST["spec"]["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0 and types["headgroup"]["resources"].get("GPU", 0) == 0
    assert {name: node["labels"] for name, node in types.items() if name != "headgroup"} == {name: {"role": name} for name in ("learner", "generator")}
    assert types["generator"]["min_workers"] < types["generator"]["max_workers"]
    config = read_config(PPOConfig, [str(ROOT / "configs/ppo.yaml")])
    roles = roles_of(config.placement, config.rewards).values()
    for resource, asked in (("CPU", sum(r.ranks * r.cpus for r in roles)), ("GPU", sum(r.ranks * r.gpus for r in roles))):
        assert asked <= sum(node["min_workers"] * node["resources"].get(resource, 0) for node in types.values())


def test_its_ray_is_the_one_that_is_installed_and_its_command_can_be_read() -> None:
    import ray

    assert MANIFEST["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    words = MANIFEST["spec"]["entrypoint"].rstrip('"').partition("jobs.ppo ")[2].split()
    read_config(PPOConfig, [str(ROOT / word) if word.endswith(".yaml") else word for word in words])


# ---------------------------------------------------------------------------------------------------------- SLURM

COMMANDS = {
    "scontrol": 'echo "scontrol $*" >> "$LOG"; printf "node1\\nnode2\\nnode3\\n"',
    "srun": 'echo "srun $*" >> "$LOG"; while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "hostname": "[[ $1 == --ip-address ]] && echo 127.0.1.1 || echo fe80::1 172.17.0.1 10.0.0.1",
    "ray": 'echo "ray $* mode=$RAY_AUTH_MODE token=${#RAY_AUTH_TOKEN}" >> "$LOG"; [[ $1 == start ]] && exec sleep 300 || exit 0',
    "python": 'if [[ $1 == -c ]]; then exec python3 "$@"; fi; echo "python $* at $RAY_ADDRESS" >> "$LOG"; '
    'trap "sleep 0.5; echo saved >> \\"$LOG\\"; exit $CODE" TERM; while true; do sleep 0.1; done',
}
"""What a SLURM allocation of three nodes and the environment provide, on one host; the driver saves at SIGTERM."""


@pytest.mark.parametrize("code", [0, 3])
def test_the_slurm_script_starts_ray_on_every_node_and_hands_sigterm_on(tmp_path: Path, code: int) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "bin").mkdir()
    for name, body in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    log = tmp_path / "log"
    environment = {
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
        "LOG": str(log),
        "CODE": str(code),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "node[1-3]",
    }
    script = subprocess.Popen(["bash", ROOT / "deploy/slurm.sh", "configs/ppo.yaml", "run=gsm"], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 30
        while not (log.exists() and "python -m" in log.read_text()):
            assert script.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # until the driver answers signals
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=30) == code
        said = log.read_text().splitlines()
        assert said[-1] == "saved"
        assert "python -m jobs.ppo placement.wait_seconds=300 configs/ppo.yaml run=gsm at 10.0.0.1:6379" in said
        assert "ray start --head --node-ip-address=10.0.0.1 --port=6379 --block mode=token token=64" in said
        assert "srun --overlap --nodes=2 --ntasks=2 --exclude=node1 ray start --address=10.0.0.1:6379 --block" in said
        deadline = time.monotonic() + 10
        while of_group(script.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not of_group(script.pid)
    finally:
        for process in of_group(script.pid):
            process.kill()


def of_group(group: int) -> list[psutil.Process]:
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
