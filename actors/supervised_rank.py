"""What a worker of a supervised stage does: one loop for all of them, on one data-parallel rank with a DeepSpeed engine.

What is read and what is minimised says the stage (minigpt_ray/stages.py); where rows of metrics go, and who starts the
workers and replaces those that die, says the driver (actors/supervised.py).
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from torch import nn

from actors.dataset import Sources
from actors.engine import Engine, all_reduce_sum
from actors.mailbox import Begun, Logged, Pulse, Sender, Started, Stopped
from actors.rank_host import telling_disconnections
from actors.reference_logprobs import with_reference
from actors.stacks import keep_stacks_at_hand
from actors.stage_inputs import Ready
from actors.watchdog import Whereabouts, outlast
from minigpt_ray.checkpoint import CheckpointError, batch_path, naming, save_batch, write_json_atomic
from minigpt_ray.cli import write_resolved
from minigpt_ray.config import SupervisedConfig
from minigpt_ray.data.mixing import Reading
from minigpt_ray.flops import attention_flops, cpu_peak_flops, gpu_peak_flops, head_flops, linear_flops
from minigpt_ray.model_directory import VALIDATION, ExportError, written_whole
from minigpt_ray.models import TokenLogprobs, TokenValues, build_causal, export, load_causal, load_scalar
from minigpt_ray.patience import Patience
from minigpt_ray.stages import STAGES, Batch
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import Rates, Timer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_SOURCES = 20
"""Sources up to which the validation loss is told for each."""

ASKED = "ranks that were asked to end"
"""Among the statistics of a step, beside those of the loss."""

HEADS: dict[str, type[TokenLogprobs] | type[TokenValues]] = {"language": TokenLogprobs, "scalar": TokenValues}
"""Stage.head -> what its loss is given as `model`."""


def num_steps(config: SupervisedConfig, windows: Sources) -> int:
    """Optimizer steps of the run, as `steps`, `epochs` or `tokens` says it; no further pass is begun for what is left of a batch."""
    if config.epochs is not None:
        return max(1, int(config.epochs * len(windows) / config.batch_size))
    if config.tokens is not None:
        return math.ceil(config.tokens * len(windows) / (config.batch_size * sum(windows.count("num_tokens").values())))
    return config.steps


@telling_disconnections()
def train(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> None:
    """What every Ray Train worker does; rank 0 is the one that sends."""
    keep_stacks_at_hand()
    outlast(ready.config.hang_after_s)
    place, device = Whereabouts.mine(), torch.cuda.get_device_name() if ready.config.gpus_per_worker else "cpu"
    process = {"rank": dist.get_rank(), "host": place.address, "pid": place.pid, "device": device}
    ray.get(mailbox.put.remote(Started(f"{ready.config.stage} worker {dist.get_rank()} of {dist.get_world_size()}", place, process)))
    sender = Sender(mailbox) if dist.get_rank() == 0 else None
    settle_in(ready.config)
    windows, validation = read(ready, stored, Pulse(mailbox))
    worker = SupervisedRank(ready, windows, validation, sender.asked_to_end) if sender else SupervisedRank(ready, windows, validation)
    start = worker.restore()
    if sender:
        sender.send(Begun(start))
    try:
        for step, rows in worker.steps(start):
            if sender:
                sender.send(Logged(step, rows))
            if worker.ends or worker.checkpoint_due(step):
                if sender:
                    sender.settle()  # a checkpoint never knows a step that metrics.jsonl does not
                worker.save(step)
            if worker.ends and step < worker.num_steps and not worker.stops_early:
                if sender:
                    sender.stop(Stopped("", asked=True))
                return
        worker.export()
    except FloatingPointError as error:  # new workers would only meet it again
        if sender:
            sender.stop(Stopped(str(error)))
        return
    except (CheckpointError, ExportError) as error:  # perhaps of this rank alone: the others wait for it, and its end is theirs
        ray.get(mailbox.put.remote(Stopped(str(error))))
        raise
    if sender:
        sender.settle()
        if worker.stops_early:
            sender.stop(Stopped("", early=worker.patience.sentence))


def settle_in(config: SupervisedConfig) -> None:
    """Threads, and the GPU where there are some, of this process."""
    torch.set_num_threads(config.cpus_per_worker)
    os.environ |= {"LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1")}  # DeepSpeed asks for it
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def read(ready: Ready, stored: Mapping[str, Path], alive: Callable[[], object]) -> tuple[Sources, Sources]:
    """The windows of all sources, to train and to validate, with all that the loss asks for; `alive` is called now and then. Collective."""
    parts = {part: Sources.load(stored, part) for part in ("train", "validation")}
    if ready.reference is not None:
        windows = {stored[name] / part: own for part, sources in parts.items() for name, own in sources.parts.items()}
        windows = with_reference(windows, ready.reference, ready.config, alive)
        parts = {part: Sources({name: windows[directory / part] for name, directory in stored.items()}) for part in parts}
    return parts["train"], parts["validation"]


class SupervisedRank:
    """One data-parallel rank. Needs torch.distributed to be initialised."""

    def __init__(self, ready: Ready, windows: Sources, validation: Sources, asked_to_end: Callable[[], bool] = lambda: False) -> None:
        config = ready.config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ready, self.config, self.stage = ready, config, STAGES[config.stage]
        self.windows, self.validation = windows, validation
        self.validation_rows = {source: rows for source, rows in validation.by_source().items() if self._count_held_out(rows)}
        self.tokenizer = load_tokenizer(ready.tokenizer)
        self.model = self._model()
        if config.engine.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(config.seed * self.world + self.rank)
        self.num_steps = num_steps(config, windows)
        self.reading = Reading(windows.sizes, config.shares, self.num_steps, config.batch_size, config.seed)
        self.engine = Engine(HEADS[self.stage.head](self.model), config.engine, config.optimizer, self.num_steps)
        self.rows_per_micro_batch = max(1, config.engine.micro_batch_tokens // config.window)
        self.num_tokens_seen = dict.fromkeys(windows.parts, 0)
        self.validated: dict[str, float] = {}
        self.patience = Patience()
        self.asked_to_end = asked_to_end
        self.ends = False
        """Some rank was asked to end before the loss of the last step; the same on every rank."""
        self.shape = ready.shape
        self.rates = Rates(self.num_steps, self._peak_flops())

    def _model(self) -> "PreTrainedModel":
        ready, config = self.ready, self.config
        if ready.model is None:
            return build_causal(config.model.preset, self.tokenizer, config.seed)
        return load_scalar(ready.model, "float32", config.seed) if self.stage.head == "scalar" else load_causal(ready.model, "float32")

    def steps(self, start: int) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """After each step that is left: its number, from 1, and its rows of metrics, the same on every rank.

        Raises FloatingPointError when a loss or gradient is not finite; no update was applied then.
        """
        for step in range(start, self.num_steps):
            if self.stops_early:
                return
            rows = [self._train(step)]
            if self.validation_rows and ((step + 1) % self.config.validation_every == 0 or step + 1 == self.num_steps):
                self.validated = self._validate()
                self.patience = self.patience.after(step + 1, self.validated["validation/loss"])
                waited = {"validation/since_lowest": self.patience.since} if self.config.early_stopping else {}
                rows.append(self.validated | waited)
            yield step + 1, rows

    @property
    def stops_early(self) -> bool:
        """The validation loss has not fallen for as long as the run is to wait; the same on every rank."""
        return self.config.early_stopping is not None and self.patience.since >= self.config.early_stopping

    def _train(self, step: int) -> dict[str, float]:
        config, timer = self.config, Timer()
        with timer("data"):
            everyone = self.reading.windows(step)
            mine = np.split(everyone, self.world)[self.rank]
            count = self._count(self.stage.mean_over, everyone)
            micro_batches = Batch.of(self.windows.take(mine), self.engine.device).split(self.rows_per_micro_batch)
        asked = torch.tensor(float(self.asked_to_end()), device=self.engine.device)

        def loss(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            value, stats = self.stage.loss(model, batch, count, config)
            return value, {**stats, ASKED: asked}  # travels with them, since to agree is a collective

        with timer("learn"):
            self.model.train()
            update = self.engine.update(micro_batches, loss)
        if not update.applied:
            refused = self.ready.directory / "non_finite"
            if self.rank == 0:
                windows = self.windows.take(everyone)
                columns = {name: getattr(windows, name) for name in ("token_ids", "loss_mask", "position_ids")} | dict(windows.numbers)
                save_batch(refused, step + 1, {"windows": everyone, **columns}, {"step": str(step + 1)})
            raise FloatingPointError(
                f"step {step + 1}: a loss or gradient is not finite and no update was applied; the batch is in {batch_path(refused, step + 1)}; look at it, and begin again with better data or a lower optimizer.lr, and another run="
            )
        self.ends = update.stats.pop(ASKED) > 0
        num_tokens = self.windows.count("num_tokens", everyone)
        self.num_tokens_seen = {source: seen + num_tokens.get(source, 0) for source, seen in self.num_tokens_seen.items()}
        seconds = sum(timer.seconds.values())
        return {
            "train/epoch": (step + 1) * config.batch_size / len(self.windows),
            **{f"train/{name}": value for name, value in self.stage.metrics(update.stats).items()},
            "train/lr": update.lr,
            "train/grad_norm": update.grad_norm,
            "train/num_tokens_seen": sum(self.num_tokens_seen.values()),
            **{f"train/num_tokens_seen/{source}": seen for source, seen in self.num_tokens_seen.items() if source},
            **self.rates.step(step + 1, seconds, sum(num_tokens.values()), self._count("num_examples", everyone), self._flops(everyone)),
            "time/step_s": seconds,
            **timer.metrics(),
        }

    def _validate(self) -> dict[str, float]:
        """Metrics of all validation windows, and the loss of each source where there are several."""
        self.model.eval()
        found = {source: self._mean_stats(rows) for source, rows in self.validation_rows.items()}
        counts = {source: self._count_held_out(rows) for source, rows in self.validation_rows.items()}
        total = sum(counts.values())
        stats = {name: sum(found[source][name] * count / total for source, count in counts.items()) for name in next(iter(found.values()))}
        by_source = {f"loss/{source}": stats["loss"] for source, stats in found.items() if source} if 1 < len(found) <= MOST_SOURCES else {}
        return {f"validation/{name}": value for name, value in (self.stage.metrics(stats) | by_source).items()}

    def _mean_stats(self, rows: np.ndarray) -> dict[str, float]:
        """Statistics of the loss on these validation windows; every rank makes as many forwards, if need be of windows that count for nothing."""
        count = self._count_held_out(rows)
        per_round = self.world * self.rows_per_micro_batch
        stats: dict[str, torch.Tensor] = {}
        for begin in range(0, len(rows), per_round):
            places = rows[begin + self.rank * self.rows_per_micro_batch :][: self.rows_per_micro_batch]
            batch = Batch.of(self.validation.take(places if len(places) else rows[:1]), self.engine.device)
            if not len(places):
                batch.loss_mask.zero_()
            with torch.no_grad():
                _, parts = self.stage.loss(self.engine.engine, batch, count, self.config)
            stats = {name: stats.get(name, torch.zeros((), device=self.engine.device)) + part for name, part in parts.items()}
        return all_reduce_sum(stats)

    def _count_held_out(self, rows: np.ndarray) -> int:
        return sum(self.validation.count(self.stage.mean_over, rows).values())

    def _count(self, column: str, rows: np.ndarray) -> int:
        return sum(self.windows.count(column, rows).values())

    def _flops(self, rows: np.ndarray) -> float:
        """Useful FLOPs of a step: forward and backward, the backward pass twice the forward."""
        outputs = 1 if self.stage.head == "scalar" else self.model.config.vocab_size
        linear = linear_flops(self.shape, self._count("num_tokens", rows))
        attention = attention_flops(self.shape, self._count("num_pairs", rows))
        return 3 * (linear + attention + head_flops(self.shape, outputs, self._count("num_loss_tokens", rows)))

    def _peak_flops(self) -> float:
        """Of all ranks together."""
        if torch.cuda.is_available():
            return self.world * gpu_peak_flops(torch.cuda.get_device_name(), self.config.engine.dtype)
        return self.world * cpu_peak_flops(self.config.cpus_per_worker)

    # ----------------------------------------------------------------------------------------- checkpoints, export

    def checkpoint_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.num_steps or self.stops_early

    def restore(self) -> int:
        """Go on from the newest checkpoint; returns its step, 0 when there is none."""
        found = [self.ready.checkpoints.latest() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        self.engine.load(found[0] / "engine")
        state = self.ready.checkpoints.load_state(found[0])
        self.num_tokens_seen, self.validated = state["num_tokens_seen"], state["validated"]
        self.patience = Patience(**state["patience"])
        return self.ready.checkpoints.step_of(found[0])

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. Collective."""
        checkpoints = self.ready.checkpoints
        begun = [checkpoints.begin(step) if self.rank == 0 else None]
        dist.broadcast_object_list(begun)
        assert begun[0] is not None
        self.engine.save(begun[0] / "engine")
        dist.barrier()
        if self.rank == 0:
            state = {"step": step, "num_tokens_seen": self.num_tokens_seen, "validated": self.validated, "patience": asdict(self.patience)}
            checkpoints.save_state(begun[0], state)
            with naming(begun[0]):
                write_resolved(self.config, begun[0])
            checkpoints.commit(step)
        dist.barrier()

    def export(self) -> None:
        """Write the Hugging Face directory, whole or not at all, the last validation beside the weights. Collective."""
        weights = {name: tensor.cpu().clone() for name, tensor in self.engine.named_weights(self.model) if self.rank == 0}
        if self.rank == 0:
            with written_whole(self.ready.directory / "model") as directory:
                export(self.model, self.tokenizer, directory, weights)
                if self.validated:
                    write_json_atomic(directory / VALIDATION, self.validated)
        dist.barrier()
