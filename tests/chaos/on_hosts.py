"""Runs on the three hosts of tests/cluster: learners on two of them, the generator on the last, each host kept up as KubeRay would."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.world import FORMS, Job, World
from tests.cluster.hosts import Hosts, cluster

LABELS = {"mgr-head": "role=learner", "mgr-learner": "role=learner", "mgr-generator": "role=generator"}
PLACED = ("placement.generator.labels.role=generator", "placement.strategy=spread", "placement.wait_seconds=300")
"""Learners may be anywhere, so that there is room for them on two hosts whichever is away."""
CPUS = 4
"""Of each host. A run needs eight, so that it goes on when one is away, and waits when only the head is left."""
UP_SECONDS = 240.0
"""Until a cluster takes jobs whose head was lost."""


class WorldOfHosts(World):
    """A directory that three hosts see."""

    def __init__(self, home: Path, steps: int, hosts: Hosts) -> None:
        super().__init__(home, steps, *FORMS["hosts"])
        self.hosts = hosts

    def job(self, run: str) -> "JobOnHosts":
        return JobOnHosts(self, run, *PLACED)


class JobOnHosts(Job):
    """`ray job submit`, from outside."""

    world: WorldOfHosts

    def __init__(self, world: WorldOfHosts, run: str, *overrides: str) -> None:
        self._names: list[str] = []
        self._asked = 0.0
        self._code: int | None = None
        super().__init__(world, run, *overrides)

    def start(self) -> None:
        """As soon as the head takes jobs."""
        self._names.append(f"{self.directory.parent.name}-{time.time_ns()}")
        deadline = time.monotonic() + UP_SECONDS
        while not self.world.hosts.answers():
            assert time.monotonic() < deadline, "the head does not come back"
            time.sleep(1)
        self.world.hosts.submit(self._names[-1], self.world.home, "python", *self._arguments[1:])

    def start_again(self) -> bool:
        """Its end came with the head's."""
        self.start()
        return True

    @property
    def output(self) -> str:
        return "".join(map(self.world.hosts.log, self._names))

    def code(self) -> int | None:
        """None as well where nobody says it; asked every second."""
        if time.monotonic() > self._asked + 1:
            self._asked = time.monotonic()
            self._code = {"SUCCEEDED": 0, "FAILED": 1, "STOPPED": 1}.get(self.world.hosts.status(self._names[-1]))
        return self._code

    def end(self) -> None:
        """The job is stopped, and what it said is kept."""
        if self.code() is None:
            self.world.hosts.ray("job", "stop", "--address", self.world.hosts.dashboard, self._names[-1])
        self._log.write_text(self.output)


@contextmanager
def world_of_hosts(home: Path, steps: int) -> Iterator[WorldOfHosts]:
    """In the end nothing of the cluster is left."""
    home.mkdir(parents=True, exist_ok=True)
    with cluster(home.resolve(), LABELS, CPUS) as hosts, hosts.kept_up():
        if not hosts.isolated:
            raise SystemExit("hosts need network namespaces (ip netns, as root), and these are not permitted here")
        yield WorldOfHosts(home, steps, hosts)
