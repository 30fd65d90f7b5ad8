"""Real processes, light drivers: which deaths are followed by another driver, and what the job's exit code says."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.disks import fill

CHECKOUT = Path(__file__).parents[2]

JOB = """
import os, signal, sys, time
from actors.parent import driver_restarts, keep_running
from minigpt_ray.config import PPOConfig

def train(config):
    print("driver", driver_restarts(), config.checkpoint.resume, os.getpid(), flush=True)
    {body}

config = PPOConfig.model_validate({{"checkpoint": {{"driver_restarts": {limit}}}, "placement": {{"hang_after_s": 4}}}})
try:
    keep_running(train, config)
finally:
    if "ray" not in sys.modules:
        print("torch" in sys.modules)
"""


@contextmanager
def job(body: str, limit: int = 2) -> Iterator[subprocess.Popen[str]]:
    arguments = [sys.executable, "-c", JOB.format(body=body, limit=limit)]
    with subprocess.Popen(arguments, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(body: str, limit: int = 2, timeout: float = 60) -> tuple[int, list[str], list[str]]:
    """Exit code, lines of stdout, lines of stderr."""
    with job(body, limit) as process:
        out, err = process.communicate(timeout=timeout)
    return process.returncode, out.splitlines(), err.splitlines()


def drivers(out: list[str]) -> list[list[str]]:
    """Number of restarts and checkpoint.resume, as each driver saw them."""
    return [line.split()[1:3] for line in out if line.startswith("driver")]


def test_a_driver_that_is_killed_is_started_again_with_resume_auto_and_its_parent_stays_light() -> None:
    code, out, err = finish("if driver_restarts() < 2: os.kill(os.getpid(), signal.SIGKILL)")
    assert code == 0
    assert drivers(out) == [["0", "never"], ["1", "auto"], ["2", "auto"]]
    assert out[-1] == "False"  # no torch in the parent
    first, second = [line.split()[3] for line in out if line.startswith("driver")][:2]
    assert err == [
        f"the driver (process {first}) was killed by SIGKILL; restart 1 of 2, from the newest checkpoint",
        f"the driver (process {second}) was killed by SIGKILL; restart 2 of 2, from the newest checkpoint",
    ]


def test_drivers_between_which_a_checkpoint_was_written_count_anew() -> None:
    body = "from actors.parent import got_further\n    if driver_restarts() in (1, 2): got_further()\n    if driver_restarts() < 4: os.kill(os.getpid(), signal.SIGKILL)"
    code, out, err = finish(body, limit=2)
    assert code == 0 and len(drivers(out)) == 5
    assert [line.split("; ")[1].split(",")[0] for line in err] == ["restart 1 of 2", "restart 1 of 2", "restart 1 of 2", "restart 2 of 2"]


def test_a_driver_that_stands_still_is_said_with_its_stack_and_followed_by_another_and_one_that_waits_is_let_be() -> None:
    code, out, err = finish("if driver_restarts(): return\n    time.sleep(8); os.kill(os.getpid(), signal.SIGSTOP); time.sleep(60)")
    assert code == 0 and drivers(out) == [["0", "never"], ["1", "auto"]]
    first = next(line for line in out if line.startswith("driver")).split()[3]
    assert err[0] == f"the driver (process {first}, stopped) gave no sign of life for 4 s and counts as dead; it was"
    assert any("in train" in line for line in err)
    assert err[-1] == f"the driver (process {first}) was killed by SIGKILL; restart 1 of 2, from the newest checkpoint"


LEAVES_A_DAEMON = """import psutil
    print("children", *[process.pid for process in psutil.process_iter() if process.ppid() == os.getppid()], flush=True)
    if os.fork() == 0:
        if os.fork() == 0:
            print("daemon", os.getpid(), flush=True)
            time.sleep({seconds})
            print("ends by itself", flush=True)
        os._exit(0)
    os.wait()
    time.sleep(1)
    if driver_restarts() == 0: os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("seconds", "by_itself"), [(3, 2), (600, 0)])
def test_what_a_driver_leaves_behind_has_ended_before_another_one_starts_and_when_the_job_is_done(seconds: int, by_itself: int) -> None:
    code, out, err = finish(LEAVES_A_DAEMON.format(seconds=seconds))
    assert code == 0 and len(err) == 1 and len(drivers(out)) == 2
    daemons = [int(line.split()[1]) for line in out if line.startswith("daemon")]
    assert len(daemons) == 2 and not any(map(psutil.pid_exists, daemons))
    pids = [line.split()[3:] for line in out if line.startswith("driver")]
    assert [line.split()[1:] for line in out if line.startswith("children")] == pids
    assert out.count("ends by itself") == by_itself


def test_restarts_are_bounded_and_the_code_is_that_of_the_last_signal() -> None:
    code, out, err = finish("os.kill(os.getpid(), signal.SIGSEGV)", limit=1)
    assert code == 128 + signal.SIGSEGV and drivers(out) == [["0", "never"], ["1", "auto"]]
    assert err[-1].endswith("was killed by SIGSEGV; checkpoint.driver_restarts=1 are used up")


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("print('no such model', file=sys.stderr); raise SystemExit(2)", 2, ["no such model"]),
        ("raise SystemExit(0)", 0, []),
        ("raise FloatingPointError('step 3')", 1, ["FloatingPointError: step 3"]),
    ],
)
def test_what_a_driver_ends_with_by_itself_is_passed_on(body: str, code: int, said: list[str]) -> None:
    found, out, err = finish(body)
    assert found == code and drivers(out) == [["0", "never"]]
    assert err[-1:] == said


def test_the_loss_of_ray_is_a_death_and_an_exception_of_a_rank_is_not() -> None:
    lost = "import ray; raise ray.exceptions.RaySystemError('the raylet is gone')"
    code, out, err = finish(f"if driver_restarts(): return\n    {lost}")
    assert code == 0 and len(drivers(out)) == 2
    assert any("RaySystemError" in line for line in err) and any("lost Ray, or a role (code 1); restart 1 of 2" in line for line in err)
    code, out, err = finish("if driver_restarts() == 0: os._exit(1)")  # as Ray's library does
    assert code == 0 and len(drivers(out)) == 2 and "lost Ray" in err[0]
    code, out, err = finish("if driver_restarts(): return\n    from actors.group import RoleLost; raise RoleLost('policy')")
    assert code == 0 and len(drivers(out)) == 2 and any("a process of policy died" in line for line in err)
    rank = "import ray; raise ray.exceptions.RayTaskError('update', 'its traceback', ValueError('nan')).as_instanceof_cause()"
    code, out, _ = finish(rank)
    assert code == 1 and len(drivers(out)) == 1


RAY_IS_KILLED = """if driver_restarts() == 2: return
    import psutil, ray
    from actors.placement import connect
    connect(None, cpus=1)
    of_ray = {process.name(): process for process in psutil.Process().children(recursive=True) if process.name() in ("raylet", "gcs_server")}
    addresses = {c.laddr.ip.removeprefix("::ffff:") for process in of_ray.values() for c in process.net_connections() if c.status == "LISTEN"}
    print("listening", *addresses, flush=True)
    waiting = ray.remote(lambda: time.sleep(300)).remote()
    for name in (("gcs_server",), ("raylet", "gcs_server"))[driver_restarts()]: of_ray[name].kill()
    ray.get(waiting)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_local_ray_that_is_killed_is_noticed_in_seconds_and_it_listens_to_this_machine_alone() -> None:
    """The GCS first, then both it and the raylet."""
    code, out, err = finish(RAY_IS_KILLED, timeout=200)
    assert code == 0 and len(drivers(out)) == 3, err
    assert [line for line in out if line.startswith("listening")] == ["listening 127.0.0.1"] * 2
    assert sum("lost Ray, or a role (code 1)" in line for line in err) == 2


def test_sigterm_is_passed_on_and_nothing_is_started_after_it() -> None:
    saves = "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0))); print('ready', flush=True); time.sleep(60)"
    for body, code in ((saves, 0), ("print('ready', flush=True); time.sleep(60)", 128 + signal.SIGTERM)):
        with job(body) as process:
            assert process.stdout is not None
            while process.stdout.readline() != "ready\n":
                pass
            process.terminate()
            out, err = process.communicate(timeout=60)
            assert process.returncode == code and err == ""
            assert ("saved" in out) == (code == 0)


WAITS_FOR_RAY = """
    import ray, threading
    from actors.placement import connect
    connect(None, cpus=1)
    threading.Timer(1, lambda: os.kill(os.getppid(), signal.SIGTERM)).start()
    ray.get(ray.remote(num_cpus=0)(lambda: time.sleep(1000)).remote())
"""


@pytest.mark.ray
@pytest.mark.slow
def test_sigterm_while_a_driver_waits_for_ray_has_the_code_of_any_process() -> None:
    """Of whose SystemExit(143) Ray makes a SystemExit(1) of its own."""
    code, _, err = finish(WAITS_FOR_RAY, timeout=200)
    assert code == 128 + signal.SIGTERM and not [line for line in err if "Traceback" in line]


def test_sigterm_between_two_drivers_ends_the_job() -> None:
    with job("os.kill(os.getpid(), signal.SIGKILL)", limit=9) as process:
        assert process.stderr is not None and "restart 1 of 9" in process.stderr.readline()
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGKILL


def test_a_driver_dies_with_its_parent() -> None:
    with job("time.sleep(60)") as process:
        assert process.stdout is not None
        driver = psutil.Process(int(process.stdout.readline().split()[3]))
        process.kill()
        process.wait()
        deadline = time.monotonic() + 5
        while is_alive(driver) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not is_alive(driver)


def is_alive(process: psutil.Process) -> bool:
    """A zombie is not."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_full_disk_ends_the_job_with_a_sentence_and_no_other_driver_is_started(small_disk: Path) -> None:
    fill(small_disk)
    body = f"from pathlib import Path; from minigpt_ray.tracking import Tracker; Tracker(Path('{small_disk}/ppo'), 'ppo', {{}}, config.logging, 9).log(1, {{}})"
    code, out, err = finish(body)
    assert code == 2 and drivers(out) == [["0", "never"]]
    assert len(err) == 1 and f"No space left on device while writing {small_disk}/ppo" in err[0]


WRITES_A_STAGE = """from pathlib import Path; from minigpt_ray.status import Status, refuse_another
    refuse_another(Path({directory!r}))
    with Status(Path({directory!r}), "ppo", 0, 9):
        print("writes", flush=True)
        {then}"""


def test_the_driver_after_one_that_died_waits_for_nobody(tmp_path: Path) -> None:
    code, out, err = finish(WRITES_A_STAGE.format(directory=str(tmp_path), then="if driver_restarts() == 0: os.kill(os.getpid(), signal.SIGKILL)"))
    assert code == 0 and out.count("writes") == 2
    assert len(err) == 1 and "was killed by SIGKILL" in err[0]


def test_a_job_that_another_one_writes_ends_with_a_sentence_and_goes_on_once_that_is_dead(tmp_path: Path) -> None:
    body = WRITES_A_STAGE.format(directory=str(tmp_path), then="time.sleep(600 if driver_restarts() == 0 else 0)")
    with job(body) as first:
        assert first.stdout and [first.stdout.readline().split()[0] for _ in range(2)] == ["driver", "writes"]
        code, out, err = finish(body)
        assert code == 2 and "writes" not in out
        assert len(err) == 1 and "stop it, or choose another run=" in err[0]
    code, out, err = finish(WRITES_A_STAGE.format(directory=str(tmp_path), then="pass"))
    assert code == 0 and out.count("writes") == 1 and not err
