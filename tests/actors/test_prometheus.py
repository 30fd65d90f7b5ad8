"""What a tracker logs can be scraped from Ray's Prometheus endpoint."""

import io
import math
import time
import urllib.request
from pathlib import Path

import pytest
import ray
from rich.console import Console

from actors.prometheus import sinks
from minigpt_ray.config import LoggingConfig
from minigpt_ray.tracking import Tracker

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def scraped() -> str:
    (node,) = [node for node in ray.nodes() if node["Alive"]]  # another test may have ended some
    with urllib.request.urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def test_the_newest_values_are_exported_with_run_and_stage(ray_cluster: None, tmp_path: Path) -> None:
    config = LoggingConfig(prometheus=True)
    with Tracker(tmp_path, "ppo", {}, config, 9, sinks=sinks(config, "gsm", "ppo"), console=Console(file=io.StringIO())) as tracker:
        tracker.log(1, {"train/reward": 0.25, "time/idle_share/policy": 0.5})
        tracker.log(2, {"train/reward": 0.75, "time/idle_share/policy": math.nan})
        deadline = time.monotonic() + 60
        while "ray_minigpt_train_reward" not in scraped() and time.monotonic() < deadline:
            time.sleep(1)
        lines = [line for line in scraped().splitlines() if line.startswith("ray_minigpt_")]
    assert all('run="gsm"' in line and 'stage="ppo"' in line for line in lines)
    values = {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in lines}
    assert values["ray_minigpt_train_reward"] == 0.75
    assert values["ray_minigpt_time_idle_share_policy"] == 0.5  # nan is no value
    assert values["ray_minigpt_train_global_step"] == 2


def test_nothing_is_exported_unless_asked_for() -> None:
    assert sinks(LoggingConfig(), "gsm", "ppo") == []
