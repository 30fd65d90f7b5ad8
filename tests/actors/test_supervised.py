"""The supervised loop in one process: what is refused before it starts, and what its ranks compute."""

import json
import math
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from safetensors.numpy import load_file

from actors.dataset import Sources, StoredWindows, describe
from actors.group import RankHost
from actors.supervised import StageError, SupervisedRank, prepare
from minigpt_ray.config import SFTConfig
from minigpt_ray.data.packing import pack
from minigpt_ray.data.rows import read_rows
from minigpt_ray.stages import STAGES, encode_demonstration
from minigpt_ray.tokenizer import train_tokenizer


@pytest.fixture
def run(tmp_path):
    """A run directory as prepare_data leaves it."""
    stage = tmp_path / "r" / "prepare_data"
    stage.mkdir(parents=True)
    train_tokenizer(["a"], 260).save_pretrained(stage / "tokenizer")
    rows = [{"messages": [{"role": "user", "content": f"{i}+{i}="}, {"role": "assistant", "content": str(2 * i)}]} for i in range(40)]
    (stage / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def config(output_dir, **fields):
    return SFTConfig.model_validate(
        {"run": "r", "output_dir": output_dir, "steps": 4, "batch_size": 4, "window": 96, "validation_every": 2, "checkpoint": {"every": 2}} | fields
    )


def build(settings):
    ready = prepare(settings)
    tokenizer = train_tokenizer(["a"], 260)
    examples = [encode_demonstration(tokenizer, row) for row in read_rows(ready.sources[""].paths)]
    train, validation = (Sources({"": StoredWindows(**describe(pack(part, settings.window)))}) for part in (examples[4:], examples[:4]))
    return SupervisedRank(ready, train, validation)


def test_what_is_missing_is_named_with_the_command_that_makes_it(run):
    with pytest.raises(StageError, match=r"no tokenizer at .*; run python -m jobs\.prepare_data run=other"):
        prepare(config(run, run="other"))
    (run / "r" / "prepare_data" / "demonstrations.jsonl").unlink()
    with pytest.raises(StageError, match=r"no data file .*demonstrations\.jsonl; run python -m jobs.prepare_data"):
        prepare(config(run))
    with pytest.raises(StageError, match=r"no data file .*mine\.jsonl; correct files"):
        prepare(config(run, files=[run / "mine.jsonl"]))
    with pytest.raises(FileNotFoundError, match="ppo"):
        prepare(config(run, model={"init_from": "ppo"}))


def test_a_window_beyond_the_models_positions_is_refused(run):
    with pytest.raises(StageError, match="window=1024 is longer than the model's 512 positions"):
        prepare(config(run, window=1024))


def test_an_earlier_run_is_never_written_over(run):
    (run / "r" / "sft").mkdir()
    assert prepare(config(run)).start == 0
    (run / "r" / "sft" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is there from an earlier run.*checkpoint.resume=auto"):
        prepare(config(run))
    assert prepare(config(run, checkpoint={"resume": "auto"})).start == 0


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run, alone):
    def losses(rows):
        return [
            {name: value for name, value in row.items() if not name.startswith(("time/", "system/")) and "_per_second" not in name and name not in TIMED}
            for row in rows
        ]

    TIMED = {"train/mfu_percent", "train/mfu_percent_avg", "train/eta_minutes"}
    worker = build(config(run))
    assert worker.restore() == 0
    course = {}
    for step, rows in worker.steps(0):
        course[step] = losses(rows)
        if step == 2:
            worker.save(step)
    worker.export()

    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        prepare(config(run, checkpoint={"every": 2, "resume": "auto"}, optimizer={"lr": 1.0}))
    again = build(config(run, checkpoint={"every": 2, "resume": "auto"}))
    assert again.ready.start == again.restore() == 2
    assert {step: losses(rows) for step, rows in again.steps(2)} == {step: course[step] for step in (3, 4)}

    first = course[1][0]
    assert first["train/loss"] == pytest.approx(math.log(260), abs=0.5)
    assert first["train/perplexity"] == pytest.approx(math.exp(first["train/loss"]))
    assert first["train/epoch"] == pytest.approx(4 / len(worker.windows))
    assert [len(rows) for rows in course.values()] == [1, 2, 1, 2]
    assert course[4][1].keys() == {"validation/loss", "validation/perplexity"}
    assert course[4][0]["train/num_tokens_seen"] > course[1][0]["train/num_tokens_seen"] > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "r" / "sft" / "model")
    for name, tensor in worker.model.state_dict().items():
        assert np.array_equal(tensor, model.state_dict()[name]), name
    assert AutoTokenizer.from_pretrained(run / "r" / "sft" / "model").chat_template


@pytest.mark.slow
def test_micro_batches_do_not_change_the_course(run, alone):
    courses = []
    for budget in (96, 8192):
        worker = build(config(run, engine={"micro_batch_tokens": budget}))
        courses.append(
            [row[name] for _, rows in worker.steps(0) for row in rows for name in ("train/loss", "train/grad_norm", "validation/loss") if name in row]
        )
    assert courses[0] == pytest.approx(courses[1], rel=1e-4)


def not_finite(model, batch, count, config):
    loss, stats = STAGES["sft"].loss(model, batch, count, config)
    return loss * math.nan, stats


def test_a_batch_whose_loss_is_not_finite_is_saved(run, alone):
    worker = build(config(run))
    worker.stage = replace(worker.stage, loss=not_finite)
    saved = run / "r" / "sft" / "non_finite" / "step-000001.safetensors"
    with pytest.raises(FloatingPointError, match=f"step 1: a loss or gradient is not finite and no update was applied; the batch is in {saved}; lower"):
        next(worker.steps(0))
    found = load_file(saved)
    for name in ("token_ids", "loss_mask", "position_ids"):
        assert np.array_equal(found[name], getattr(worker.windows.parts[""], name)[found["windows"]])
    assert len(found["windows"]) == 4


# ---------------------------------------------------------------------------------------------- two ranks and one

SMOOTH = {"lr": 1e-2, "eps": 1e-3}  # an epsilon at which float noise cannot turn into a change of sign
# So large an epsilon, and a rate as large, make AdamW's first step the gradient itself: lr * g / (|g| + eps).
PLAIN = {"lr": 1e4, "eps": 1e4, "max_grad_norm": 1e6}


def ranks_course(directory):
    """What a few steps report and end with, and the gradient of the first."""
    worker = build(config(directory, optimizer=SMOOTH))
    reported = [row[name] for _, rows in worker.steps(0) for row in rows for name in ("train/loss", "train/grad_norm", "validation/loss") if name in row]
    other = build(config(directory, optimizer=PLAIN, steps=1, validation_share=0))
    before = weights_of(other)
    next(other.steps(0))
    after = weights_of(other)
    return {"reported": reported, "weights": weights_of(worker), "gradient": {name: before[name] - after[name] for name in before}}


def weights_of(worker):
    return {name: tensor.clone() for name, tensor in worker.engine.named_weights(worker.model)}


def process(index, directory, port):
    """One of two ranks; what it found goes to a file."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_ACCELERATOR_LOG_LEVEL": "ERROR"}
    RankHost(index, 2, threads=1).join("127.0.0.1", port)
    torch.save(ranks_course(directory), directory / f"rank-{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_as_one(run, alone):
    """Losses, gradient norms, gradients and updated weights, with real processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(process, (run, port), nprocs=2)
    expected = ranks_course(run)
    for found in (torch.load(run / f"rank-{index}.pt") for index in range(2)):
        assert found["reported"] == pytest.approx(expected["reported"], rel=1e-5)
        for kind, tolerance in (("gradient", 1e-6), ("weights", 1e-5)):
            assert found[kind].keys() == expected[kind].keys()
            for name, tensor in expected[kind].items():
                torch.testing.assert_close(found[kind][name], tensor, rtol=1e-4, atol=tolerance)
    assert max(float(tensor.abs().max()) for tensor in expected["gradient"].values()) > 1e-2
