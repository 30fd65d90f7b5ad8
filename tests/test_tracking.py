"""Rows are exact, rewinding is exact, the console line is what it always was."""

import io
import json
import math
import sys
import time
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from minigpt_ray.checkpoint import CheckpointError
from minigpt_ray.config import LoggingConfig
from minigpt_ray.data.records import DataError
from minigpt_ray.timeline import Span
from minigpt_ray.tracking import Rates, Timer, Tracker, console_line, read_metrics, read_samples
from tests.disks import fill

PPO_ROW = {
    "train/epoch": 1,
    "train/actor_loss": 0.23456,
    "train/critic_loss": 0.12345,
    "train/reward": 1.23456,
    "train/kl": 0.00123,
    "train/actor_grad_norm": 0.82341,
    "train/tokens_per_second": 12345.4,
    "train/mfu_percent": 0.351,
    "system/epoch_time": 5.2,
}


def open_tracker(directory, resume_step=0, **logging):
    console = Console(file=io.StringIO(), width=60)
    return Tracker(directory, "ppo", {}, LoggingConfig(**logging), 500, resume_step, console=console)


def printed(tracker):
    return tracker.console.file.getvalue().splitlines()


def test_console_line_of_ppo():
    expected = (
        "Epoch:[1/1](100/500) actor_loss:0.2346 critic_loss:0.1235 reward:1.2346 kl:0.0012 grad_norm_actor:0.8234 tokens/s:12345 MFU:0.35% epoch_Time:5min"
    )
    assert console_line(100, 500, 1, {**PPO_ROW, "train/critic_loss": 0.12346}) == expected


def test_console_line_of_a_supervised_stage_and_of_an_evaluation():
    row = {
        "train/epoch": 2.4,
        "train/loss": 1.5,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "train/tokens_per_second": 99.6,
        "train/mfu_percent": 12.0,
        "system/epoch_time": 0.4,
    }
    assert console_line(3, 9, 3, row) == "Epoch:[3/3](3/9) loss:1.5000 lr:0.001 grad_norm:0.5000 tokens/s:100 MFU:12.00% epoch_Time:0min"
    assert console_line(3, 9, 3, {"eval/accuracy": 0.5, "eval/count": 4}) == "Eval(3/9) accuracy:0.5000 count:4.0000"


def test_rows_come_back_to_the_last_bit(tmp_path):
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": -0.0, "d": 2**53 + 1, "e": math.nextafter(1, 2)}
    with open_tracker(tmp_path) as tracker:
        tracker.log(7, values)
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 7, "train/global_step": 7, **values}]  # while it is still open
    assert math.copysign(1, read_metrics(tmp_path / "metrics.jsonl")[0]["c"]) == -1


def test_a_number_that_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, {"a": math.nan, "b": math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "train/global_step": 1, "a": None, "b": None}
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["a"])


def test_numpy_and_torch_numbers_are_written_as_python_ones(tmp_path):
    import numpy as np
    import torch

    with open_tracker(tmp_path) as tracker:
        tracker.log(1, {"a": np.float32(0.5), "b": np.int64(3), "c": torch.tensor(0.25)})
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert (row["a"], row["b"], row["c"]) == (0.5, 3, 0.25) and isinstance(row["b"], int)


def test_lines_every_so_many_steps_and_always_the_first_the_last_and_evaluations(tmp_path):
    with open_tracker(tmp_path, every=3) as tracker:
        for step in (1, 2, 3, 4, 500):
            tracker.log(step, PPO_ROW)
        tracker.log(4, {"eval/accuracy": 0.5})
        tracker.message("[bold] is not markup")
    lines = printed(tracker)
    assert [line[: line.index(")") + 1] for line in lines[:-1]] == ["Epoch:[1/1](1/500)", "Epoch:[1/1](3/500)", "Epoch:[1/1](500/500)", "Eval(4/500)"]
    assert lines[-1] == "[bold] is not markup"
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 6


def test_on_a_terminal_lines_stand_above_a_progress_bar(tmp_path):
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Tracker(tmp_path, "ppo", {}, LoggingConfig(), 500, console=console) as tracker:
        tracker.log(1, PPO_ROW)
    text = console.file.getvalue()
    assert "Epoch:[1/1](1/500) actor_loss:0.2346" in text and "1/500" in text.replace("(1/500)", "")


def test_resuming_cuts_back_rows_and_a_half_written_line(tmp_path):
    with open_tracker(tmp_path) as tracker:
        for step in range(1, 6):
            tracker.log(step, {"a": step / 3})
            tracker.samples(step, [{"question": f"é{step}", "reward": math.nan}] * 2)
    before = read_metrics(tmp_path / "metrics.jsonl")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "a": 0.')
    with open_tracker(tmp_path, resume_step=3) as tracker:
        tracker.log(4, {"a": 4 / 3})
    assert read_metrics(tmp_path / "metrics.jsonl") == before[:4]
    samples = read_samples(tmp_path / "samples.jsonl")
    assert [s["step"] for s in samples] == [1, 1, 2, 2, 3, 3] and samples[0]["question"] == "é1" and samples[0]["reward"] is None


def test_rewinding_in_the_run_equals_not_having_taken_the_steps(tmp_path):
    with open_tracker(tmp_path / "one") as tracker, open_tracker(tmp_path / "two") as other:
        for step in (1, 2, 3):
            tracker.log(step, {"a": step})
        tracker.rewind(1)
        tracker.log(2, {"a": 9})
        other.log(1, {"a": 1})
        other.log(2, {"a": 9})
    assert (tmp_path / "one/metrics.jsonl").read_bytes() == (tmp_path / "two/metrics.jsonl").read_bytes()


def test_a_fresh_run_begins_anew_and_keeps_the_earlier_rows_beside(tmp_path):
    for value in (1, 2):
        with open_tracker(tmp_path) as tracker:
            tracker.log(0, {"a": value})
    assert [row["a"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2]
    assert [row["a"] for row in read_metrics(tmp_path / "metrics.previous.jsonl")] == [1]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: not a JSON row"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_phase_within_a_phase_is_named_by_both_and_same_names_add_up():
    timer = Timer()
    for _ in range(2):
        with timer("learn"):
            with timer("publish"):
                time.sleep(0.01)
    with pytest.raises(KeyError), timer("score"):
        raise KeyError
    assert list(timer.metrics()) == ["time/learn/publish_s", "time/learn_s", "time/score_s"]
    assert timer.seconds["learn"] >= timer.seconds["learn/publish"] >= 0.02


def test_rates_of_the_step_and_of_the_run():
    rates = Rates(last_step=10, peak_flops=1000.0)
    rates.step(1, seconds=1.0, tokens=100, samples=10, flops=100.0)
    row = rates.step(2, seconds=3.0, tokens=600, samples=60, flops=600.0)
    assert (row["train/tokens_per_second"], row["train/tokens_per_second_avg"]) == (200, 175)
    assert (row["train/samples_per_second"], row["train/steps_per_second"]) == (20, 1 / 3)
    assert row["train/mfu_percent"] == pytest.approx(20) and row["train/mfu_percent_avg"] == pytest.approx(17.5)
    assert row["train/eta_minutes"] == row["system/epoch_time"] == pytest.approx(8 * 2 / 60)


def test_without_a_known_peak_only_mfu_is_null(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, Rates(last_step=10, peak_flops=math.nan).step(1, seconds=1.0, tokens=100, samples=10, flops=100.0))
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert {name for name, value in row.items() if value is None} == {"train/mfu_percent", "train/mfu_percent_avg"}


def test_wandb_is_imported_only_when_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with open_tracker(tmp_path) as tracker:
        tracker.log(1, PPO_ROW)
    with pytest.raises(ImportError):
        open_tracker(tmp_path, wandb="offline")


def test_tensorboard_missing_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"logging\.tensorboard=true needs the package tensorboard"):
        open_tracker(tmp_path, tensorboard=True)


def test_tensorboard_gets_every_metric(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_tracker(tmp_path, tensorboard=True) as tracker:
        tracker.log(3, PPO_ROW)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Scalars("train/reward")[0].step == 3


@pytest.mark.slow
def test_wandb_offline_holds_the_names_and_a_resumed_run_keeps_its_id(tmp_path):
    with open_tracker(tmp_path, wandb="offline") as tracker:
        tracker.log(1, PPO_ROW)
    first = (tmp_path / "wandb_id").read_text()
    with open_tracker(tmp_path, resume_step=1, wandb="offline") as tracker:
        tracker.log(2, PPO_ROW)
    assert (tmp_path / "wandb_id").read_text() == first
    files = list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert files and all(first in f.name for f in files)
    content = b"".join(f.read_bytes() for f in files)
    for name in PPO_ROW:
        assert name.encode() in content


# ----------------------------------------------------------------------------------------------- tensors of a step


@dataclass(frozen=True)
class Inner:
    total: torch.Tensor
    by_source: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outer:
    mask: torch.Tensor
    inner: Inner
    step: int


def value_of(step):
    total = torch.tensor([0.5, step])
    return Outer(torch.tensor([[True, False]]), Inner(total, {"letters": total}), step)


def test_the_newest_batches_are_kept_by_dotted_names(tmp_path):
    (tmp_path / "batches").mkdir()
    (tmp_path / "batches" / "step-000099.safetensors").touch()  # of an earlier run
    with open_tracker(tmp_path, batches=2) as tracker:
        for step in (1, 2, 3):
            tracker.batch(step, scores=value_of(step), other=value_of(0).mask)
    assert sorted(path.name for path in (tmp_path / "batches").iterdir()) == ["step-000002.safetensors", "step-000003.safetensors"]
    arrays = load_file(tmp_path / "batches" / "step-000003.safetensors")
    assert {name: array.tolist() for name, array in arrays.items()} == {
        "scores.mask": [[True, False]],
        "scores.inner.total": [0.5, 3.0],
        "scores.inner.by_source.letters": [0.5, 3.0],
        "scores.step": 3,
        "other": [[True, False]],
    }
    assert (arrays["scores.mask"].dtype, arrays["scores.inner.total"].dtype) == (bool, "float32")


def test_no_batches_are_written_unless_asked(tmp_path):
    with open_tracker(tmp_path) as tracker:
        tracker.batch(1, scores=value_of(1))
    assert not (tmp_path / "batches").exists()


# ------------------------------------------------------------------------------------------------------- a full disk

LONG = "a" * 8192
WRITES = {
    "metrics.jsonl": lambda tracker: tracker.log(3, {LONG: 1.0}),
    "samples.jsonl": lambda tracker: tracker.samples(3, [{"text": LONG}]),
    "timeline.json": lambda tracker: tracker.events("policy", [Span(0, LONG, 1.0, 2.0)]),
    "batches/step-000003.safetensors": lambda tracker: tracker.batch(3, mask=torch.zeros(9999)),
    "metrics.jsonl, to take steps again": lambda tracker: tracker.rewind(2),
}


@pytest.mark.parametrize("what", WRITES)
def test_a_full_disk_is_one_sentence_and_once_there_is_room_the_run_goes_on_with_all_that_was_committed(small_disk, what):
    directory = small_disk / "ppo"
    with pytest.raises(CheckpointError) as refused, open_tracker(directory, batches=1) as tracker:
        for step in (1, 2):
            tracker.log(step, {"a": step / 3})
            tracker.samples(step, [{"text": "é"}])
        tracker.events("policy", [Span(0, "update", 1.0, 2.0)])
        filler = fill(small_disk)
        WRITES[what](tracker)
    place = directory / what.partition(",")[0]
    assert f"while writing {place}; checkpoints are untouched: make room, and go on with checkpoint.resume=auto" in str(refused.value)
    assert "No space left on device" in str(refused.value)
    with pytest.raises(CheckpointError):
        open_tracker(directory, resume_step=2)
    filler.unlink()
    with open_tracker(directory, resume_step=2) as tracker:
        tracker.log(3, {"a": 1.0})
        tracker.events("policy", [Span(0, "update", 3.0, 4.0)])
    assert [row["a"] for row in read_metrics(directory / "metrics.jsonl")] == [1 / 3, 2 / 3, 1.0]
    assert [row["step"] for row in read_samples(directory / "samples.jsonl")] == [1, 2]
    assert len(json.loads((directory / "timeline.json").read_text())) == 4
