"""The manifest for KubeRay, by its fields, by Kubernetes' schema and by Ray's own reader; the SLURM script, run with a SLURM of one host."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import psutil
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from actors.placement import roles_of
from minigpt_ray.cli import read_config
from minigpt_ray.config import PPOConfig

ROOT = Path(__file__).parents[1]
MANIFEST: dict[str, Any] = yaml.safe_load((ROOT / "deploy" / "rayjob.yaml").read_text())


class Fields(BaseModel):
    """Fields of KubeRay's v1 types, in their own spelling; others are refused. Names, types and what must be there are those of the models that KubeRay generates from its CRD."""

    model_config = ConfigDict(extra="forbid", strict=True)


class PodTemplate(Fields):
    spec: dict[str, Any]
    """Kubernetes' own: held against its schema below."""


class HeadGroup(Fields):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(HeadGroup):
    groupName: str
    labels: dict[str, str] = {}
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=0)


class AuthOptions(Fields):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Fields):
    idleTimeoutSeconds: int


class RayClusterSpec(Fields):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class SubmitterConfig(Fields):
    backoffLimit: int


class RayJobSpec(Fields):
    entrypoint: str
    runtimeEnvYAML: str
    backoffLimit: int
    submitterConfig: SubmitterConfig
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: RayClusterSpec


class Metadata(Fields):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    namespace: str


class RayJob(Fields):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


def pods(job: RayJob) -> list[dict[str, Any]]:
    """The head's, and that of each group of workers."""
    cluster = job.spec.rayClusterSpec
    return [group.template.spec for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs)]


def assert_is_a_pod(spec: dict[str, Any]) -> None:
    """By the schema of Kubernetes, as a pod, which is what an operator makes of it."""
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, "spec": spec}, kubernetes_validate.latest_version(), strict=True
    )


def test_the_manifest_has_the_fields_of_a_rayjob() -> None:
    job = RayJob.model_validate(MANIFEST)
    for group in job.spec.rayClusterSpec.workerGroupSpecs:
        assert group.minReplicas <= group.replicas <= group.maxReplicas
    for pod in pods(job):
        (container,) = pod["containers"]
        assert container["image"] and container["resources"].keys() == {"limits", "requests"}
        assert all(isinstance(amount, str) for amounts in container["resources"].values() for amount in amounts.values())
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        secrets = [entry for entry in container["env"] if entry["name"] in ("WANDB_API_KEY", "HF_TOKEN")]
        assert secrets and all("value" not in entry for entry in secrets)
    assert yaml.safe_load(job.spec.runtimeEnvYAML)["env_vars"] == yaml.safe_load((ROOT / "deploy/runtime_env.yaml").read_text())["env_vars"]


def test_its_pods_are_what_kubernetes_takes() -> None:
    for pod in pods(RayJob.model_validate(MANIFEST)):
        assert_is_a_pod(pod)


def test_a_misspelt_field_is_refused() -> None:
    spec = MANIFEST["spec"] | {"shutdownAfterJobFinished": True}
    with pytest.raises(ValidationError, match="shutdownAfterJobFinished"):
        RayJob.model_validate(MANIFEST | {"spec": spec})
    pod = pods(RayJob.model_validate(MANIFEST))[0]
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        assert_is_a_pod(pod | {"containers": [{"name": "ray", "volumeMount": []}]})


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
    "hostname": "echo 10.0.0.1 fe80::1",
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
        assert "python -m jobs.ppo configs/ppo.yaml run=gsm placement.wait_seconds=300 at 10.0.0.1:6379" in said
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
