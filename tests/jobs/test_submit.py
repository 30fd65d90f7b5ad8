"""`ray job submit` to a head that runs on this machine, over HTTP and with a token, by the commands of the README's section on clusters."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from minigpt_ray.checkpoint import Checkpoints
from minigpt_ray.tracking import read_metrics
from tests.jobs.starts import random_start

CHECKOUT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
SMALL = ["placement.colocate=[[policy, critic, reference, rewards]]", "generator.backend=transformers", "evaluation.num_prompts=4"]
SECRETS = {"WANDB_API_KEY": "wandb" + "0123456789abcdef" * 2, "HF_TOKEN": "hf_" + "TheTokenOfTheHub" * 2}


def section(title: str) -> list[list[str]]:
    """The commands of the first bash block below a heading of the README, as words."""
    text = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    block = text[text.index(f"\n## {title}\n") :].split("```bash\n")[1].split("```")[0]
    return [words for line in block.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


TOKEN, EXPORT, START, SUBMIT, STOP = section("A cluster")


@dataclass(frozen=True)
class Head:
    """A head node on this machine, and the machine from outside."""

    address: str
    environment: dict[str, str]
    """Of whoever submits."""
    node_logs: Path

    def ray(self, *words: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BIN / "ray", *words], cwd=CHECKOUT, env=environment or self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
        )

    def submit(
        self, *overrides: str, job: str = "ppo", options: tuple[str, ...] = (), environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The README's command, of the debug configuration or of another job."""
        changed = {"http://127.0.0.1:8265": self.address, "jobs.ppo": f"jobs.{job}", "configs/ppo.yaml": f"configs/debug/{job}.yaml"}
        words = [changed.get(word, word) for word in SUBMIT[1:] if job != "scale" or word != "configs/ppo.yaml"]
        at = words.index("--")
        return self.ray(*words[:at], *options, *words[at:], *overrides, environment=environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Ports and directories of its own, so that nothing else of Ray's on this machine is met; secrets in its environment, as users are told."""
    home, sessions = tmp_path_factory.mktemp("home"), Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    assert EXPORT == ["export", "RAY_AUTH_MODE=token"]
    outside = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    outside |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    subprocess.run([BIN / "ray", *TOKEN[1:]], env=outside, check=True, capture_output=True)
    ports = {name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")}
    options = [f"--{name}={port}" for name, port in ports.items()]
    options += ["--block", f"--temp-dir={sessions}", "--node-ip-address=127.0.0.1", "--num-cpus=4", "--disable-usage-stats"]
    log = sessions / "start.log"
    with log.open("w") as file:
        node = subprocess.Popen([BIN / "ray", *START[1:], *options], env=outside | SECRETS, stdout=file, stderr=subprocess.STDOUT)
    found = Head(f"http://127.0.0.1:{ports['dashboard-port']}", outside, sessions)
    try:
        deadline = time.monotonic() + 120
        while found.ray("job", "list", "--address", found.address).returncode:
            assert node.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(1)
        yield found
    finally:
        processes = psutil.Process(node.pid).children(recursive=True) if node.poll() is None else []
        node.terminate()
        node.wait(timeout=60)
        for process in processes:
            if process.is_running():
                process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shared")
    random_start(directory, "submitted")
    return directory


@pytest.mark.ray
@pytest.mark.slow
def test_without_the_token_nothing_is_submitted(head: Head) -> None:
    refused = head.submit(environment=head.environment | {"RAY_AUTH_MODE": "disabled"})
    assert refused.returncode != 0 and "RAY_AUTH_MODE" in refused.stdout and "token" in refused.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_relative_output_dir_is_refused_with_code_2(head: Head) -> None:
    refused = head.submit("run=submitted")
    assert refused.returncode == 1  # that of `ray job submit` for any job that failed
    assert "output_dir: outputs is relative, but a submitted job runs in a temporary copy of the working directory" in refused.stdout
    assert "failed with exit code 2" in refused.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_a_submitted_job_runs_to_its_end_and_a_stopped_one_saves_its_step(head: Head, runs: Path) -> None:
    """Also, of both: no secret in what they wrote or said."""
    directory = runs / "submitted" / "ppo"
    overrides = (f"output_dir={runs}", "run=submitted", *SMALL)
    done = head.submit(*overrides, "steps=2")
    assert done.returncode == 0, done.stdout
    assert "succeeded" in done.stdout and re.search(r"^Epoch:\[1/1\]\(2/2\) actor_loss:", done.stdout, re.MULTILINE)
    assert (directory / "model" / "model.safetensors").is_file()
    assert json.loads((directory / "versions.json").read_text())["git_commit"] is None  # it ran in the copy that was shipped, which has no history

    more = ("steps=500", "checkpoint.every=100", "placement.generator.max_workers=2")
    submitted = head.submit(*overrides, *more, options=("--no-wait", "--submission-id=stopped"))
    assert submitted.returncode == 0, submitted.stdout
    deadline = time.monotonic() + 200
    while max(row["step"] for row in read_metrics(directory / "metrics.jsonl")) < 4:
        assert time.monotonic() < deadline, head.ray("job", "logs", "--address", head.address, "stopped").stdout
        time.sleep(0.2)
    scaled = head.submit(str(runs / "submitted"), "generator=2", job="scale")
    assert "the job has taken the request for 2 generator workers" in scaled.stdout
    stopped = head.ray("job", "stop", "--address", head.address, "stopped")
    assert stopped.returncode == 0 and "was stopped" in stopped.stdout, stopped.stdout
    said = head.ray("job", "logs", "--address", head.address, "stopped").stdout
    assert "PPO goes on after step 2" in said and "the generator goes from 1 to 2 workers" in said
    (step,) = re.findall(r"SIGTERM: step (\d+) is saved; checkpoint.resume=auto goes on from there", said)
    latest = Checkpoints(directory / "checkpoint", keep=2).latest()
    assert latest is not None and latest.name == f"step-{int(step):06d}" and int(step) >= 4

    logs = [path for path in head.node_logs.rglob("*") if path.is_file() and "logs" in path.parts]
    written = [path for path in directory.rglob("*") if path.is_file()]
    assert len(written) > 10 and len(logs) > 10
    for secret in SECRETS.values():
        assert secret not in done.stdout + said
        assert not [path for path in (*written, *logs) if secret.encode() in path.read_bytes()]


@pytest.mark.ray
@pytest.mark.slow
def test_stages_are_submitted_in_the_same_way(head: Head, runs: Path) -> None:
    overrides = (f"output_dir={runs}", "run=stages")
    prepared = head.submit(*overrides, job="prepare_data")
    assert prepared.returncode == 0, prepared.stdout
    trained = head.submit(*overrides, "steps=2", job="sft")
    assert trained.returncode == 0 and "sft starts:" in trained.stdout, trained.stdout
    assert (runs / "stages" / "sft" / "model" / "model.safetensors").is_file()
