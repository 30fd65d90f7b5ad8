"""What is done to a running job, and by which line the job says what it did about it."""

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from random import Random

import psutil

from tests.chaos.world import Job
from tests.cluster.hosts import Host
from tests.jobs.runs import title


@dataclass(frozen=True)
class Fault:
    """One kind of harm."""

    what: str
    """In a table."""
    inject: Callable[[Job, Random], bool]
    """Do it; False when nothing is there to do it to, at this moment."""
    said: str
    """Regular expression of a line that the job prints afterwards; empty where it has nothing to say."""
    ends: bool = False
    """The job ends of it, as it should, and the same command is given again."""
    form: str = "narrow"
    """Key of world.FORMS: runs of which form have what it is done to."""

    @property
    def late(self) -> bool:
        """It may be found out, and said, when other faults have come: of several that work one hangs, and the others do its work."""
        return "counts as dead" in self.said


LEARNERS = ("policy", "critic")


def _signal(role: str, number: signal.Signals) -> Callable[[Job, Random], bool]:
    def inject(job: Job, random: Random) -> bool:
        return _send(random.choice(job.pids(role) or [0]), number)

    return inject


def _send(pid: int, number: signal.Signals) -> bool:
    with suppress(ProcessLookupError):
        if pid:
            os.kill(pid, number)
            return True
    return False


def _part(number: signal.Signals) -> Callable[[Job, Random], bool]:
    """A process that holds a part of an engine: a child of the generator worker, with a thread for each thing that it waits for."""

    def inject(job: Job, random: Random) -> bool:
        parts = [child.pid for pid in job.pids("generator") for child in psutil.Process(pid).children(recursive=True) if "VLLM::Worker" in title(child.pid)]
        return _send(random.choice(sorted(parts) or [0]), number)

    return inject


def _reward_function(job: Job, random: Random) -> bool:
    """The process in which users' functions run: a child of the one that asks all sources."""
    children = [child.pid for pid in job.pids("rewards") for child in psutil.Process(pid).children() if "resource_tracker" not in title(child.pid)]
    return _send(random.choice(sorted(children) or [0]), signal.SIGKILL)


def _driver(number: signal.Signals) -> Callable[[Job, Random], bool]:
    return lambda job, random: _send(job.driver(), number)


def _of_ray(name: str) -> Callable[[Job, Random], bool]:
    def inject(job: Job, random: Random) -> bool:
        found = [child.pid for child in psutil.Process(job.driver()).children(recursive=True) if child.name() == name]
        return _send(found[0] if found else 0, signal.SIGKILL)

    return inject


def _job(number: signal.Signals) -> Callable[[Job, Random], bool]:
    return lambda job, random: _send(job.process.pid, number)


def _damage(job: Job, random: Random) -> bool:
    """One bit of the newest checkpoint is another one, and the driver, which would not have noticed, is killed."""
    checkpoints = sorted((job.directory / "checkpoint").glob("step-*"))
    if len(checkpoints) < 2:  # none to fall back to
        return False
    file = random.choice(sorted(path for path in checkpoints[-1].rglob("*") if path.is_file() and path.stat().st_size > 1000))
    with file.open("r+b") as stream:
        place = random.randrange(file.stat().st_size)
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << random.randrange(8)]))
    return _send(job.driver(), signal.SIGKILL)


def _full_disk(job: Job, random: Random) -> bool:
    """The policy's process can write no file larger than 100 KiB, as if there were no more room; a checkpoint is larger."""
    pids = job.pids("policy")
    for pid in pids:
        _, hard = psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE)
        psutil.Process(pid).rlimit(resource.RLIMIT_FSIZE, (100 << 10, hard))
    return bool(pids)


def _server(how: str) -> Callable[[Job, Random], bool]:
    def inject(job: Job, random: Random) -> bool:
        job.world.server.next.append(how)
        return True

    return inject


Which = Callable[[Job], list[Host]]


def _head(job: Job) -> list[Host]:
    return job.world.hosts.hosts[:1]


def _without_head(job: Job) -> list[Host]:
    return job.world.hosts.hosts[1:]


def _any_host(job: Job) -> list[Host]:
    return job.world.hosts.hosts


def _with(*roles: str) -> Which:
    return lambda job: [host for host in _without_head(job) if any(host.address in job.addresses(role) for role in roles)]


def _away(which: Which, least: float, most: float, power: bool = True) -> Callable[[Job, Random], bool]:
    """A host is out for so many seconds, or until the job goes on without it; with power, what runs on it goes on, and finds out."""

    def inject(job: Job, random: Random) -> bool:
        for host in random.sample(found := which(job), min(1, len(found))):
            back, goes_on = time.monotonic() + random.uniform(least, most), job.step + 2
            host.cut_off() if power else host.lose()
            while time.monotonic() < back and job.step < goes_on:
                time.sleep(0.2)
            host.switch_on()
            return True
        return False

    return inject


def _raylet(job: Job, random: Random) -> bool:
    host = random.choice(_without_head(job))
    return _send(next((process.pid for process in host.processes() if process.name() == "raylet"), 0), signal.SIGKILL)


def _rank(job: Job, random: Random) -> bool:
    return _signal(random.choice(LEARNERS), signal.SIGKILL)(job, random)


WHERE = r"\((process \d+ on [\d.]+|not begun yet)\)"
REPEATED = rf"{{}} rank \d+ of \d+ {WHERE} died; the role is started again and the call repeated"
REWOUND = rf"{{}} rank \d+ of \d+ {WHERE} died; the learners start again and go on after step"
REPLACED = rf"generator worker \d+ {WHERE} died(, with prompts with which another one died)?; a new one takes its place"
ENDED = r"{} \(process \d+ on [\d.]+, [\w-]+\) has been in .* for \d+ s and counts as dead"
NEXT_DRIVER = r"the driver \(process \d+\) (was killed by SIG\w+|lost Ray, or a role \(code \d+\)); restart \d+ of 3, from the newest checkpoint"
A_LEARNER = REWOUND.format("(policy|critic)")
APART = r"ranks of (policy|critic) lost each other, and none of them died .*; the learners start again and go on after step"
ANY = "|".join((A_LEARNER, APART, REPLACED, REPEATED.format("[a-z_0-9]+"), NEXT_DRIVER))
GOES_ON = r"PPO (goes on after step \d+|starts: )"

FAULTS = {
    "generator": Fault("generator worker, SIGKILL", _signal("generator", signal.SIGKILL), REPLACED),
    "policy": Fault("policy rank, SIGKILL", _signal("policy", signal.SIGKILL), REWOUND.format(r"(policy|critic|rewards)")),
    "critic": Fault("critic rank, SIGKILL", _signal("critic", signal.SIGKILL), REWOUND.format(r"(policy|critic|rewards)")),
    "reference": Fault("reference rank, SIGKILL", _signal("reference", signal.SIGKILL), REPEATED.format("reference")),
    "reward_model": Fault("reward model rank, SIGKILL", _signal("reward_model_0", signal.SIGKILL), REPEATED.format("reward_model_0")),
    "rewards": Fault("process that asks the reward sources, SIGKILL", _signal("rewards", signal.SIGKILL), REPEATED.format("rewards")),
    "function": Fault(
        "process of a reward function, SIGKILL", _reward_function, r"rewards\.letters: the process of its function was ended by signal 9; it is started again"
    ),
    "generator_hangs": Fault("generator worker, SIGSTOP", _signal("generator", signal.SIGSTOP), ENDED.format(r"generator worker \d+")),
    "policy_hangs": Fault("policy rank, SIGSTOP", _signal("policy", signal.SIGSTOP), ENDED.format(r"policy rank \d+ of \d+")),
    "critic_hangs": Fault("critic rank, SIGSTOP", _signal("critic", signal.SIGSTOP), ENDED.format(r"critic rank \d+ of \d+")),
    "reference_hangs": Fault("reference rank, SIGSTOP", _signal("reference", signal.SIGSTOP), ENDED.format(r"reference rank \d+ of \d+")),
    "rewards_hang": Fault("process that asks the reward sources, SIGSTOP", _signal("rewards", signal.SIGSTOP), ENDED.format(r"rewards rank \d+ of \d+")),
    "reward_model_hangs": Fault("reward model rank, SIGSTOP", _signal("reward_model_0", signal.SIGSTOP), ENDED.format(r"reward_model_0 rank \d+ of \d+")),
    "server_hangs": Fault("reward server gives no answer", _server("hang"), r"rewards\.served.*no answer within.*; it is repeated"),
    "server_rubbish": Fault("reward server answers rubbish", _server("rubbish"), r"rewards\.served.*something else than.*; it is repeated"),
    "server_trouble": Fault("reward server answers 503", _server("trouble"), r"rewards\.served.*status 503.*; it is repeated"),
    "driver": Fault("driver, SIGKILL", _driver(signal.SIGKILL), NEXT_DRIVER),
    "driver_hangs": Fault("driver, SIGSTOP", _driver(signal.SIGSTOP), r"the driver \(process \d+, stopped\) gave no sign of life for \d+ s and counts as dead"),
    "raylet": Fault("Ray on the host of the driver (raylet), SIGKILL", _of_ray("raylet"), NEXT_DRIVER),
    "gcs": Fault("Ray's store (GCS), SIGKILL", _of_ray("gcs_server"), NEXT_DRIVER),
    "damage": Fault("newest checkpoint damaged, driver SIGKILL", _damage, r"checkpoint .* is damaged .*taking the one before it"),
    "job": Fault("whole job, SIGKILL; the same command again", _job(signal.SIGKILL), GOES_ON, ends=True),
    "term": Fault("whole job, SIGTERM; the same command again", _job(signal.SIGTERM), GOES_ON, ends=True),
    "full_disk": Fault(
        "disk full while a checkpoint is written; the same command again",
        _full_disk,
        r"while writing the checkpoint .*; earlier checkpoints are untouched",
        ends=True,
    ),
    "policy_of_two": Fault("one of two policy ranks, SIGKILL", _signal("policy", signal.SIGKILL), A_LEARNER, form="wide"),
    "critic_of_two": Fault("one of two critic ranks, SIGKILL", _signal("critic", signal.SIGKILL), A_LEARNER, form="wide"),
    "policy_of_two_hangs": Fault("one of two policy ranks, SIGSTOP", _signal("policy", signal.SIGSTOP), ENDED.format(r"policy rank \d of 2"), form="wide"),
    "part": Fault("one of two parts of an engine, SIGKILL", _part(signal.SIGKILL), REPLACED, form="wide"),
    "part_hangs": Fault("one of two parts of an engine, SIGSTOP", _part(signal.SIGSTOP), ENDED.format(r"generator worker \d+"), form="wide"),
    "worker_of_two": Fault("one of two generator workers, SIGKILL", _signal("generator", signal.SIGKILL), REPLACED, form="wide"),
    "generator_host": Fault("host with the generator loses power and comes back", _away(_with("generator"), 0, 30, power=False), ANY, form="hosts"),
    "learner_host": Fault("host with a policy or critic rank loses power and comes back", _away(_with(*LEARNERS), 0, 30, power=False), ANY, form="hosts"),
    "head": Fault("head loses power and comes back; the same command again", _away(_head, 0, 30, power=False), GOES_ON, ends=True, form="hosts"),
    "generator_cut": Fault(
        "host with the generator is cut off, for 70 to 100 seconds or until the job goes on", _away(_with("generator"), 70, 100), ANY, form="hosts"
    ),
    "learner_cut": Fault(
        "host with a policy or critic rank is cut off, for 70 to 100 seconds or until the job goes on", _away(_with(*LEARNERS), 70, 100), ANY, form="hosts"
    ),
    "head_cut": Fault("head is cut off, for 70 to 100 seconds or until the job goes on", _away(_head, 70, 100), ANY, form="hosts"),
    "blip": Fault("any host is cut off for 2 to 8 seconds", _away(_any_host, 2, 8), "", form="hosts"),
    "raylet_of_host": Fault("Ray on a host without the head (raylet), SIGKILL", _raylet, ANY, form="hosts"),
    "rank_on_hosts": Fault("a policy or critic rank on any host, SIGKILL", _rank, A_LEARNER, form="hosts"),
    "driver_on_hosts": Fault("driver on the head, SIGKILL", _driver(signal.SIGKILL), NEXT_DRIVER, form="hosts"),
}


def of_form(form: str) -> list[str]:
    """What can be done to runs of a form."""
    return [name for name, fault in FAULTS.items() if fault.form == form]
