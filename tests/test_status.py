"""status.json says what a job is doing, how it ended, and when it was last alive; the table reads well for all of these."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE

import pytest
from rich.console import Console

from jobs.status import main as status
from minigpt_ray.config import LoggingConfig
from minigpt_ray.status import SILENT_SECONDS, InUse, Seen, Status, look, refuse_another, status_table
from minigpt_ray.tracking import Timer, Tracker

CHECKOUT = Path(__file__).parents[1]
ROW = {
    "train/epoch": 1,
    "train/tokens_per_second": 100.0,
    "train/eta_minutes": 3.0,
    "pool/generator/workers": 2,
    "pool/generator/joined": 1,
    "pool/generator/left": 0,
    "pool/generator/idle_share": 0.25,
    "pool/generator/queue_depth": 4.0,
}
for role, idle in (("generator", 0.5), ("policy", 0.75)):
    ROW |= {f"time/idle_share/{role}": idle, f"memory/{role}_gib": 1.5, f"restarts/{role}": 1}
PLACES = [{"rank": rank, "host": f"10.0.0.{rank}", "pid": 100 + rank, "device": "cpu"} for rank in range(2)]


def tracker(run: Path) -> Tracker:
    return Tracker(run / "ppo", "ppo", {}, LoggingConfig(), 500, console=Console(file=io.StringIO()))


def table(seen: Seen) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(status_table(seen))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def running(tmp_path: Path) -> Path:
    """A run in the middle of the phase `learn` after two steps."""
    log = tracker(tmp_path)
    log.status._write()
    (log.directory / "processes.json").write_text(json.dumps({"driver": 1, "roles": {"generator": PLACES, "policy": PLACES[:1]}}))
    log.log(1, ROW)
    log.log(2, ROW)
    log.log(2, {"eval/accuracy": 0.5})
    log.phase("learn")
    return tmp_path


def test_a_living_job_shows_its_phase_its_speed_and_every_process(running: Path) -> None:
    seen = look(running)
    assert seen.is_alive
    assert seen.sentence().startswith("ppo: step 2 of 500, learn for 0 s, 100 tokens/s, 3 min left; sign of life 0 s ago"), seen.sentence()
    lines = [line.split("│")[1:-1] for line in table(seen).splitlines() if "10.0.0" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert cells[0] == ["generator", "0", "10.0.0.0", "100", "cpu", "1.50", "200", "50%", "1"]
    assert cells[1] == ["", "1", "10.0.0.1", "101", "cpu", "", "", "", ""]
    assert cells[2] == ["policy", "0", "10.0.0.0", "100", "cpu", "1.50", "400", "75%", "1"]
    assert "generator: 2 workers (1 joined, 0 left), idle 25%, 4.0 prompts waited" in table(seen)


def test_a_job_without_a_sign_of_life_is_called_gone_and_the_way_out_is_said(running: Path) -> None:
    path = running / "ppo" / "status.json"
    os.utime(path, (time.time() - 200, time.time() - 200))
    seen = look(running)
    assert not seen.is_alive
    assert "step 2 of 500, last sign of life 3 min ago, in learn" in seen.sentence() and "checkpoint.resume=auto goes on" in seen.sentence()


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (None, "finished"),
        (SystemExit(0), "stopped"),
        (SystemExit(143), "stopped"),
        (SystemExit(2), "failed (SystemExit)"),
        (ValueError("no"), "failed (ValueError)"),
    ],
)
def test_how_a_job_ended_is_kept(tmp_path: Path, error: BaseException | None, end: str) -> None:
    try:
        with tracker(tmp_path) as log:
            log.log(7, ROW)
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    seen = look(tmp_path)
    assert seen.state.end == end and not seen.is_alive and seen.sentence() == f"ppo: step 7 of 500, {end} 0 s ago"


def test_a_sign_of_life_comes_without_the_drivers_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_ray.status.BEAT_SECONDS", 0.01)
    with Status(tmp_path, "ppo", 0, 1) as file:
        os.utime(file.path, (0, 0))
        deadline = time.monotonic() + 10
        while file.path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - file.path.stat().st_mtime < SILENT_SECONDS


def test_a_disk_that_refuses_the_status_is_said_once_and_the_job_goes_on_and_so_do_the_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("minigpt_ray.status.BEAT_SECONDS", 0.01)
    with Status(tmp_path / "ppo", "ppo", 0, 9) as file:  # a directory that is not there, to begin with
        file.phase("learn")
        file.progress(3)
        (tmp_path / "ppo").mkdir()
        deadline = time.monotonic() + 10
        while not file.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = look(tmp_path)
        assert seen.is_alive and (seen.state.step, seen.state.phase) == (3, "learn")
        shutil.rmtree(tmp_path / "ppo")
    assert caplog.messages == [f"{file.path} cannot be kept up to date (No such file or directory); the job goes on, but may look as if it were gone"]


def test_phases_are_in_the_status_and_in_the_timeline(tmp_path: Path) -> None:
    with tracker(tmp_path) as log:
        timer = Timer(log.phase)
        with timer("rollout"):
            assert look(tmp_path).state.phase == "rollout"
        with timer("learn"):
            with timer("publish"):
                assert look(tmp_path).state.phase == "learn/publish"
            assert look(tmp_path).state.phase == "learn"
        assert look(tmp_path).state.phase == "between two phases"
    events = json.loads((tmp_path / "ppo" / "timeline.json").read_text())
    assert [event["name"] for event in events if event["ph"] == "X"] == ["rollout", "learn", "learn/publish", "learn"]


def test_a_stage_without_phases_is_training_once_it_takes_steps(tmp_path: Path) -> None:
    with Tracker(tmp_path / "sft", "sft", {}, LoggingConfig(), 9, console=Console(file=io.StringIO())) as log:
        assert look(tmp_path).state.phase == "starting"
        log.log(1, {"train/epoch": 1, "train/loss": 2.0, "train/tokens_per_second": 5.0, "train/eta_minutes": 90.0})
        assert "sft: step 1 of 9, training for 0 s, 5 tokens/s, 90 min left" in look(tmp_path).sentence()
        assert "role" in table(look(tmp_path))


def test_the_newest_stage_of_a_run_is_the_one_that_is_shown(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, age in (("sft", 500), ("ppo", 0)):
        (running / name).mkdir(exist_ok=True)
        (running / name / "status.json").write_text(json.dumps({"stage": name, "step": 1, "steps": 2, "began": 0.0}))
        os.utime(running / name / "status.json", (time.time() - age,) * 2)
    status([str(running), "--once"])
    assert "ppo: step 1 of 2" in capsys.readouterr().out


def test_a_directory_without_a_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        status([str(tmp_path)])
    assert "no stage of a run has a status.json" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- another driver

DRIVER = """
import sys
from pathlib import Path
from minigpt_ray import status
status.BEAT_SECONDS = 0.05
if sys.argv[2:]:
    status._kernel = lambda: sys.argv[2]
with status.Status(Path(sys.argv[1]), "ppo", 3, 9):
    print("began", flush=True)
    sys.stdin.read()
"""


@contextmanager
def driver(directory: Path, *kernel: str) -> Iterator[subprocess.Popen[str]]:
    """A process that writes a stage, on this machine or as if on another; it ends when its input does."""
    with subprocess.Popen([sys.executable, "-c", DRIVER, directory, *kernel], cwd=CHECKOUT, stdin=PIPE, stdout=PIPE, text=True) as process:
        try:
            assert process.stdout and process.stdout.readline() == "began\n"
            yield process
        finally:
            process.kill()


def test_a_stage_is_refused_while_a_process_of_this_machine_writes_it_and_at_once_no_more_when_that_died(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse_another(tmp_path)
    with driver(tmp_path) as process:
        sentence = (
            rf"{tmp_path} is written by process {process.pid} on {socket.gethostname()}, which gave a sign of life \d s ago; stop it, or choose another run="
        )
        with pytest.raises(InUse, match=sentence):
            refuse_another(tmp_path)
        process.send_signal(signal.SIGSTOP)
        os.utime(tmp_path / "status.json", (0, 0))  # silent, but it may wake up
        with pytest.raises(InUse, match="h ago"):
            refuse_another(tmp_path)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # nobody has asked for its code yet
        os.utime(tmp_path / "status.json")
        refuse_another(tmp_path)
    assert not caplog.messages


def test_a_process_with_the_number_of_a_dead_driver_is_another_one(tmp_path: Path) -> None:
    with driver(tmp_path):
        path = tmp_path / "status.json"
        state = json.loads(path.read_text())
        path.write_text(json.dumps(state | {"born": state["born"] - 1}))
        refuse_another(tmp_path)


def test_a_driver_that_ended_and_this_process_itself_are_no_reason(tmp_path: Path) -> None:
    with driver(tmp_path) as process:
        process.communicate("")
    refuse_another(tmp_path)
    with Status(tmp_path, "ppo", 0, 9):
        refuse_another(tmp_path)


def test_a_process_of_another_machine_is_refused_when_it_gives_another_sign_of_life(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with driver(tmp_path, "elsewhere") as process:
        with pytest.raises(InUse, match=f"is written by process {process.pid} on"):
            refuse_another(tmp_path)
    assert len(caplog.messages) == 1
    assert "gave a sign of life 0 s ago; waiting up to 30 s for another, without which it counts as gone" in caplog.messages[0]


def test_a_process_of_another_machine_that_ends_meanwhile_is_no_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with driver(tmp_path, "elsewhere") as process:
        monkeypatch.setattr("time.sleep", lambda seconds: process.communicate(""))
        refuse_another(tmp_path)


@pytest.mark.parametrize("content", ['{"stage": "ppo", "step": 1, "steps": 2, "began": 0.0}', '{"stage": "ppo", "st', "\0\0", '{"of": "a later version"}'])
@pytest.mark.parametrize(("age", "said"), [(SILENT_SECONDS - 0.2, 1), (SILENT_SECONDS + 1, 0)])
def test_whoever_cannot_be_asked_is_waited_for_until_it_counts_as_gone(
    tmp_path: Path, content: str, age: float, said: int, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "status.json").write_text(content)
    os.utime(tmp_path / "status.json", (time.time() - age,) * 2)
    refuse_another(tmp_path)
    assert len(caplog.messages) == said
