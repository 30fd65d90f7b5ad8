"""The loop that all supervised stages share, on Ray Train: N workers, each with a DeepSpeed engine.

    ready = prepare(config)     # in the driver: bad input is refused before any process starts
    fit(ready)                  # trains, writes checkpoints and <run_dir>/<stage>/model

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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from transformers import PreTrainedModel

from actors.dataset import Files, Sources, prepare_windows
from actors.engine import Engine, all_reduce_sum
from actors.mailbox import Begun, Logged, Mailbox, Sender, Stopped, work
from actors.placement import connect, environment, preflight
from actors.preparation import MAY_DIFFER_ON_RESUME, find_start
from actors.prometheus import sinks
from actors.reference_logprobs import with_reference
from minigpt_ray.checkpoint import Checkpoints, batch_path, save_batch, write_json_atomic
from minigpt_ray.cli import resolved, write_resolved
from minigpt_ray.config import RolePlacement, SupervisedConfig
from minigpt_ray.data.mixing import Reading
from minigpt_ray.data.prepared import provenance
from minigpt_ray.flops import attention_flops, cpu_peak_flops, gpu_peak_flops, head_flops, linear_flops
from minigpt_ray.models import VALIDATION, TokenLogprobs, TokenValues, build_causal, config_json, export, load_causal, load_scalar, resolve_model
from minigpt_ray.presets import PRESETS, ModelShape
from minigpt_ray.stages import STAGES, Batch, Stage
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import Rates, Timer, Tracker

RESTARTS = 2
"""How often dead workers are replaced, all of them together, before the run stops; they go on from the newest checkpoint."""


HEADS: dict[str, type[TokenLogprobs] | type[TokenValues]] = {"language": TokenLogprobs, "scalar": TokenValues}
"""Stage.head -> what its loss is given as `model`."""


class StageError(ValueError):
    """A stage cannot run as asked: one sentence with what was found and the remedy."""


# --------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Ready:
    """A configuration with everything that it refers to found and checked; paths are absolute, since Ray Train changes the directory."""

    config: SupervisedConfig
    directory: Path
    model: str | None
    """What `from_pretrained` takes, or None for random weights of the preset."""
    reference: str | None
    """The same for the frozen model whose logprobs the loss asks for, or None."""
    tokenizer: str
    sources: Mapping[str, Files]
    shape: ModelShape
    start: int
    """Step of the checkpoint to go on from, 0 for none."""

    @property
    def stage(self) -> Stage:
        return STAGES[self.config.stage]

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoint", self.config.checkpoint.keep)


def prepare(config: SupervisedConfig) -> Ready:
    """Raises ValueError or FileNotFoundError when a model, the tokenizer or the data is not there, or when an earlier run is."""
    directory = config.stage_dir(config.stage)
    model = None if config.model.init_from is None else resolve_model(config.model.init_from, config.run_dir)
    if model is None and config.model.preset not in PRESETS:
        raise StageError(f"model.preset={config.model.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    reference = None if config.reference_from is None else resolve_model(config.reference_from, config.run_dir)
    trained = config.stage_dir("prepare_data") / "tokenizer"
    if model is None and config.model.tokenizer is None and not trained.is_dir():
        raise StageError(f"no tokenizer at {trained}; {_before_this(config)}, or set model.tokenizer or model.init_from")
    tokenizer = model or config.model.tokenizer or str(trained)
    sources = _find_sources(config)
    shape = _shape(model, config.model.preset)
    if config.window > shape.max_positions:
        raise StageError(f"window={config.window} is longer than the model's {shape.max_positions} positions; use at most so many")
    checkpoints = Checkpoints(directory / "checkpoint", config.checkpoint.keep)
    latest = find_start(config, directory, checkpoints, MAY_DIFFER)
    start = 0 if latest is None else checkpoints.step_of(latest)
    tokenizer = str(Path(tokenizer).absolute()) if Path(tokenizer).is_dir() else tokenizer
    return Ready(config, directory, model, reference, tokenizer, sources, shape, start)


def _find_sources(config: SupervisedConfig) -> dict[str, Files]:
    """The files of every source; a source without files is what the stage's files say is theirs."""
    common = tuple(path.absolute() for path in config.files) or (config.run_dir / STAGES[config.stage].default_data,)
    own = {name: tuple(path.absolute() for path in source.files) for name, source in config.sources.items()}
    sources = {name: Files(paths) if paths else Files(common, only=name or None) for name, paths in own.items()}
    for name, source in sources.items():
        given = f"mix.{name}.files" if name and own[name] else "files" if config.files else ""
        for path in source.paths:
            if not path.is_file():
                raise StageError(f"no data file {path}; {f'correct {given}' if given else f'{_before_this(config)}, or set files'}")
    return sources


def _before_this(config: SupervisedConfig) -> str:
    return f"run python -m jobs.prepare_data run={config.run} output_dir={config.output_dir} first"


MAY_DIFFER = (*MAY_DIFFER_ON_RESUME, "epochs", "tokens", "cpus_per_worker", "validation_every")
"""Fields that a resumed run may change."""


def _shape(model: str | None, preset: str) -> ModelShape:
    if model is None:
        return PRESETS[preset]
    return ModelShape.from_config_json(config_json(model))


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
    config, stage = ready.config, ready.stage
    cpus = config.num_workers * config.cpus_per_worker
    connect(None, cpus)
    preflight({stage.name: RolePlacement(ranks=config.num_workers, cpus=config.cpus_per_worker, gpus=config.gpus_per_worker)})
    tokenizer = load_tokenizer(ready.tokenizer)
    stored = {name: prepare_windows(stage, config, files, tokenizer, ready.directory / "windows") for name, files in ready.sources.items()}
    windows = Sources.load(stored, "train")
    for name, size in zip(stored, windows.sizes, strict=True):
        if not size:
            raise StageError(f"{'mix.' + name if name else 'files'}: no document or answer is long enough to learn from; give more data or remove the source")
    steps = num_steps(config, windows)
    write_resolved(config, ready.directory)
    epochs = -(-steps * config.batch_size // len(windows))
    exported = sinks(config.logging, config.run, stage.name)
    with Tracker(ready.directory, stage.name, resolved(config), config.logging, steps, ready.start, epochs=epochs, sinks=exported) as tracker:
        beginning = f"goes on after step {ready.start}" if ready.start else "starts"
        tracker.message(
            f"{stage.name} {beginning}: {len(windows):,} windows of {config.window} tokens, {config.batch_size} a step, {config.num_workers} workers"
        )
        tracker.message(f"data: {provenance(path for files in ready.sources.values() for path in files.paths)}")
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, runtime_env=environment(1)).remote()  # type: ignore[call-overload]
        with ThreadPoolExecutor(1) as threads:
            delivery = threads.submit(_deliver, mailbox, tracker)
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
        tracker.message(f"the model is in {ready.directory / 'model'}")
    return ready.directory / "model"


class _Trainer(TorchTrainer):
    """A TorchTrainer without the process that looks after placement groups when Ray Train's controller is killed.

    They go with the driver's job anyway; without a dashboard that process prints a warning every second.
    """

    def _create_default_callbacks(self) -> list[Any]:
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, PlacementGroupCleanerCallback)]  # type: ignore[misc]


def _trainer(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> TorchTrainer:
    config = ready.config
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; this loop would not listen to it
    return _Trainer(
        work,
        train_loop_config={"ready_and_stored": pickle.dumps((ready, stored)), "mailbox": mailbox},
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {})},
        ),
        run_config=RunConfig(  # type: ignore[call-arg]  # mypy reads the older API
            name=f"{time.time_ns():x}",
            storage_path=str(ready.directory / "ray_train"),
            failure_config=FailureConfig(max_failures=RESTARTS),
            worker_runtime_env=environment(config.cpus_per_worker),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _deliver(mailbox: Any, tracker: Tracker) -> Stopped:
    """Pass messages on to the tracker until there are no more. When that fails, the mailbox goes, and with it the workers."""
    done = begun = 0
    try:
        while True:
            messages = ray.get(mailbox.take.remote(done))
            for message in messages:
                if isinstance(message, Stopped):
                    return message
                if isinstance(message, Logged):
                    for row in message.rows:
                        tracker.log(message.step, row)
                elif isinstance(message, Begun):
                    begun += 1
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
    sender = Sender(mailbox) if dist.get_rank() == 0 else None
    settle_in(ready.config)
    worker = SupervisedRank(ready, read(ready, stored, "train"), read(ready, stored, "validation"))
    start = worker.restore()
    if sender:
        sender.send(Begun(start))
    try:
        for step, rows in worker.steps(start):
            end = worker.agree(sender.send(Logged(step, rows)) if sender else False)
            if end or worker.checkpoint_due(step):
                if sender:
                    sender.settle()  # a checkpoint never knows a step that metrics.jsonl does not
                worker.save(step)
            if end and step < worker.num_steps:
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

    def __init__(self, ready: Ready, windows: Sources, validation: Sources) -> None:
        config = ready.config
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.ready, self.config, self.stage = ready, config, ready.stage
        self.windows, self.validation = windows, validation
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
        self.shape = ready.shape
        self.rates = Rates(self.num_steps, self._peak_flops())

    def _model(self) -> PreTrainedModel:
        ready, config = self.ready, self.config
        if ready.model is None:
            return build_causal(config.model.preset, self.tokenizer, config.seed)
        return load_scalar(ready.model, "float32", config.seed) if self.stage.head == "scalar" else load_causal(ready.model, "float32")

    def steps(self, start: int) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """After each step that is left: its number, from 1, and its rows of metrics, the same on every rank.

        Raises FloatingPointError when a loss or gradient is not finite; no update was applied then.
        """
        for step in range(start, self.num_steps):
            rows = [self._train(step)]
            if len(self.validation) and ((step + 1) % self.config.validation_every == 0 or step + 1 == self.num_steps):
                self.validated = self._validate()
                rows.append(self.validated)
            yield step + 1, rows

    def _train(self, step: int) -> dict[str, float]:
        config, timer = self.config, Timer()
        with timer("data"):
            everyone = self.reading.windows(step)
            mine = np.split(everyone, self.world)[self.rank]
            count = self._count(self.stage.mean_over, everyone)
            micro_batches = Batch.of(self.windows.take(mine), self.engine.device).split(self.rows_per_micro_batch)
        with timer("learn"):
            self.model.train()
            update = self.engine.update(micro_batches, lambda model, batch: self.stage.loss(model, batch, count, config))
        if not update.applied:
            refused = self.ready.directory / "non_finite"
            if self.rank == 0:
                windows = self.windows.take(everyone)
                columns = {name: getattr(windows, name) for name in ("token_ids", "loss_mask", "position_ids")} | dict(windows.numbers)
                save_batch(refused, step + 1, {"windows": everyone, **columns}, {"step": str(step + 1)})
            raise FloatingPointError(
                f"step {step + 1}: a loss or gradient is not finite and no update was applied; the batch is in {batch_path(refused, step + 1)}; lower optimizer.lr, or look at the data"
            )
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
        """Loss of all validation windows; every rank makes as many forwards, if need be of windows that count for nothing."""
        self.model.eval()
        count = sum(self.validation.count(self.stage.mean_over).values())
        per_round = self.world * self.rows_per_micro_batch
        stats: dict[str, torch.Tensor] = {}
        for begin in range(0, len(self.validation), per_round):
            places = begin + self.rank * self.rows_per_micro_batch + np.arange(self.rows_per_micro_batch)
            places = places[places < len(self.validation)]
            windows = self.validation.take(places if len(places) else np.zeros(1, np.int64))
            batch = Batch.of(windows, self.engine.device)
            if not len(places):
                batch.loss_mask.zero_()
            with torch.no_grad():
                _, parts = self.stage.loss(self.engine.engine, batch, count, self.config)
            stats = {name: stats.get(name, torch.zeros((), device=self.engine.device)) + part for name, part in parts.items()}
        return {f"validation/{name}": value for name, value in self.stage.metrics(all_reduce_sum(stats)).items()}

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

    def agree(self, end: bool) -> bool:
        """What rank 0 says. Collective."""
        if self.world == 1:
            return end
        answer = torch.tensor(int(end), device=self.engine.device)
        dist.broadcast(answer, 0)
        return bool(answer)

    def checkpoint_due(self, step: int) -> bool:
        return step % self.config.checkpoint.every == 0 or step == self.num_steps

    def restore(self) -> int:
        """Go on from the newest checkpoint; returns its step, 0 when there is none."""
        found = [self.ready.checkpoints.latest() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        self.engine.load(found[0] / "engine")
        state = self.ready.checkpoints.load_state(found[0])
        self.num_tokens_seen, self.validated = state["num_tokens_seen"], state["validated"]
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
            checkpoints.save_state(begun[0], {"step": step, "num_tokens_seen": self.num_tokens_seen, "validated": self.validated})
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
