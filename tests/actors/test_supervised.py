"""The supervised loop in one process: what is refused before it starts, and what its ranks compute."""

import json
import math
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
import torch.distributed as dist
from safetensors.numpy import load_file

from actors.dataset import Sources, pack_windows
from actors.mailbox import SIGN_SECONDS, Alive, Logged, Mailbox, Pulse, Sender, Stopped
from actors.rank_host import RankHost
from actors.reference_logprobs import with_reference
from actors.reward_sources import load_calibration
from actors.stage_inputs import StageError, prepare
from actors.supervised import _deliver
from actors.supervised_rank import SupervisedRank, num_steps
from minigpt_ray.cli import write_resolved
from minigpt_ray.config import DPOConfig, LoggingConfig, MidtrainConfig, PretrainConfig, RewardModelConfig, SFTConfig
from minigpt_ray.data.prepared import sha256_of
from minigpt_ray.inputs import fingerprint_of_model
from minigpt_ray.models import TokenLogprobs, build_causal, export, load_causal, load_scalar
from minigpt_ray.stages import REFERENCE, STAGES, Batch
from minigpt_ray.status import InUse
from minigpt_ray.tokenizer import load_tokenizer, train_tokenizer
from minigpt_ray.tracking import Tracker
from tests.actors.ranks import run_ranks
from tests.test_metrics_doc import documented
from tests.test_status import driver

ROOTS = {root.stage: root for root in (PretrainConfig, MidtrainConfig, SFTConfig, DPOConfig, RewardModelConfig)}


@pytest.fixture
def run(tmp_path):
    """A run directory as prepare_data leaves it, and a model that stages can begin with."""
    stage = tmp_path / "r" / "prepare_data"
    stage.mkdir(parents=True)
    tokenizer = train_tokenizer(["a"], 260)
    tokenizer.save_pretrained(stage / "tokenizer")
    rows = {
        "demonstrations": [{"messages": [{"role": "user", "content": f"{i}+{i}="}, {"role": "assistant", "content": str(2 * i)}]} for i in range(40)],
        "preferences": [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": f"{i}{i} or so", "margin": i % 3} for i in range(40)],
        "documents": [{"text": f"{i} and {i} make {2 * i}. " * (1 + i % 9), "source": "sums" if i % 3 else "others"} for i in range(60)],
    }
    for name, values in rows.items():
        (stage / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    export(build_causal("nano", tokenizer, seed=1), tokenizer, tmp_path / "r" / "base" / "model")
    return tmp_path


def config(output_dir, stage="sft", **fields):
    given = {"run": "r", "output_dir": output_dir, "steps": 4, "batch_size": 4, "window": 192, "validation_every": 2, "checkpoint": {"every": 2}}
    of_stage = {"window": 96} if stage in ("pretrain", "sft") else {"model": {"init_from": "base"}}
    return ROOTS[stage].model_validate(given | of_stage | fields)


def build(settings, alive=lambda: None):
    """A rank with windows that it packs itself: the first tenth for validation, one source in the directory of each."""
    ready = prepare(settings)
    tokenizer, stage = load_tokenizer(ready.tokenizer), STAGES[ready.config.stage]
    parts = {"train": {}, "validation": {}}
    for source, files in ready.sources.items():
        examples = [group for item in stage.read(files.paths, files.only, settings) for group in stage.encode(tokenizer, item, settings)]
        cut = len(examples) // 10
        for part, groups in (("train", examples[cut:]), ("validation", examples[:cut])):
            parts[part][source] = pack_windows(groups, settings.window, stage.segments, apart=part == "validation")
    if ready.reference is not None:
        directories = {part: ready.directory / f"{part}-{dist.get_world_size()}" for part in parts}
        for directory in directories.values():
            directory.mkdir(parents=True, exist_ok=True)
        found = with_reference({directories[part]: windows[""] for part, windows in parts.items()}, ready.reference, settings, alive)
        parts = {part: {"": found[directory]} for part, directory in directories.items()}
    return SupervisedRank(ready, Sources(parts["train"]), Sources(parts["validation"]))


def test_what_is_missing_is_named_with_the_command_that_makes_it(run):
    with pytest.raises(StageError, match=r"no tokenizer at .*; run python -m jobs\.prepare_data run=other"):
        prepare(config(run, run="other"))
    with pytest.raises(StageError, match=r"model\.tokenizer='.*nowhere' is neither a directory nor"):
        prepare(config(run, model={"preset": "nano", "tokenizer": str(run / "nowhere")}))
    (run / "r" / "prepare_data" / "demonstrations.jsonl").unlink()
    with pytest.raises(StageError, match=r"no data file .*demonstrations\.jsonl; run python -m jobs.prepare_data"):
        prepare(config(run))
    with pytest.raises(StageError, match=r"no data file .*mine\.jsonl; correct files"):
        prepare(config(run, files=[run / "mine.jsonl"]))
    with pytest.raises(StageError, match=r"no data file .*books\.jsonl; correct mix\.books\.files"):
        prepare(config(run, "midtrain", mix={"books": {"files": [run / "books.jsonl"]}}))
    with pytest.raises(FileNotFoundError, match="ppo"):
        prepare(config(run, model={"init_from": "ppo"}))
    with pytest.raises(FileNotFoundError, match="ppo"):
        prepare(config(run, "dpo", reference="ppo"))


def test_a_window_beyond_the_models_positions_is_refused(run):
    with pytest.raises(StageError, match="window=1024 is longer than the model's 512 positions"):
        prepare(config(run, window=1024))


def test_early_stopping_without_a_validation_loss_is_refused(run):
    with pytest.raises(ValueError, match="early_stopping=2 waits for a validation loss, but validation_share=0 keeps nothing for it"):
        config(run, early_stopping=2, validation_share=0)


def test_pairs_are_those_of_the_job_that_is_named(run):
    assert prepare(config(run, "dpo")).sources[""].paths == (run / "r" / "prepare_data" / "preferences.jsonl",)
    with pytest.raises(StageError, match=r"no data file .*generate_preferences/preferences\.jsonl; run python -m jobs\.generate_preferences run=r"):
        prepare(config(run, "dpo", pairs_from="generate_preferences"))


def test_an_earlier_run_is_never_written_over(run):
    (run / "r" / "sft").mkdir()
    assert prepare(config(run)).start == 0
    (run / "r" / "sft" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is there from an earlier run.*checkpoint.resume=auto"):
        prepare(config(run))
    assert prepare(config(run, checkpoint={"resume": "auto"})).start == 0


def begin(settings, step=2):
    """A checkpoint of a run that began as configured, with nothing of the model in it."""
    ready = prepare(settings)
    directory = ready.checkpoints.begin(step)
    write_resolved(settings, directory)
    ready.inputs.keep(ready.directory)
    return ready.checkpoints.commit(step)


@pytest.mark.parametrize(
    ("stage", "changed", "name"),
    [
        ("sft", "prepare_data/demonstrations.jsonl", "data file 1: {run}/prepare_data/demonstrations.jsonl"),
        ("sft", "prepare_data/tokenizer/tokenizer.json", "tokenizer: {run}/prepare_data/tokenizer"),
        ("dpo", "base/model/model.safetensors", "model.init_from: {run}/base/model"),
        ("dpo", "other/model/model.safetensors", "reference: {run}/other/model"),
        ("midtrain", "prepare_data/documents.jsonl", "data file 1: {run}/prepare_data/documents.jsonl"),
    ],
)
def test_a_resumed_stage_that_began_from_something_else_is_refused(run, stage, changed, name):
    shutil.copytree(run / "r" / "base", run / "r" / "other")
    fields = {"dpo": {"reference": "other"}, "midtrain": {"mix": MIX}}.get(stage, {})
    start = begin(config(run, stage, **fields))
    again = config(run, stage, checkpoint={"resume": "auto"}, **fields)
    assert prepare(again).start == 2
    (run / "r" / changed).write_bytes((run / "r" / changed).read_bytes() + b"\n")
    with pytest.raises(ValueError) as refusal:
        prepare(again)
    assert str(refusal.value) == (
        f"cannot resume from {start}, what it began from has changed since ({name.format(run=run / 'r')}); "
        f"undo that, choose another run=, or remove {run}/r/{stage} to begin again from what is there now"
    )


@pytest.mark.parametrize("length", [{"steps": 8}, {"epochs": 2}, {"tokens": 10_000}])
def test_a_stage_whose_shares_move_keeps_its_length_when_it_goes_on(run, length):
    start = begin(config(run, "midtrain", mix=MIX))
    with pytest.raises(ValueError, match=rf"cannot resume from {start}, the configuration has changed \({next(iter(length))}: .*choose another run="):
        prepare(config(run, "midtrain", mix=MIX, checkpoint={"resume": "auto"}, **length))
    shutil.rmtree(run / "r" / "midtrain")
    still = {"sums": {"weight": 3}, "others": {"weight": 1, "final_weight": 1}}
    begin(config(run, "midtrain", mix=still))
    assert prepare(config(run, "midtrain", mix=still, checkpoint={"resume": "auto"}, **length)).start == 2


def learning(rows):
    """What rows say about learning, and not about the clock."""
    timed = ("train/mfu_percent", "train/mfu_percent_avg", "train/eta_minutes")
    return [
        {name: value for name, value in row.items() if not name.startswith(("time/", "system/")) and "_per_second" not in name and name not in timed}
        for row in rows
    ]


def test_a_stage_that_another_driver_writes_is_refused(run):
    (run / "r" / "sft").mkdir()
    resumed = config(run, checkpoint={"resume": "auto"})
    with driver(run / "r" / "sft") as other, pytest.raises(InUse, match=f"r/sft is written by process {other.pid}"):
        prepare(resumed)
    assert prepare(resumed).start == 0


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_interrupted(run, alone):
    worker = build(config(run))
    assert worker.restore() == 0
    course = {}
    for step, rows in worker.steps(0):
        course[step] = learning(rows)
        if step == 2:
            worker.save(step)
    worker.export()
    made = fingerprint_of_model(run / "r" / "sft" / "model")

    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        prepare(config(run, checkpoint={"every": 2, "resume": "auto"}, optimizer={"lr": 1.0}))
    again = build(config(run, checkpoint={"every": 2, "resume": "auto"}))
    assert again.ready.start == again.restore() == 2
    assert {step: learning(rows) for step, rows in again.steps(2)} == {step: course[step] for step in (3, 4)}
    again.export()
    assert fingerprint_of_model(run / "r" / "sft" / "model") == made  # so that a stage which only ends again changes nothing for those after it

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


def numbers(rows):
    return [row[name] for row in rows for name in ("train/loss", "train/grad_norm", "validation/loss") if name in row]


@pytest.mark.slow
def test_micro_batches_do_not_change_the_course(run, alone):
    courses = []
    for budget in (96, 8192):
        worker = build(config(run, engine={"micro_batch_tokens": budget}))
        courses.append([number for _, rows in worker.steps(0) for number in numbers(rows)])
    assert courses[0] == pytest.approx(courses[1], rel=1e-4)


@pytest.mark.slow
def test_a_run_that_goes_on_with_less_memory_has_the_same_course(run, alone):
    worker = build(config(run))
    course = {}
    for step, rows in worker.steps(0):
        course[step] = numbers(rows)
        if step == 2:
            worker.save(step)
    again = build(config(run, checkpoint={"every": 2, "resume": "auto"}, engine={"micro_batch_tokens": 96, "activation_checkpointing": True}))
    for step, rows in again.steps(again.restore()):
        assert numbers(rows) == pytest.approx(course[step], rel=1e-4)
    assert again.rows_per_micro_batch == 1 and again.model.is_gradient_checkpointing and step == 4


@pytest.mark.slow
def test_a_run_ends_once_its_validation_loss_has_not_fallen_for_so_long_and_stays_ended_when_it_goes_on(run, alone):
    still = {"steps": 20, "validation_every": 1, "optimizer": {"lr": 1e-30}, "early_stopping": 2}
    worker = build(config(run, **still))
    waited = {step: rows[-1]["validation/since_lowest"] for step, rows in worker.steps(0)}
    assert waited == {1: 0, 2: 1, 3: 2} and worker.stops_early and worker.checkpoint_due(3)
    assert worker.patience.sentence.startswith("early_stopping: ends after step 3, since the validation loss has not fallen below its ")
    worker.save(3)
    again = build(config(run, checkpoint={"resume": "auto"}, **still))
    assert again.restore() == 3 and again.patience == worker.patience and list(again.steps(3)) == []
    longer = build(config(run, checkpoint={"resume": "auto"}, **still | {"early_stopping": 3}))
    assert [step for step, _ in longer.steps(longer.restore())] == [4]


def not_finite(model, batch, count, config):
    loss, stats = STAGES["sft"].loss(model, batch, count, config)
    return loss * math.nan, stats


def test_a_batch_whose_loss_is_not_finite_is_saved(run, alone):
    worker = build(config(run))
    worker.stage = replace(worker.stage, loss=not_finite)
    saved = run / "r" / "sft" / "non_finite" / "step-000001.safetensors"
    with pytest.raises(
        FloatingPointError, match=f"step 1: a loss or gradient is not finite and no update was applied; the batch is in {saved}; look at it, and begin again"
    ):
        next(worker.steps(0))
    found = load_file(saved)
    for name in ("token_ids", "loss_mask", "position_ids"):
        assert np.array_equal(found[name], getattr(worker.windows.parts[""], name)[found["windows"]])
    assert len(found["windows"]) == 4


# ---------------------------------------------------------------------------------------------- the other stages

MIX = {"sums": {"weight": 3, "final_weight": 1}, "others": {"weight": 1}}
OTHERS = [("pretrain", {}), ("midtrain", {"mix": MIX}), ("dpo", {"nll_weight": 0.1}), ("reward_model", {})]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "fields"), OTHERS, ids=[stage for stage, _ in OTHERS])
def test_every_stage_goes_on_as_if_it_had_not_been_interrupted(run, alone, stage, fields):
    worker = build(config(run, stage, **fields))
    course = {}
    for step, rows in worker.steps(0):
        course[step] = learning(rows)
        if step == 2:
            worker.save(step)
    again = build(config(run, stage, checkpoint={"every": 2, "resume": "auto"}, **fields))
    assert again.restore() == 2
    assert {step: learning(rows) for step, rows in again.steps(2)} == {step: course[step] for step in (3, 4)}
    again.export()

    rows = [row for rows in course.values() for row in rows]
    assert not [name for row in rows for name in row if not documented(name)]
    training, last = [row for row in rows if "train/loss" in row], rows[-1]
    assert training[-1]["train/num_tokens_seen"] > training[0]["train/num_tokens_seen"] > 0
    if stage in ("pretrain", "midtrain"):  # of two sources each
        losses = [last[f"validation/loss/{source}"] for source in MIX]
        assert min(losses) < last["validation/loss"] < max(losses)
    if stage == "midtrain":
        by_source = [training[-1][f"train/num_tokens_seen/{source}"] for source in MIX]
        assert min(by_source) > 0 and sum(by_source) == training[-1]["train/num_tokens_seen"]
    if stage in ("dpo", "reward_model"):
        assert last["validation/margin"] == pytest.approx(last["validation/chosen_reward"] - last["validation/rejected_reward"], abs=1e-6)
        assert 0 <= last["validation/accuracy"] <= 1
    if stage == "dpo":
        assert training[0]["train/loss"] == pytest.approx(math.log(2) + 0.1 * training[0]["train/chosen_nll"], rel=1e-5)
    if stage == "reward_model":
        path = run / "r" / "reward_model" / "model"
        assert load_calibration("rm", str(path)) == (last["validation/reward_mean"], last["validation/reward_std"])
        assert torch.equal(load_scalar(str(path), "float32", None).score.weight, again.model.score.weight)


@pytest.mark.slow
def test_the_length_of_a_run_follows_from_epochs_or_tokens(run, alone):
    worker = build(config(run, "pretrain"))
    windows, tokens = len(worker.windows), worker.windows.count("num_tokens")[""]
    assert num_steps(config(run, "pretrain", epochs=2), worker.windows) == 2 * windows // 4
    assert num_steps(config(run, "pretrain", tokens=3 * tokens), worker.windows) == math.ceil(3 * windows / 4)


@pytest.mark.slow
def test_reference_logprobs_are_the_models_own_and_computed_once(run, alone, monkeypatch):
    worker = build(config(run, "dpo"))
    windows = worker.windows.take(np.arange(len(worker.windows)))
    batch = Batch.of(windows, torch.device("cpu"))
    model = TokenLogprobs(load_causal(str(run / "r" / "base" / "model"), "float32"))
    expected = model(batch.token_ids, batch.loss_mask, position_ids=batch.position_ids)[0]
    torch.testing.assert_close(batch.numbers[REFERENCE], expected.detach(), atol=1e-5, rtol=0)
    monkeypatch.setattr("actors.reference_logprobs.load_causal", None)
    assert len(build(config(run, "dpo", beta=0.5)).windows) == len(windows)
    assert build(config(run, "dpo", loss="simpo")).windows.parts[""].numbers == {}


@pytest.mark.slow
def test_reference_logprobs_that_an_interrupted_pass_has_left_are_not_computed_again(run, alone, monkeypatch):
    monkeypatch.setattr("actors.reference_logprobs.PIECE", 4)
    settings = config(run, "dpo", validation_share=0, engine={"micro_batch_tokens": 2 * 192})  # two batches a piece
    signs = []

    def dies():
        signs.append("of the first pass")
        if len(signs) == 2 * 2 + 1:  # the third piece is incomplete
            raise InterruptedError

    with pytest.raises(InterruptedError):
        build(settings, dies)
    signs.clear()
    worker = build(settings, lambda: signs.append("of the second pass"))
    found = {part: sources.parts[""].numbers[REFERENCE] for part, sources in (("train", worker.windows), ("validation", worker.validation))}
    assert len(signs) == sum(-(-len(column) // 2) for column in found.values()) - 2 * 2 > 0
    for directory in (run / "r" / "dpo").glob("*-1"):
        assert [path.suffix for path in directory.iterdir()] == [".npy"]  # no piece is left
        shutil.rmtree(directory)
    monkeypatch.undo()
    whole = build(config(run, "dpo", validation_share=0))
    np.testing.assert_allclose(found["train"], whole.windows.parts[""].numbers[REFERENCE], atol=1e-5)


@pytest.mark.slow
def test_the_reference_is_read_once_however_many_parts_there_are(run, alone, monkeypatch):
    read = []
    monkeypatch.setattr("actors.reference_logprobs.sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    build(config(run, "dpo"))
    assert sorted(read) == ["config.json", "model.safetensors"]


def test_a_worker_that_is_long_at_work_gives_a_sign_of_life_now_and_then(monkeypatch):
    put, now = [], [0.0]
    mailbox = SimpleNamespace(put=SimpleNamespace(remote=put.append))
    monkeypatch.setattr("actors.mailbox.time.monotonic", lambda: now[0])
    pulse = Pulse(mailbox)
    for now[0] in (0.0, 1.0, SIGN_SECONDS - 0.1, SIGN_SECONDS, SIGN_SECONDS + 1, 3 * SIGN_SECONDS):
        pulse()
    assert put == [Alive()] * 3


# ---------------------------------------------------------------------------------------------- two ranks and one

SMOOTH = {"lr": 1e-2, "eps": 1e-3}  # an epsilon at which float noise cannot turn into a change of sign
# So large an epsilon, and a rate as large, make AdamW's first step the gradient itself: lr * g / (|g| + eps).
PLAIN = {"lr": 1e4, "eps": 1e4, "max_grad_norm": 1e6}


def ranks_course(directory):
    """What a few steps of some stages report and end with, and the gradient of the first."""
    return {stage: stage_course(directory, stage) for stage in ("sft", "dpo", "reward_model")}


def stage_course(directory, stage):
    worker = build(config(directory, stage, optimizer=SMOOTH))
    names = ("train/loss", "train/grad_norm", "validation/loss", "validation/accuracy", "validation/margin")
    reported = [row[name] for _, rows in worker.steps(0) for row in rows for name in names if name in row]
    other = build(config(directory, stage, optimizer=PLAIN, steps=1, validation_share=0))
    before = weights_of(other)
    next(other.steps(0))
    after = weights_of(other)
    return {"reported": reported, "weights": weights_of(worker), "gradient": {name: before[name] - after[name] for name in before}}


def weights_of(worker):
    return {name: tensor.clone() for name, tensor in worker.engine.named_weights(worker.model)}


def process(index, directory, port):
    """One of two ranks; what it found goes to a file."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_ACCELERATOR_LOG_LEVEL": "ERROR"}
    RankHost(index, 2, device="cpu").join("127.0.0.1", port, hang_after_s=60)
    torch.save(ranks_course(directory), directory / f"rank-{index}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_learn_as_one(run, alone):
    """Losses, gradient norms, gradients and updated weights, with real processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run_ranks(process, (run, port), 2)
    expected = ranks_course(run)
    for found, stage in ((torch.load(run / f"rank-{index}.pt")[stage], stage) for index in range(2) for stage in expected):
        assert found["reported"] == pytest.approx(expected[stage]["reported"], rel=1e-4, abs=1e-6)
        for kind, tolerance in (("gradient", 1e-6), ("weights", 1e-5)):
            assert found[kind].keys() == expected[stage][kind].keys()
            for name, tensor in expected[stage][kind].items():
                torch.testing.assert_close(found[kind][name], tensor, rtol=1e-4, atol=tolerance)
    for stage in expected:
        assert max(float(tensor.abs().max()) for tensor in expected[stage]["gradient"].values()) > 1e-2


# ------------------------------------------------------------------------------------------------- rows on their way


@pytest.fixture
def mailbox(ray_cluster):
    made = ray.remote(Mailbox).options(num_cpus=0).remote()
    yield made
    ray.kill(made)


@pytest.mark.ray
def test_rows_are_on_the_disk_once_a_worker_may_save(mailbox, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))), fsync(handle)))
    with Tracker(tmp_path, "sft", {}, LoggingConfig(), 9) as tracker, ThreadPoolExecutor(1) as threads:
        delivery = threads.submit(_deliver, mailbox, tracker, tmp_path, 60, threading.Event())
        sender = Sender(mailbox)
        sender.send(Logged(1, [{"train/epoch": 0.5}]))
        sender.settle()
        before_saving = list(synced)
        sender.stop(Stopped(""))
        assert not delivery.result(60).fault
    assert "metrics.jsonl" in before_saving
