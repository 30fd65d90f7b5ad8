"""The DeepSpeed engine behind update / save / load: the only module that imports deepspeed.

One process has one DeepSpeed communication world, so an Engine is built once per process group and rank.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from actors.rank_host import telling_disconnections
from minigpt_ray.checkpoint import naming
from minigpt_ray.config import EngineConfig, OptimizerConfig
from minigpt_ray.imports import without_collection

M = TypeVar("M")
Stats = dict[str, Tensor]
FINITE = "ranks whose losses are finite"
MOST_OF_A_BUCKET = 500_000_000
"""Gradients that are reduced at a time: DeepSpeed's default, which it makes room for however small the model is."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did, the same on every rank."""

    stats: dict[str, float]
    """Sums over micro-batches and ranks of what the loss function returned."""
    grad_norm: float
    """Global gradient norm before clipping; not finite when the update was refused."""
    lr: float
    """Learning rate of this step."""
    applied: bool
    """False when a loss or gradient was not finite, or the update was stopped: nothing was changed."""
    stopped: bool
    """True when the caller stopped it on seeing its statistics."""


def never(stats: dict[str, float]) -> bool:
    """Stops no update."""
    return False


def import_deepspeed() -> ModuleType:
    """DeepSpeed, imported in the rank's process alone: the driver never pays for it."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with without_collection():
        import deepspeed
        from deepspeed.ops import __compatible_ops__

    # Else DeepSpeed compiles a C++ shared-memory collective at start-up, for a minute, or dies without a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Engine:
    """A module, its AdamW, its schedule, sharded as configured.

    Needs torch.distributed to be initialised. `model` is what trains; `total_steps` is the length of the schedule.
    """

    def __init__(self, model: nn.Module, config: EngineConfig, optimizer: OptimizerConfig, total_steps: int) -> None:
        matrices = [p for p in model.parameters() if p.ndim >= 2]
        others = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=config.zero_stage < 3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(adamw, schedule(optimizer, total_steps))
        self.config, self.optimizer_config = config, optimizer
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        self.deepspeed = import_deepspeed()
        self._parameters = sum(p.numel() for p in model.parameters())
        self.engine, *_ = self.deepspeed.initialize(model=model, optimizer=adamw, lr_scheduler=scheduler, config=self._deepspeed_config())
        self._at_hand = True
        if self._offloads_between_phases:
            self._send_away()

    def _deepspeed_config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.config.zero_stage, "reduce_bucket_size": min(MOST_OF_A_BUCKET, self._parameters)}
        if self.config.offload_optimizer and not self._offloads_between_phases:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        return {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.optimizer_config.max_grad_norm if self._norm_by_deepspeed else 0.0,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self.config.dtype == "bfloat16", "check_grad_overflow": self.config.dtype == "bfloat16"},
            "steps_per_print": 10**9,
        }

    @property
    def _norm_by_deepspeed(self) -> bool:
        """DeepSpeed computes no global gradient norm for a plain optimizer (stage 0, float32)."""
        return self.config.zero_stage > 0 or self.config.dtype == "bfloat16"

    @property
    def _offloads_between_phases(self) -> bool:
        """At stage 3 DeepSpeed moves the states of its own Adam alone; there they stay in host memory, where the step is taken."""
        return self.config.offload_optimizer and self.config.zero_stage < 3

    @contextmanager
    def optimizer_at_hand(self) -> Iterator[None]:
        """Optimizer states and float32 master weights are on the device inside, and outside in host memory if so configured.

        May be nested: around several updates the states move once.
        """
        if not self._offloads_between_phases or self._at_hand:
            yield
            return
        self.engine.reload_states()
        self._at_hand = True
        try:
            yield
        finally:
            self._send_away()

    def _send_away(self) -> None:
        from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum as State

        self.engine.offload_states(include=[State.optim_states, State.hp_params])
        self._at_hand = False

    def update(
        self, micro_batches: Sequence[M], loss: Callable[[nn.Module, M], tuple[Tensor, Stats]], stop: Callable[[dict[str, float]], bool] = never
    ) -> Update:
        """One optimizer step over micro-batches; every rank must bring the same number of them.

        `loss` gives a sum divided by the global count, and statistics made the same way, so that micro-batches and
        ranks simply add. DeepSpeed averages gradients over ranks, hence the factor of the world size. When the loss
        of any rank is not finite, the last loss is poisoned, so that every ZeRO stage refuses the update alike; and so when
        `stop` says so of the summed statistics, which are the same on every rank.
        """
        with self.optimizer_at_hand():
            return self._update(micro_batches, loss, stop)

    def _update(self, micro_batches: Sequence[M], loss: Callable[[nn.Module, M], tuple[Tensor, Stats]], stop: Callable[[dict[str, float]], bool]) -> Update:
        world = dist.get_world_size()
        stats: Stats = {}
        summed: dict[str, float] = {}
        stopped = False
        finite = torch.ones((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            self.engine.set_gradient_accumulation_boundary(last)
            value, parts = loss(self.engine, micro_batch)
            finite = finite * torch.isfinite(value.detach()).float()
            stats = {name: stats.get(name, torch.zeros((), device=self.device)) + part.detach() for name, part in parts.items()}
            if last:
                summed = all_reduce_sum({**stats, FINITE: finite})
                everywhere = summed.pop(FINITE) == world
                stopped = everywhere and stop(summed)
                value = value if everywhere and not stopped else value * math.nan
            self.engine.backward(value * world)
        lr = float(self.engine.get_lr()[0])
        grad_norm, applied = self._step()
        return Update(summed, grad_norm, lr, applied, stopped)

    def _step(self) -> tuple[float, bool]:
        if self._norm_by_deepspeed:
            self.engine.step()
            return float(self.engine.get_global_grad_norm()), bool(self.engine.was_step_applied())
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.optimizer_config.max_grad_norm))
        if not math.isfinite(norm):
            self.engine.zero_grad()
            return norm, False
        self.engine.step()
        return norm, True

    def __call__(self, *args: Any) -> Any:
        """Forward without gradients."""
        with torch.no_grad():
            return self.engine(*args)

    def named_weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Full tensors of `model` (a part of the trained module) on every rank, tied ones once; all ranks must iterate in step."""
        for name, parameter in model.named_parameters():
            gathered = self.deepspeed.zero.GatheredParameters([parameter]) if self.config.zero_stage == 3 else nullcontext()
            with gathered:
                yield name, parameter.detach()

    def save(self, directory: Path) -> None:
        """Model, optimizer, schedule and random state of every rank. Collective; raises CheckpointError, or Disconnected when another rank is gone."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        with naming(directory), telling_disconnections(), self.optimizer_at_hand():
            self.engine.save_checkpoint(str(directory), tag="engine")
            torch.save({"torch": torch.get_rng_state(), "cuda": cuda}, directory / f"random-{dist.get_rank()}.pt")  # DeepSpeed keeps rank 0's alone

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote, on as many ranks. Collective."""
        with self.optimizer_at_hand():
            path, _ = self.engine.load_checkpoint(str(directory), tag="engine")
        if path is None:
            raise FileNotFoundError(f"{directory} holds no engine state")
        random = torch.load(directory / f"random-{dist.get_rank()}.pt")
        torch.set_rng_state(random["torch"])
        if random["cuda"]:
            torch.cuda.set_rng_state_all(random["cuda"])


def all_reduce_sum(stats: Stats) -> dict[str, float]:
    """Sum named scalars over the ranks in one collective."""
    if not stats:
        return {}
    packed = torch.stack([value.double().reshape(()) for value in stats.values()])
    dist.all_reduce(packed)
    return dict(zip(stats, packed.tolist(), strict=True))


COURSES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - math.sqrt(progress),
}
"""Schedule -> what is left of the way down to min_lr_ratio, by the share of the decay that is done."""


def schedule(config: OptimizerConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate for optimizer step 0, 1, ...: linear warm-up, then the chosen course to min_lr_ratio."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.schedule == "constant":
            return 1.0
        stable = total_steps - math.ceil(config.decay_share * total_steps) if config.schedule == "wsd" else 0
        start = max(config.warmup_steps, stable)
        progress = min(1.0, max(0, step - start) / max(1, total_steps - start))
        share = COURSES[config.schedule](progress)
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * share

    return factor
