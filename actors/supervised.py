"""The loop that all supervised stages share, on Ray Train: N workers, each with a DeepSpeed engine.

    ready = prepare(config)     # actors/stage_inputs.py: bad input is refused before any process starts
    fit(ready)                  # in the driver: trains, writes checkpoints and <run_dir>/<stage>/model

The driver owns the tracker: rank 0 sends it rows through a Mailbox, since Ray Train leaves the driver nothing to do but
wait. Checkpoints are this project's own, so Ray Train's directory is a fresh one every time: under an old name it would
silently resume. What is read and what is minimised says the stage (minigpt_ray/stages.py).
"""

import math
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from torch import nn

from actors.dataset import Sources, prepare_windows
from actors.engine import Engine, all_reduce_sum
from actors.mailbox import Begun, Logged, Mailbox, Sender, Started, Stopped, work
from actors.parent import driver_restarts
from actors.placement import connect, environment
from actors.preflight import preflight
from actors.prometheus import sinks
from actors.reference_logprobs import with_reference
from actors.stacks import keep_stacks_at_hand
from actors.stage_inputs import Ready, StageError
from actors.watchdog import START_SECONDS, Whereabouts, collective_timeout, end_hung_processes, outlast
from minigpt_ray.checkpoint import batch_path, save_batch, write_json_atomic
from minigpt_ray.cli import resolved, write_resolved
from minigpt_ray.config import RolePlacement, SupervisedConfig
from minigpt_ray.data.mixing import Reading
from minigpt_ray.data.prepared import provenance
from minigpt_ray.flops import attention_flops, cpu_peak_flops, gpu_peak_flops, head_flops, linear_flops
from minigpt_ray.model_directory import VALIDATION
from minigpt_ray.models import TokenLogprobs, TokenValues, build_causal, export, load_causal, load_scalar
from minigpt_ray.object_store import deliver
from minigpt_ray.patience import Patience
from minigpt_ray.stages import STAGES, Batch, Stage
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import Rates, Timer, Tracker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESTARTS = 2
"""How often dead workers are replaced, all of them together, before the run stops; they go on from the newest checkpoint."""

KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""glibc's malloc keeps what a step frees for the next one. Ray Train computes in a thread, where malloc by itself gives it back to the kernel and
takes it again: 100,000 pages a second, a sixth of a core's time. 32 MiB is the largest block that it can keep."""

SAMPLE = 4096
"""Windows that a baseline is computed from."""
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


# -------------------------------------------------------------------------------------------------------- driver


def fit(ready: Ready) -> Path:
    """Train as configured; returns the directory of the model. Raises DataError for bad rows, StageError when a loss is not finite."""
    config, stage = ready.config, STAGES[ready.config.stage]
    cpus = config.num_workers * config.cpus_per_worker
    own = connect(None, cpus)
    preflight(
        {stage.name: RolePlacement(ranks=config.num_workers, cpus=config.cpus_per_worker, gpus=config.gpus_per_worker)},
        wait_seconds=config.wait_seconds,
        own=own,
        section="",
    )
    tokenizer = load_tokenizer(ready.tokenizer)
    stored = {name: prepare_windows(stage, config, files, tokenizer, ready.directory / "windows") for name, files in ready.sources.items()}
    windows = Sources.load(stored, "train")
    for name, size in zip(stored, windows.sizes, strict=True):
        if not size:
            raise StageError(f"{'mix.' + name if name else 'files'}: no document or answer is long enough to learn from; give more data or remove the source")
    steps = num_steps(config, windows)
    baseline = _baseline(stage, windows, Sources.load(stored, "validation"))
    write_resolved(config, ready.directory)
    epochs = -(-steps * config.batch_size // len(windows))
    exported = sinks(config.logging, config.run, stage.name)
    with Tracker(ready.directory, stage.name, resolved(config), config.logging, steps, ready.start, epochs=epochs, sinks=exported) as tracker:
        beginning = f"goes on after step {ready.start}" if ready.start else "starts"
        tracker.message(
            f"{stage.name} {beginning}: {len(windows):,} windows of {config.window} tokens, {config.batch_size} a step, {config.num_workers} workers"
        )
        tracker.message(f"data: {provenance(path for files in ready.sources.values() for path in files.paths)}")
        if baseline and not ready.start:
            tracker.log(0, baseline)
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, runtime_env=environment(1)).remote()  # type: ignore[call-overload]
        with ThreadPoolExecutor(1) as threads:
            delivery = threads.submit(_deliver, mailbox, tracker, config.hang_after_s)
            handler = signal.signal(signal.SIGTERM, lambda number, frame: mailbox.ask_to_end.remote())
            try:
                _trainer(ready, stored, mailbox).fit()
            finally:
                signal.signal(signal.SIGTERM, handler)
                mailbox.put.remote(Stopped(""))  # else a failure would leave the delivery waiting
            stopped = delivery.result()
        if stopped.fault:
            raise StageError(stopped.fault)
        shutil.rmtree(ready.directory / "ray_train")
        if stopped.asked:
            tracker.message(f"SIGTERM: step {tracker.step} is saved; checkpoint.resume=auto goes on from there")
            raise SystemExit(0)
        if stopped.early:
            tracker.message(stopped.early)
        deliver(ready.directory / "model", config.export_to, config.run, stage.name, tracker.message)
    return ready.directory / "model"


def _baseline(stage: Stage, train: Sources, validation: Sources) -> dict[str, float]:
    """What the validation's metrics have to be better than; empty where nothing is known or there is no validation."""
    if stage.baseline is None or not len(validation):
        return {}
    return {f"validation/{name}": value for name, value in stage.baseline(train.sample(SAMPLE), validation.sample(SAMPLE)).items()}


class _Trainer(TorchTrainer):
    """A TorchTrainer without two processes that have nothing to do here.

    One looks after placement groups when Ray Train's controller is killed: they go with the driver's job anyway, and without
    a dashboard it prints a warning every second. The other deals out Ray Data sets to the workers, which read stored windows.
    """

    def _create_default_callbacks(self) -> list[Any]:
        idle = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, idle)]  # type: ignore[misc]


def _trainer(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> TorchTrainer:
    config = ready.config
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; this loop would not listen to it
    return _Trainer(
        work,
        train_loop_config={"ready_and_stored": pickle.dumps((ready, stored)), "mailbox": mailbox},
        torch_config=TorchConfig(timeout_s=int(collective_timeout(config.hang_after_s).total_seconds())),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy reads the older API
            name=f"{time.time_ns():x}",
            storage_path=str(ready.directory / "ray_train"),
            failure_config=FailureConfig(max_failures=RESTARTS),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY | environment(config.cpus_per_worker)["env_vars"]},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _deliver(mailbox: Any, tracker: Tracker, hang_after_s: float) -> Stopped:
    """Pass messages on to the tracker until there are no more. When that fails, the mailbox goes, and with it the workers.

    When there is none for `hang_after_s`, while workers start at least for START_SECONDS, they hang and are ended.
    """
    done = begun = 0
    workers: dict[str, Whereabouts] = {}
    patience = starting = max(hang_after_s, START_SECONDS)
    try:
        while True:
            taken = mailbox.take.remote(done)
            while not ray.wait([taken], timeout=patience)[0]:
                end_hung_processes(workers, "a step", patience, environment(1))
                workers, patience = {}, starting
            messages = ray.get(taken)
            for message in messages:
                if isinstance(message, Started):
                    workers[message.name], patience = message.place, starting
                if isinstance(message, Stopped):
                    return message
                if isinstance(message, Logged):
                    for row in message.rows:
                        tracker.log(message.step, row | ({"restarts/driver": driver_restarts()} if "train/epoch" in row else {}))
                elif isinstance(message, Begun):
                    begun, patience = begun + 1, hang_after_s
                    if begun > 1:
                        tracker.message(f"workers were lost; new ones go on after step {message.step}")
                        tracker.rewind(message.step)
            done = len(messages)
    except BaseException:
        ray.kill(mailbox)
        raise


# ------------------------------------------------------------------------------------------------------- workers


def train(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> None:
    """What every Ray Train worker does; rank 0 is the one that sends."""
    keep_stacks_at_hand()
    outlast(ready.config.hang_after_s)
    ray.get(mailbox.put.remote(Started(f"{ready.config.stage} worker {dist.get_rank()} of {dist.get_world_size()}", Whereabouts.mine())))
    sender = Sender(mailbox) if dist.get_rank() == 0 else None
    settle_in(ready.config)
    windows, validation = read(ready, stored, "train"), read(ready, stored, "validation")
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
    except FloatingPointError as error:  # new workers would only meet it again
        if sender:
            sender.stop(Stopped(str(error)))
        return
    worker.export()
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


def read(ready: Ready, stored: Mapping[str, Path], part: str) -> Sources:
    """The windows of all sources with all that the loss asks for. Collective."""
    windows = Sources.load(stored, part)
    if ready.reference is None:
        return windows
    return Sources(with_reference(windows.parts, {name: directory / part for name, directory in stored.items()}, ready.reference, ready.config))


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
                f"step {step + 1}: a loss or gradient is not finite and no update was applied; the batch is in {batch_path(refused, step + 1)}; lower optimizer.lr, or look at the data"
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
            write_resolved(self.config, begun[0])
            checkpoints.commit(step)
        dist.barrier()

    def export(self) -> None:
        """Write the Hugging Face directory, whole or not at all, the last validation beside the weights. Collective."""
        weights = {name: tensor.cpu().clone() for name, tensor in self.engine.named_weights(self.model) if self.rank == 0}
        if self.rank == 0:
            final, partial = self.ready.directory / "model", self.ready.directory / ".model.partial"
            for directory in (partial, final):
                shutil.rmtree(directory, ignore_errors=True)
            export(self.model, self.tokenizer, partial, weights)
            if self.validated:
                write_json_atomic(partial / VALIDATION, self.validated)
            partial.rename(final)
        dist.barrier()
