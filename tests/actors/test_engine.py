"""One step of the engine is one step of plain AdamW, whatever the ZeRO stage, the number of ranks and of micro-batches."""

import math
import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from actors.engine import Engine, schedule
from actors.rank_host import Disconnected
from minigpt_ray.config import EngineConfig, OptimizerConfig
from tests.actors.ranks import run_ranks

OPTIMIZER = OptimizerConfig(lr=1e-2, schedule="cosine", warmup_steps=3, weight_decay=0.1, max_grad_norm=0.5)
STEPS, ROWS, BAD_STEP = 5, 8, 2


def build_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))


def batches(bad=BAD_STEP):
    """Rows of very different weight, so that a mean of means would show; one value of step `bad` is nan."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        inputs, targets = torch.randn(ROWS, 8, generator=generator), torch.randn(ROWS, 4, generator=generator)
        weights = torch.rand(ROWS, 1, generator=generator) ** 4
        if step == bad:
            inputs[-1, 0] = math.nan
        yield inputs, targets, weights


def squared_error(model, part):
    inputs, targets, weights = part
    loss = (weights * (model(inputs) - targets) ** 2).sum() / ROWS
    return loss, {"loss": loss}


def weights_of(engine, model):
    return {name: tensor.clone() for name, tensor in engine.named_weights(model)}


def course(engine, rank, world, first=0, bad=BAD_STEP):
    """What each step reports, this rank taking its rows in micro-batches of 2."""
    steps = []
    for step, batch in enumerate(batches(bad)):
        if step >= first:
            rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
            parts = list(zip(*(tensor[rows].split(2) for tensor in batch), strict=True))
            update = engine.update(parts, squared_error)
            steps.append((update.stats["loss"], update.grad_norm, update.lr, update.applied))
    return steps


def join(rank: int, world: int, directory: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_ACCELERATOR_LOG_LEVEL": "ERROR"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store-{world}", rank=rank, world_size=world)


def process(rank: int, world: int, directory: Path) -> None:
    """One rank: all ZeRO stages one after the other, what they did goes to a file."""
    join(rank, world, directory)
    results = {}
    for stage in range(4):
        model = build_model()
        engine = Engine(model, EngineConfig(zero_stage=stage), OPTIMIZER, STEPS)
        steps = course(engine, rank, world)
        results[stage] = {"steps": steps, "weights": weights_of(engine, model), "stopped": stopped(engine, model, rank, world)}
        if world == 2 and stage in (0, 3):
            results[stage]["again"] = saved_and_loaded(engine, stage, rank, world, directory)
    if world == 1:
        model = build_model()
        engine = Engine(model, EngineConfig(zero_stage=1, dtype="bfloat16"), OPTIMIZER, STEPS)
        results["bfloat16"] = {"steps": list(course_bfloat16(engine))}
    if rank == 0:
        torch.save(results, directory / f"world-{world}.pt")
    dist.barrier()
    dist.destroy_process_group()


def course_bfloat16(engine):
    for inputs, targets, weights in batches():
        update = engine.update([(inputs.bfloat16(), targets, weights)], squared_error)
        yield update.stats["loss"], update.grad_norm, update.lr, update.applied


def stopped(engine, model, rank, world):
    """An update that is stopped: (what the decision was made from, what came of it, how far the weights moved)."""
    before, seen = weights_of(engine, model), []
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    parts = list(zip(*(tensor[rows].split(2) for tensor in next(batches())), strict=True))
    update = engine.update(parts, squared_error, lambda stats: seen.append(stats) or True)
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in weights_of(engine, model).items())
    return seen, update, moved


def saved_and_loaded(engine, stage, rank, world, directory):
    """Two steps after a save, taken by this engine and by another one that loaded: (steps, steps, same random numbers on all ranks)."""
    torch.manual_seed(rank)
    engine.save(directory / f"saved-{stage}")
    drawn = torch.rand(3)
    going_on = course(engine, rank, world, first=3)
    other = Engine(build_model(), EngineConfig(zero_stage=stage), OPTIMIZER, STEPS)
    torch.manual_seed(12345)
    other.load(directory / f"saved-{stage}")
    same_draw = torch.tensor(int(torch.equal(torch.rand(3), drawn)))
    dist.all_reduce(same_draw, op=dist.ReduceOp.MIN)
    return going_on, course(other, rank, world, first=3), bool(same_draw)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    directory = tmp_path_factory.mktemp("engine")
    for world in (1, 2):
        run_ranks(process, (world, directory), world)
    return {world: torch.load(directory / f"world-{world}.pt", weights_only=False) for world in (1, 2)}


@pytest.fixture(scope="module")
def by_hand():
    """The same course in plain torch, one batch a step."""
    model = build_model()
    matrices, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=OPTIMIZER.betas, eps=OPTIMIZER.eps)
    factor, taken, steps = schedule(OPTIMIZER, STEPS), 0, []
    for batch in batches():
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER.lr * factor(taken)
        loss = squared_error(model, batch)[0]
        optimizer.zero_grad()
        loss.backward()
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.max_grad_norm))
        applied = math.isfinite(norm)
        if applied:
            optimizer.step()
            taken += 1
        steps.append((loss.item(), norm, optimizer.param_groups[0]["lr"], applied))
    return {"steps": steps, "weights": dict(model.named_parameters())}


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_steps_and_weights_are_those_of_plain_torch(results, by_hand, world, stage):
    found = results[world][stage]
    for (loss, norm, lr, applied), expected in zip(found["steps"], by_hand["steps"], strict=True):
        assert applied == expected[3]
        assert lr == pytest.approx(expected[2], rel=1e-9)
        if applied:
            assert (loss, norm) == pytest.approx(expected[:2], rel=1e-5)
    assert found["steps"][0][1] > OPTIMIZER.max_grad_norm  # so that the clip took part
    for name, tensor in by_hand["weights"].items():
        torch.testing.assert_close(found["weights"][name], tensor.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_on_one_rank_applies_no_update(results, world, stage):
    loss, norm, lr, applied = results[world][stage]["steps"][BAD_STEP]
    assert not math.isfinite(loss) and not math.isfinite(norm) and not applied
    assert results[world][stage]["steps"][BAD_STEP + 1][2] == lr  # the schedule counts updates, not attempts


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_an_update_is_stopped_by_its_sums_over_all_ranks_and_changes_nothing(results, world, stage):
    seen, update, moved = results[world][stage]["stopped"]
    assert seen == [update.stats] and update.stopped and not update.applied and moved == 0
    assert update.stats["loss"] == pytest.approx(results[1][0]["stopped"][1].stats["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_what_was_saved_goes_on_to_the_bit(results, stage):
    going_on, loaded, same_draw = results[2][stage]["again"]
    assert going_on == loaded
    assert same_draw


def left_alone(rank: int, world: int, directory: Path) -> None:
    """The other rank ends while both save."""
    join(rank, world, directory)
    engine = Engine(build_model(), EngineConfig(zero_stage=1), OPTIMIZER, STEPS)
    if rank == 1:
        while not (directory / "ready").exists():
            time.sleep(0.01)
        os._exit(0)
    (directory / "ready").touch()
    with pytest.raises(Disconnected, match=r"Connection (closed|reset) by peer") as caught:
        engine.save(directory / "saved")
    (directory / "said").write_text(str(caught.value))
    os._exit(0)  # torch's own end would wait for the other


@pytest.mark.slow
def test_a_rank_whose_peer_dies_while_both_save_speaks_of_that_and_not_of_the_disk(tmp_path):
    run_ranks(left_alone, (2, tmp_path), 2)
    said = (tmp_path / "said").read_text()
    assert "by peer" in said and "make room" not in said


@pytest.mark.slow
def test_bfloat16_learns_and_refuses_what_is_not_finite(results, by_hand):
    steps = results[1]["bfloat16"]["steps"]
    assert [applied for *_, applied in steps] == [applied for *_, applied in by_hand["steps"]]
    for found, expected in zip(steps, by_hand["steps"], strict=True):
        if found[3]:
            assert found[:2] == pytest.approx(expected[:2], rel=0.05)


def test_schedule_by_hand():
    cosine = schedule(OptimizerConfig(schedule="cosine", warmup_steps=2, min_lr_ratio=0.1), 10)
    assert [cosine(0), cosine(1), cosine(2)] == [0.5, 1.0, 1.0]
    assert cosine(6) == pytest.approx(0.55) and cosine(10) == cosine(99) == pytest.approx(0.1)
    linear = schedule(OptimizerConfig(schedule="linear", min_lr_ratio=0.0), 4)
    assert [linear(i) for i in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert schedule(OptimizerConfig(schedule="constant", warmup_steps=4), 10)(1) == 0.5
    stable = schedule(OptimizerConfig(schedule="wsd", warmup_steps=2, decay_share=0.4, min_lr_ratio=0.0), 10)
    assert [stable(i) for i in (0, 1, 6, 7, 10, 99)] == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]
