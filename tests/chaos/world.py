"""Where runs are attacked: one start, one reward server that can misbehave, one run that nobody touches, and the jobs."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from minigpt_ray.models import export, load_scalar
from minigpt_ray.tokenizer import load_tokenizer
from tests.jobs.runs import CHECKOUT, LOWER_CASE, ONE_PROCESS, Finished, command, environment, metrics_so_far, title
from tests.jobs.starts import random_start

HANG_SECONDS = 45.0
"""placement.hang_after_s: longer than any call of these runs takes, on a machine that does other things too."""
OPTIONS = (
    *("evaluation.every=1000", "evaluation.num_prompts=4", "checkpoint.every=2"),
    *("rewards.letters.timeout_s=10", "rewards.model={kind: model, init_from: reward_model, weight: 0.1}"),
)
SOON_DEAD = f"placement.hang_after_s={HANG_SECONDS:g}"
TWO_RANKS = ("placement.policy.ranks=2", "placement.critic.ranks=2")
FORMS = {
    "narrow": (SOON_DEAD,),
    "wide": (SOON_DEAD, *TWO_RANKS, "placement.generator.workers=2", "placement.generator.tensor_parallel=2", "placement.generator.min_workers=1"),
    "hosts": TWO_RANKS,
}
"""Options of runs with one process to a role; of runs with several, in which a death leaves the others waiting in a collective; of runs on the hosts of
a cluster."""
END_SECONDS = 600.0
"""How long a step, or the end, may take after a fault."""


class RewardServer:
    """Scores answers by their length over HTTP; the next request gets what `next` says."""

    HANGS_SECONDS = 5.0
    """More than the source waits."""

    def __init__(self) -> None:
        self.next: list[str] = []
        """Of `hang`, `rubbish`, `trouble`."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                samples = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["samples"]
                how = outer.next.pop() if outer.next and samples else "as asked"
                if how == "hang":
                    time.sleep(outer.HANGS_SECONDS)
                scores: Any = "soon" if how == "rubbish" else [len(sample["response"]) / 16 for sample in samples]
                body = json.dumps({"scores": scores}).encode()
                with suppress(BrokenPipeError, ConnectionResetError):  # the one that asked did not wait
                    self.send_response(503 if how == "trouble" else 200)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def option(self) -> str:
        port = self._server.server_address[1]
        return f"rewards.served={{kind: http, url: 'http://127.0.0.1:{port}/score', timeout_s: 2, weight: 0.1}}"


class World:
    """A directory of runs that all begin alike."""

    def __init__(self, home: Path, steps: int, *options: str, server: RewardServer | None = None) -> None:
        """What is there already is used again; `options` of all runs, which ask `server` too if there is one."""
        self.home, self.steps, self.server = home.resolve(), steps, server
        self.options = (*options, *([server.option] if server else []))
        start = self.home / "undisturbed"
        if not (start / "reward_model" / "model").exists():
            self.home.mkdir(parents=True, exist_ok=True)
            random_start(self.home, "undisturbed")
            model = start / "sft" / "model"
            export(load_scalar(str(model), "float32", seed=5), load_tokenizer(model), start / "reward_model" / "model")
        (self.home / "a_users_rewards.py").write_text(LOWER_CASE)

    def undisturbed(self) -> Finished:
        """The run on this machine that the others are held against; where its roles can share a process they do, which starts faster and changes no number."""
        alike = [] if set(TWO_RANKS) & set(self.options) else [ONE_PROCESS]
        with living(Job(self, "undisturbed", *alike)) as job:
            job.finish()
            return Finished(job.directory, job.output)

    def job(self, run: str) -> "Job":
        """A run, started."""
        return Job(self, run)

    def arguments(self, run: str, *overrides: str) -> list[str]:
        """The command of a run, whose models lie where it expects them."""
        for stage in ("prepare_data", "sft", "reward_model"):
            if not (self.home / run / stage).exists():
                (self.home / run).mkdir(exist_ok=True)
                (self.home / run / stage).symlink_to(self.home / "undisturbed" / stage)
        return command(self.home, f"run={run}", f"steps={self.steps}", f"logging.batches={self.steps}", *OPTIONS, *self.options, *overrides)


@contextmanager
def living(job: "Job") -> "Iterator[Job]":
    """In the end nothing of it lives."""
    try:
        yield job
    finally:
        job.end()


class Job:
    """`python -m jobs.ppo` as somebody sees it who means it harm."""

    def __init__(self, world: World, run: str, *overrides: str) -> None:
        self.world, self.directory = world, world.home / run / "ppo"
        self._arguments, self._log = world.arguments(run, *overrides), world.home / run / "job.log"
        self._log.unlink(missing_ok=True)
        self.start()

    def start(self) -> None:
        """The command is given, for the first time or again."""
        with self._log.open("a") as log:
            self.process = psutil.Popen(
                self._arguments, cwd=CHECKOUT, env=environment(self.world.home), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def code(self) -> int | None:
        """With which it ended; None while it runs."""
        return self.process.poll()

    def start_again(self) -> bool:
        """Wait for the end, and give the command again; False when there is no end."""
        if self._end() is None:
            return False
        self.start()
        return True

    def _end(self) -> int | None:
        deadline = time.monotonic() + END_SECONDS
        while self.code() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.code()

    @property
    def output(self) -> str:
        """All it has said."""
        return self._log.read_text(errors="replace")

    @property
    def step(self) -> int:
        """The last step that is logged."""
        return max((int(row["step"]) for row in metrics_so_far(self.directory) if "train/epoch" in row), default=0)

    @property
    def phase(self) -> str:
        """What the driver is doing."""
        return json.loads((self.directory / "status.json").read_text())["phase"]

    def pids(self, role: str) -> list[int]:
        """Processes of a role, as far as they live."""
        return [place["pid"] for place in self._processes["roles"][role] if title(place["pid"]).startswith("ray::")]

    def addresses(self, role: str) -> set[str]:
        """Hosts of a role's processes."""
        return {place["host"] for place in self._processes["roles"][role]}

    def driver(self) -> int:
        return self._processes["driver"]

    @property
    def _processes(self) -> dict[str, Any]:
        return json.loads((self.directory / "processes.json").read_text())

    def wait_for_step(self, step: int) -> bool:
        """Until more than `step` steps are logged, or all; False when the job dies before, or nothing comes."""
        deadline = time.monotonic() + END_SECONDS
        while self.step <= step:
            code = self.code()
            if code is not None or time.monotonic() > deadline:
                return code == 0
            time.sleep(0.02)
        return True

    def finish(self) -> None:
        """Wait for the end; AssertionError when it is not a good one."""
        assert self._end() == 0, self.output[-3000:]

    def end(self) -> None:
        """Kill the job, with all that it has started."""
        with suppress(psutil.NoSuchProcess):
            family = [self.process, *self.process.children(recursive=True)]
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    os.kill(member.pid, signal.SIGKILL)
            psutil.wait_procs(family, timeout=30)
