"""What may be asked for, how a request travels, and when a pool should grow or shrink by itself."""

import array
import fcntl
import logging
import os
import termios
import threading
import time
from pathlib import Path

import pytest

from jobs.scale import main as scale
from minigpt_ray.cli import ConfigError, read_config, write_resolved
from minigpt_ray.config import GeneratorPlacement, PPOConfig
from minigpt_ray.scaling import PATIENCE, Autoscaler, Requests
from minigpt_ray.status import Status

BOUNDED = GeneratorPlacement(workers=2, min_workers=2, max_workers=4, autoscale=True)


def test_a_request_is_taken_once_and_the_last_one_counts(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    assert requests.take() is None
    requests.ask(3)
    requests.ask(5)
    assert not requests.is_taken
    assert (requests.take(), requests.take()) == (5, None) and requests.is_taken


def test_a_request_that_is_made_while_another_is_read_is_not_lost(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    os.mkfifo(requests.path)  # whose reader is held until the writer has closed it
    writer = os.open(requests.path, os.O_RDWR)
    os.write(writer, b'{"generator": 3}')
    taken: list[int | None] = []
    taker = threading.Thread(target=lambda: taken.append(requests.take()))
    taker.start()
    unread, deadline = array.array("i", [1]), time.monotonic() + 10
    while unread[0] and time.monotonic() < deadline:
        fcntl.ioctl(writer, termios.FIONREAD, unread)
    requests.ask(5)
    os.close(writer)
    taker.join()
    assert (taken, requests.take(), requests.take()) == ([3], 5, None)


@pytest.mark.parametrize(
    "content", [b"", b'{"generator": 4', b"{}", b'{"generator": null}', b'{"generator": true}', b'{"generator": 2.5}', b"[3]", b"\xff", b"[" * 100_000]
)
def test_a_request_that_cannot_be_read_is_said_and_ignored(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    requests = Requests(tmp_path)
    requests.path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert requests.take() is None and requests.take() is None
    assert caplog.messages == [f'{requests.path} is ignored: it is not {{"generator": N}}; ask with python -m jobs.scale']
    assert requests.is_taken
    requests.ask(4)
    assert requests.take() == 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_resolved(PPOConfig(placement={"generator": BOUNDED.model_dump()}), tmp_path / "ppo")
    Status(tmp_path / "ppo", "ppo", 3, 9).phase("learn")
    return tmp_path


def test_the_command_leaves_the_request_and_says_that_nobody_takes_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale([str(run), "generator=3", "--wait", "0"])
    assert "the job has not taken the request yet" in capsys.readouterr().out
    assert Requests(run / "ppo").take() == 3


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("generator=5", "generator=5 is outside placement.generator.min_workers=2 and max_workers=4; ask for a number between them"),
        ("generator=1", "generator=1 is outside"),
        ("policy=2", "policy=2: is not generator=N"),
        ("generator=many", "generator=many: is not generator=N"),
    ],
)
def test_what_may_not_be_asked_for_is_one_sentence(run: Path, size: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        scale([str(run), size])
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
    assert Requests(run / "ppo").is_taken


def test_a_job_that_is_not_running_has_nothing_to_scale(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.utime(run / "ppo" / "status.json", (0, 0))
    with pytest.raises(SystemExit):
        scale([str(run), "generator=3"])
    assert "ppo: step 3 of 9, last sign of life" in capsys.readouterr().err
    assert Requests(run / "ppo").is_taken


def test_a_directory_without_a_run_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        scale([str(tmp_path), "generator=2"])
    assert "holds no PPO run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["workers=3", "max_workers=2"], r"workers=3 is not between min_workers=1 and max_workers=2; change one of them"),
        (["min_workers=2"], r"workers=1 is not between min_workers=2"),
        (["autoscale=true"], r"autoscale=true needs a bound, but max_workers=null; set max_workers"),
    ],
)
def test_bounds_that_cannot_be_are_refused(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        read_config(PPOConfig, [f"placement.generator.{override}" for override in overrides])


def test_a_pool_grows_while_prompts_wait_for_busy_workers_and_not_beyond_its_bound() -> None:
    autoscaler = Autoscaler(BOUNDED)
    assert [autoscaler.wanted(workers, queue_depth=8.0, idle_share=0.1) for workers in (2, 3, 4)] == [3, 4, 4]
    assert autoscaler.wanted(2, queue_depth=8.0, idle_share=0.4) == 2  # they wait, and so do workers: one more would not help
    assert autoscaler.wanted(2, queue_depth=0.0, idle_share=0.1) == 2


def test_a_pool_shrinks_after_some_idle_steps_in_a_row() -> None:
    autoscaler = Autoscaler(BOUNDED)
    idle = [autoscaler.wanted(4, queue_depth=0.0, idle_share=0.7) for _ in range(PATIENCE)]
    assert idle == [4] * (PATIENCE - 1) + [3]
    assert [autoscaler.wanted(3, 0.0, share) for share in (0.7, 0.7, 0.3, 0.7, 0.7)] == [3] * 5
    assert autoscaler.wanted(2, 0.0, 0.7) == 2
