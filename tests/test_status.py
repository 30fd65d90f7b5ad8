"""status.json says what a job is doing, how it ended, and when it was last alive; the table reads well for all of these."""

import io
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from jobs.status import main as status
from minigpt_ray.config import LoggingConfig
from minigpt_ray.status import SILENT_SECONDS, Seen, Status, look, status_table
from minigpt_ray.tracking import Timer, Tracker

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
    [(None, "finished"), (SystemExit(0), "stopped"), (SystemExit(2), "failed (SystemExit)"), (ValueError("no"), "failed (ValueError)")],
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
