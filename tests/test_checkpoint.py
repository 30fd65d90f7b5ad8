"""A checkpoint is whole or not there, whatever happens in between."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt_ray import checkpoint
from minigpt_ray.checkpoint import Checkpoints, find_fault, write_json_atomic


def save(checkpoints, step, text="weights"):
    directory = checkpoints.begin(step)
    (directory / "policy").mkdir()
    (directory / "policy/model.bin").write_text(f"{text} {step}")
    checkpoints.save_state(directory, {"step": step, "kl_coef": 0.1 + 0.2})
    return checkpoints.commit(step)


def names(path):
    return sorted(p.name for p in path.iterdir())


def test_a_committed_checkpoint_is_the_latest_and_its_state_is_exact(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoint", keep=2)
    assert checkpoints.latest() is None
    path = save(checkpoints, 100)
    assert path == tmp_path / "checkpoint/step-000100" == Checkpoints(tmp_path / "checkpoint", keep=2).latest()
    assert checkpoints.load_state(path) == {"step": 100, "kl_coef": 0.1 + 0.2}
    assert names(path) == ["manifest.json", "policy", "state.json"]


def test_the_oldest_go_once_a_new_one_is_complete(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (5, 10, 1_000_000):
        save(checkpoints, step)
    assert names(tmp_path) == ["step-000010", "step-1000000"]
    assert checkpoints.steps() == [10, 1_000_000]


def test_begin_empties_what_a_killed_process_left(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (checkpoints.begin(3) / "stale").write_text("x")
    assert names(checkpoints.begin(3)) == []
    assert checkpoints.latest() is None
    (tmp_path / ".step-000002.replaced").mkdir()
    checkpoints.begin(7)
    assert names(tmp_path) == [".step-000007.partial"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: (p / "policy/model.bin").write_text("weightz 20"), "model.bin has 10 bytes"),
        (lambda p: (p / "policy/model.bin").write_text("weigh"), "model.bin has 5 bytes"),
        (lambda p: (p / "policy/model.bin").unlink(), "No such file"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json cannot be read"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read"),
    ],
)
def test_a_damaged_one_is_reported_and_the_one_before_is_taken(tmp_path, caplog, damage, words):
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 10)
    damage(save(checkpoints, 20))
    assert checkpoints.latest() == tmp_path / "step-000010"
    assert len(caplog.records) == 1 and words in caplog.text and "step-000020" in caplog.text
    assert find_fault(tmp_path / "step-000010") is None


def test_when_the_only_one_is_damaged_it_is_said_that_there_is_none_before_it(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path, keep=2)
    (save(checkpoints, 10) / "state.json").write_text("")
    assert checkpoints.latest() is None
    assert caplog.text.strip().endswith("; there is none before it")


def test_a_step_that_is_taken_again_replaces_its_checkpoint_and_the_later_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (10, 20, 30):
        save(checkpoints, step)
    save(checkpoints, 20, text="other")
    assert names(tmp_path) == ["step-000010", "step-000020"]
    assert (tmp_path / "step-000020/policy/model.bin").read_text() == "other 20"


@pytest.mark.parametrize("keep", [1, 2])
def test_steps_that_are_taken_again_before_later_damaged_checkpoints_are_kept(tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (4, 8, 12):
        (save(checkpoints, step) / "state.json").write_text("")
    assert checkpoints.latest() is None
    assert save(checkpoints, 2) == checkpoints.latest()
    assert names(tmp_path) == ["step-000002"]


@pytest.mark.parametrize("failing", ["write_json_atomic", "_sync", "_entry"])
def test_a_full_disk_leaves_the_one_before_whole_and_is_named(tmp_path, monkeypatch, failing):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)
    directory = checkpoints.begin(20)
    (directory / "model.bin").write_text("x")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, full)
        with pytest.raises(OSError, match=r"No space left on device while writing the checkpoint .*step-000020.*earlier checkpoints are untouched") as caught:
            checkpoints.commit(20)
    assert caught.value.errno == errno.ENOSPC
    assert checkpoints.latest() == tmp_path / "step-000010"
    save(checkpoints, 20)
    assert names(tmp_path) == ["step-000020"]


@pytest.mark.parametrize("limit", [20, 90, 150])
def test_a_disk_that_takes_no_more_leaves_the_one_before_whole_and_is_named(tmp_path, limit):
    """No file may grow beyond so many bytes: the state, then the manifest, cannot be written."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"while writing the checkpoint .*step-000020.*earlier checkpoints are untouched"):
            save(checkpoints, 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert checkpoints.latest() == tmp_path / "step-000010"


def test_torchs_own_error_of_a_full_disk_becomes_one_that_names_the_checkpoint(tmp_path):
    with (
        pytest.raises(OSError, match=r"file write failed while writing the checkpoint .*step-000020; earlier") as caught,
        checkpoint.naming(tmp_path / "step-000020"),
    ):
        raise RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed\nframe #0")
    assert caught.value.errno == errno.EIO


def test_a_process_killed_between_begin_and_commit_leaves_the_old_one_as_latest(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)
    code = f"""
from pathlib import Path; from minigpt_ray.checkpoint import Checkpoints; import time
directory = Checkpoints(Path({str(tmp_path)!r}), keep=1).begin(20)
(directory / "model.bin").write_text("half"); print("begun", flush=True); time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        assert process.stdout.readline() == "begun\n"
        os.kill(process.pid, signal.SIGKILL)
    assert checkpoints.latest() == tmp_path / "step-000010"
    assert save(checkpoints, 20) == checkpoints.latest()
    assert names(tmp_path) == ["step-000020"]


@pytest.mark.parametrize("calls", range(12))
def test_dying_at_any_write_of_commit_leaves_a_whole_checkpoint(tmp_path, monkeypatch, calls):
    """Every file operation of a commit in turn is the last one that happens."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    save(checkpoints, 10)
    directory = checkpoints.begin(20)
    (directory / "model.bin").write_text("x")
    left = [calls]

    class Killed(BaseException):
        pass

    def counted(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(os, "replace", counted(os.replace))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(checkpoint.shutil, "rmtree", counted(checkpoint.shutil.rmtree))
        with contextlib.suppress(Killed):
            checkpoints.commit(20)
    assert checkpoints.latest() in (tmp_path / "step-000010", tmp_path / "step-000020")


def test_json_is_replaced_whole(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomic(tmp_path / "a.json", {"a": object()})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}'
