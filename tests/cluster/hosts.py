"""A cluster of several hosts on one machine: network namespaces on a bridge of their own, each with an address and a host name.

Where these are not permitted the nodes of Ray share the machine's network, and whoever asks is told so.
"""

import http.client
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.jobs.runs import CHECKOUT

BIN = Path(sys.executable).parent
BRIDGE, NET = "mgr-bridge", "10.213.77"
"""The bridge, which is the machine's own end of the network, and the first three bytes of all addresses."""
START_SECONDS = 120.0


def run(*words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command of the system."""
    return subprocess.run([str(word) for word in words], check=check, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def namespaces_are_permitted() -> bool:
    """Whether this process may make network namespaces, and a bridge between them."""
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return False
    made = [run("ip", *add, check=False).returncode == 0 for add in (("netns", "add", "mgr-probe"), ("link", "add", "mgr-probe", "type", "bridge"))]
    for kind in ("netns", "link"):
        run("ip", kind, "del", "mgr-probe", check=False)
    return all(made)


@dataclass
class Host:
    """One host. Its name is that of its namespace too."""

    name: str
    number: int
    labels: str
    cpus: int
    sessions: Path
    """Ray's own directory."""
    isolated: bool
    """It has a namespace."""
    raylet: subprocess.Popen[bytes] | None = None
    powered: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the power goes or comes, or Ray is started."""

    @property
    def address(self) -> str:
        return f"{NET}.{self.number}" if self.isolated else "127.0.0.1"

    def enter(self) -> list[str]:
        """What a command begins with that runs on this host."""
        return ["ip", "netns", "exec", self.name] if self.isolated else []

    def processes(self) -> list[psutil.Process]:
        """All that run here."""
        if self.isolated:
            found = map(int, run("ip", "netns", "pids", self.name).stdout.split()) if self.name in run("ip", "netns", "list").stdout.split() else []
            return [process for pid in found for process in family(pid)[:1]]
        return family(self.raylet.pid) if self.raylet is not None and self.raylet.poll() is None else []

    def lose(self) -> None:
        """The power goes: every process ends at once, and the others hear nothing of it before the host is switched on again."""
        with self.lock:
            self.powered = False
            self.cut_off()
            self.end()

    def switch_on(self) -> None:
        """The power is back, or the network; of a host that was lost nothing runs yet."""
        with self.lock:
            self.cut_off(False)
            self.powered = True

    def end(self) -> None:
        """Every process is killed."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=30)
        if self.raylet is not None:
            self.raylet.wait(30)

    def cut_off(self, cut: bool = True) -> None:
        """Nothing reaches the host, and nothing leaves it; or everything does again."""
        if self.isolated:
            run("ip", "link", "set", f"mgr-{self.number}", "down" if cut else "up")


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started; nobody when it has just ended."""
    with suppress(psutil.NoSuchProcess):
        return [process := psutil.Process(pid), *process.children(recursive=True)]
    return []


@dataclass
class Hosts:
    """The hosts of a cluster; the first is its head."""

    isolated: bool
    environment: dict[str, str]
    """Of whoever starts nodes or submits jobs."""
    hosts: list[Host] = field(default_factory=list)

    def __getitem__(self, name: str) -> Host:
        return next(host for host in self.hosts if host.name == name)

    @property
    def dashboard(self) -> str:
        """Where jobs are submitted to, from outside."""
        return f"http://{self.hosts[0].address}:8265"

    def start(self, host: Host) -> None:
        """`ray start` on a host."""
        head = host is self.hosts[0]
        role = ["--head", "--port=6379", "--dashboard-host=0.0.0.0"] if head else [f"--address={self.hosts[0].address}:6379"]
        options = [*role, "--block", "--disable-usage-stats", f"--node-ip-address={host.address}", f"--num-cpus={host.cpus}", f"--labels={host.labels}"]
        options += [f"--temp-dir={host.sessions}", "--object-store-memory=200000000"]
        ray = shlex.join([str(BIN / "ray"), "start", *options])
        named = [*host.enter(), "unshare", "--uts", "sh", "-c", f"hostname {host.name}; exec {ray}"] if host.isolated else ["sh", "-c", f"exec {ray}"]
        with (host.sessions / "start.log").open("ab") as log:
            host.raylet = subprocess.Popen(named, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def start_again(self) -> None:
        """After the head was lost: the others' Ray ends without it, and all begin anew."""
        for host in self.hosts:
            if host.raylet is not None:
                host.raylet.wait(START_SECONDS)
            host.switch_on()
        self.start_all()

    def start_all(self) -> None:
        """The head, and the others as soon as it answers; until all have joined, else a job takes the room of those that are there."""
        for host in self.hosts:
            self.start(host)
            if host is self.hosts[0]:
                self.wait_until_up()
        deadline = time.monotonic() + START_SECONDS
        while (joined := self.num_joined()) < len(self.hosts):
            assert time.monotonic() < deadline, f"{joined} of {len(self.hosts)} nodes are there"
            time.sleep(0.5)

    def num_joined(self) -> int:
        """How many nodes the head knows that are alive."""
        found = self._get("api/v0/nodes")
        return sum(node["state"] == "ALIVE" for node in found["data"]["result"]["result"]) if found else 0

    def _get(self, path: str) -> dict[str, Any]:
        """What the head's dashboard says of `path`; empty when it says nothing."""
        token = (Path(self.environment["HOME"]) / ".ray" / "auth_token").read_text().strip()
        request = urllib.request.Request(f"{self.dashboard}/{path}", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return dict(json.load(answer))
        except (OSError, http.client.HTTPException, ValueError):  # the last: it was cut off in the middle of an answer
            return {}

    def ray(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`ray job`, or another command that speaks to the head over HTTP, from outside."""
        return subprocess.run(
            [BIN / "ray", *words], cwd=CHECKOUT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900
        )

    def submit(self, name: str, home: Path, *words: str) -> None:
        """`ray job submit` of a job with this name; modules in `home` are found by it."""
        variables = json.dumps({"env_vars": {"PYTHONPATH": str(home)}})
        options = ("--working-dir", ".", f"--runtime-env-json={variables}", "--no-wait", f"--submission-id={name}")
        done = self.ray("job", "submit", "--address", self.dashboard, *options, "--", *words)
        assert done.returncode == 0, done.stdout

    def status(self, name: str) -> str:
        """Of a job, as the head says over HTTP: `PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED`, `STOPPED`; empty when it says nothing."""
        return str(self._get(f"api/jobs/{name}").get("status", ""))

    def log(self, name: str) -> str:
        """What a job has said so far."""
        return "".join(path.read_text(errors="replace") for path in self.hosts[0].sessions.glob(f"session_2*/logs/job-driver-{name}.log"))

    @contextmanager
    def kept_up(self) -> Iterator[None]:
        """Where Ray has ended on a host with power it is started again, as KubeRay does, or a service of the system."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(1):
                for host in self.hosts:
                    with host.lock:
                        if host.powered and host.raylet is not None and host.raylet.poll() is not None:
                            self.start(host)

        keeper = threading.Thread(target=keep)
        keeper.start()
        try:
            yield
        finally:
            over.set()
            keeper.join()

    def answers(self) -> bool:
        """Whether the head takes jobs."""
        return not self.ray("job", "list", "--address", self.dashboard).returncode

    def wait_until_up(self) -> None:
        """The head answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            log = self.hosts[0].sessions / "start.log"
            assert self.hosts[0].raylet is not None and self.hosts[0].raylet.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(1)


@contextmanager
def cluster(home: Path, labels: Mapping[str, str], cpus: int) -> Iterator[Hosts]:
    """Hosts with these names and labels, joined to one cluster; in the end nothing of them is left, whatever happened. Warns where they share an address.

    home: a directory that all of them see. cpus: of each host.
    """
    isolated = namespaces_are_permitted()
    if not isolated:
        warnings.warn("network namespaces are not permitted here; the nodes of the cluster share this machine's address", stacklevel=3)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token"}
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment, check=True, capture_output=True)
    hosts = Hosts(isolated, environment)
    try:
        for number, (name, of_node) in enumerate(labels.items(), 1):
            hosts.hosts.append(Host(name, number, of_node, cpus, Path(tempfile.mkdtemp(prefix="ray", dir="/tmp")), isolated))
        if isolated:
            _connect(hosts.hosts)
        hosts.start_all()
        yield hosts
    finally:
        for host in hosts.hosts:
            with suppress(psutil.TimeoutExpired, subprocess.SubprocessError):
                host.end()
            shutil.rmtree(host.sessions, ignore_errors=True)
        if isolated:
            _disconnect(hosts.hosts)


def _connect(hosts: list[Host]) -> None:
    """A namespace for each host, on a bridge that the machine is on too; every host finds the others by name."""
    _disconnect(hosts)
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{NET}.254/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")
    names = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in hosts)
    for host in hosts:
        own = Path("/etc/netns") / host.name  # `ip netns exec` lays these files over those of /etc
        own.mkdir(parents=True, exist_ok=True)
        (own / "hosts").write_text(names)
        run("ip", "netns", "add", host.name)
        run("ip", "link", "add", f"mgr-{host.number}", "type", "veth", "peer", "name", "eth0", "netns", host.name)
        run("ip", "link", "set", f"mgr-{host.number}", "master", BRIDGE, "up")
        run(*host.enter(), "ip", "addr", "add", f"{host.address}/24", "dev", "eth0")
        run(*host.enter(), "ip", "link", "set", "eth0", "up")
        run(*host.enter(), "ip", "link", "set", "lo", "up")


def _disconnect(hosts: list[Host]) -> None:
    for host in hosts:
        for pid in run("ip", "netns", "pids", host.name, check=False).stdout.split():
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(pid), signal.SIGKILL)
        run("ip", "link", "del", f"mgr-{host.number}", check=False)
        run("ip", "netns", "del", host.name, check=False)
        shutil.rmtree(Path("/etc/netns") / host.name, ignore_errors=True)
    run("ip", "link", "del", BRIDGE, check=False)
