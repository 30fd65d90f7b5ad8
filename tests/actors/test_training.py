"""The course of a PPO run, as far as it can be told without processes: what a checkpoint waits for."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.group import Pending, PublicationUnsent
from actors.training import Training
from minigpt_ray.checkpoint import Checkpoints
from minigpt_ray.cli import resolved
from minigpt_ray.config import PPOConfig
from minigpt_ray.rl.experience import TrainingState
from minigpt_ray.tracking import Tracker


@pytest.fixture
def training(tmp_path: Path) -> Training:
    """After a step that is not saved, with learners that have nothing to save."""
    training, config = object.__new__(Training), PPOConfig()
    training.config, training.tracker = config, Tracker(tmp_path, "ppo", resolved(config), config.logging, config.steps)
    training.ready = SimpleNamespace(checkpoints=Checkpoints(tmp_path / "checkpoint", keep=2))  # type: ignore[assignment]
    training.policy = training.critic = SimpleNamespace(save=lambda directory: Pending.done(None))  # type: ignore[assignment]
    training.roles = []
    training.state, training._saved = TrainingState(7, prompts_drawn=7, epoch=1, num_tokens_generated=70, kl_coef=0.0), 6
    return training


def test_the_disk_holds_the_rows_of_a_step_before_there_is_a_checkpoint_of_it(training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def recorded(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        synced.append(path.name if not list(tmp_path.glob("checkpoint/step-*")) else f"{path.name} after the commit")

    training.tracker.log(7, {"train/epoch": 1})
    monkeypatch.setattr(os, "fsync", recorded)
    training._save()
    assert {"metrics.jsonl", "samples.jsonl", tmp_path.name} < set(synced)
    assert training.ready.checkpoints.latest() == tmp_path / "checkpoint" / "step-000007"


def test_of_weights_that_did_not_arrive_the_line_says_who_died(training: Training, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = SimpleNamespace(with_a_learner=lambda role: role == "policy")
    training.policy = SimpleNamespace(cluster=cluster, who_died=lambda: "policy rank 0 of 2 (process 4711 on 10.0.0.5) died")  # type: ignore[assignment]
    rests: list[str] = []
    training.generator = SimpleNamespace(rest=lambda: rests.append("generator"))  # type: ignore[assignment]
    training._rewinds_left = 1
    for name in ("_restore", "_end_change"):
        monkeypatch.setattr(training, name, lambda *_: None)
    training._recover(PublicationUnsent("policy", "the policy's weights 7 did not reach the generator (PublicationLost: gone)"))
    died = "policy rank 0 of 2 (process 4711 on 10.0.0.5) died"
    line = f"the policy's weights 7 did not reach the generator (PublicationLost: gone): {died}; the learners start again and go on after step 0"
    assert line in capsys.readouterr().out
    assert rests == ["generator"]  # before new learners take their part of a GPU
