"""The loop that all supervised stages share, on Ray Train: N workers, each with a DeepSpeed engine.

    ready = prepare(config, STAGES["sft"])     # in the driver: bad input is refused before any process starts
    fit(ready)                                 # trains, writes checkpoints and <run_dir>/<stage>/model

The driver owns the tracker: rank 0 sends it rows through a Mailbox, since Ray Train leaves the driver nothing to do but
wait. Checkpoints are this project's own, so Ray Train's directory is a fresh one every time: under an old name it would
silently resume.
"""

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
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

from actors.dataset import StoredWindows, prepare_windows
from actors.engine import Engine, all_reduce_sum
from actors.placement import connect, environment, preflight
from actors.preparation import MAY_DIFFER_ON_RESUME, find_start
from minigpt_ray.checkpoint import Checkpoints, batch_path, save_batch
from minigpt_ray.cli import resolved, write_resolved
from minigpt_ray.config import RolePlacement, SFTConfig
from minigpt_ray.data.packing import windows_for
from minigpt_ray.flops import attention_flops, cpu_peak_flops, gpu_peak_flops, head_flops, linear_flops
from minigpt_ray.models import TokenLogprobs, build_causal, config_json, export, load_causal, resolve_model
from minigpt_ray.presets import PRESETS, ModelShape
from minigpt_ray.stages import STAGES, Batch, Stage
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import Rates, Timer, Tracker

RESTARTS = 2
"""How often dead workers are replaced, all of them together, before the run stops; they go on from the newest checkpoint."""


class StageError(ValueError):
    """A stage cannot run as asked: one sentence with what was found and the remedy."""


# --------------------------------------------------------------------------------------------------- preparation


@dataclass(frozen=True)
class Ready:
    """A configuration with everything that it refers to found and checked; paths are absolute, since Ray Train changes the directory."""

    config: SFTConfig
    stage: str
    """Key of STAGES."""
    directory: Path
    model: str | None
    """What `from_pretrained` takes, or None for random weights of the preset."""
    tokenizer: str
    files: tuple[Path, ...]
    shape: ModelShape
    start: int
    """Step of the checkpoint to go on from, 0 for none."""

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory / "checkpoint", self.config.checkpoint.keep)


def prepare(config: SFTConfig, stage: Stage) -> Ready:
    """Raises ValueError or FileNotFoundError when the model, the tokenizer or the data is not there, or when an earlier run is."""
    directory = config.stage_dir(stage.name)
    checkpoints = Checkpoints(directory / "checkpoint", config.checkpoint.keep)
    before_this = f"run python -m jobs.prepare_data run={config.run} output_dir={config.output_dir} first"
    model = None if config.model.init_from is None else resolve_model(config.model.init_from, config.run_dir)
    if model is None and config.model.preset not in PRESETS:
        raise StageError(f"model.preset={config.model.preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    trained = config.stage_dir("prepare_data") / "tokenizer"
    if model is None and config.model.tokenizer is None and not trained.is_dir():
        raise StageError(f"no tokenizer at {trained}; {before_this}, or set model.tokenizer or model.init_from")
    tokenizer = model or config.model.tokenizer or str(trained)
    files = tuple(path.absolute() for path in config.files) or (config.run_dir / stage.default_data,)
    for path in files:
        if not path.is_file():
            raise StageError(f"no data file {path}; {'correct files' if config.files else f'{before_this}, or set files'}")
    shape = _shape(model, config.model.preset)
    if config.window > shape.max_positions:
        raise StageError(f"window={config.window} is longer than the model's {shape.max_positions} positions; use at most so many")
    latest = find_start(config, directory, checkpoints, MAY_DIFFER)
    start = 0 if latest is None else checkpoints.step_of(latest)
    return Ready(config, stage.name, directory, model, str(Path(tokenizer).absolute()) if Path(tokenizer).is_dir() else tokenizer, files, shape, start)


MAY_DIFFER = (*MAY_DIFFER_ON_RESUME, "cpus_per_worker", "validation_every")
"""Fields that a resumed run may change."""


def _shape(model: str | None, preset: str) -> ModelShape:
    if model is None:
        return PRESETS[preset]
    return ModelShape.from_config_json(config_json(model))


# -------------------------------------------------------------------------------------------------------- driver


@dataclass(frozen=True)
class Begun:
    """The workers are ready, for the first time or because others were lost; the next row is of step + 1."""

    step: int


@dataclass(frozen=True)
class Logged:
    """The rows of metrics of a step."""

    step: int
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Stopped:
    """No more rows; `fault` says why, or is empty when all steps were taken."""

    fault: str
    asked: bool = False
    """The driver asked for it; the last step is saved, and there is no model yet."""


class Mailbox:
    """Ray actor between rank 0 and the driver, which knows what the driver has dealt with."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._asked_to_end = False

    async def put(self, message: Any) -> bool:
        """Whether the driver has asked to end."""
        await self._queue.put(message)
        return self._asked_to_end

    async def ask_to_end(self) -> None:
        self._asked_to_end = True

    async def take(self, done: int) -> list[Any]:
        """The next messages, at least one; `done` is how many of those given out before have been dealt with."""
        for _ in range(done):
            self._queue.task_done()
        messages = [await self._queue.get()]
        while not self._queue.empty():
            messages.append(self._queue.get_nowait())
        return messages

    async def settled(self) -> None:
        """Returns once the driver has dealt with everything that was put."""
        await self._queue.join()


class Sender:
    """Rank 0's end of the mailbox. A message waits for the one before it, since calls to an async actor may overtake each other."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._before = mailbox, mailbox.put.remote(None)

    def send(self, message: Any) -> bool:
        """Whether the driver has asked to end, as of the message before."""
        asked_to_end = bool(ray.get(self._before))
        self._before = self._mailbox.put.remote(message)
        return asked_to_end

    def stop(self, message: Stopped) -> None:
        """Send the last message; returns once it is in the mailbox."""
        self.send(message)
        ray.get(self._before)

    def settle(self) -> None:
        """Returns once the driver has dealt with everything that was sent."""
        ray.get(self._before)
        ray.get(self._mailbox.settled.remote())


def fit(ready: Ready) -> Path:
    """Train as configured; returns the directory of the model. Raises DataError for bad rows, StageError when a loss is not finite."""
    config, stage = ready.config, STAGES[ready.stage]
    cpus = config.num_workers * config.cpus_per_worker
    connect(None, cpus)
    preflight({ready.stage: RolePlacement(ranks=config.num_workers, cpus=config.cpus_per_worker, gpus=config.gpus_per_worker)})
    windows = prepare_windows(
        stage, ready.files, load_tokenizer(ready.tokenizer), ready.directory / "windows", config.window, config.validation_share, config.seed, config.separator
    )
    num_windows = len(StoredWindows.load(windows / "train"))
    write_resolved(config, ready.directory)
    epochs = -(-config.steps * config.batch_size // num_windows)
    with Tracker(ready.directory, ready.stage, resolved(config), config.logging, config.steps, ready.start, epochs=epochs) as tracker:
        beginning = f"goes on after step {ready.start}" if ready.start else "starts"
        tracker.message(
            f"{ready.stage} {beginning}: {num_windows:,} windows of {config.window} tokens, {config.batch_size} a step, {config.num_workers} workers"
        )
        mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, runtime_env=environment(1)).remote()  # type: ignore[call-overload]
        with ThreadPoolExecutor(1) as threads:
            delivery = threads.submit(_deliver, mailbox, tracker)
            handler = signal.signal(signal.SIGTERM, lambda number, frame: mailbox.ask_to_end.remote())
            try:
                _trainer(ready, windows, mailbox).fit()
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


def _trainer(ready: Ready, windows: Path, mailbox: Any) -> TorchTrainer:
    config = ready.config
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; this loop would not listen to it
    return _Trainer(
        train,
        train_loop_config={"ready": ready, "windows": windows, "mailbox": mailbox},
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


def train(given: dict[str, Any]) -> None:
    """What every Ray Train worker runs; rank 0 is the one that sends."""
    ready: Ready = given["ready"]
    sender = Sender(given["mailbox"]) if dist.get_rank() == 0 else None
    worker = SupervisedRank(ready, StoredWindows.load(given["windows"] / "train"), StoredWindows.load(given["windows"] / "validation"))
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
            if end and step < ready.config.steps:
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


class SupervisedRank:
    """One data-parallel rank. Needs torch.distributed to be initialised."""

    def __init__(self, ready: Ready, windows: StoredWindows, validation: StoredWindows) -> None:
        config = ready.config
        torch.set_num_threads(config.cpus_per_worker)
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        os.environ |= {"LOCAL_SIZE": os.environ.get("LOCAL_WORLD_SIZE", "1")}  # DeepSpeed asks for it
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        self.ready, self.config, self.stage = ready, config, STAGES[ready.stage]
        self.windows, self.validation = windows, validation
        self.tokenizer = load_tokenizer(ready.tokenizer)
        self.model = build_causal(config.model.preset, self.tokenizer, config.seed) if ready.model is None else load_causal(ready.model, "float32")
        if config.engine.activation_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(config.seed * self.world + self.rank)
        self.engine = Engine(TokenLogprobs(self.model), config.engine, config.optimizer, config.steps)
        self.rows_per_micro_batch = max(1, config.engine.micro_batch_tokens // config.window)
        self.num_tokens_seen = 0
        self.shape = ready.shape
        self.rates = Rates(config.steps, self._peak_flops())

    def steps(self, start: int) -> Iterator[tuple[int, list[dict[str, float]]]]:
        """After each step that is left: its number, from 1, and its rows of metrics, the same on every rank.

        Raises FloatingPointError when a loss or gradient is not finite; no update was applied then.
        """
        for step in range(start, self.config.steps):
            rows = [self._train(step)]
            if len(self.validation) and ((step + 1) % self.config.validation_every == 0 or step + 1 == self.config.steps):
                rows.append(self._validate())
            yield step + 1, rows

    def _train(self, step: int) -> dict[str, float]:
        config, timer = self.config, Timer()
        with timer("data"):
            everyone = windows_for(step, 0, 1, config.batch_size, len(self.windows), config.seed)
            mine = windows_for(step, self.rank, self.world, config.batch_size, len(self.windows), config.seed)
            num_loss_tokens = int(self.windows.num_loss_tokens[everyone].sum())
            micro_batches = Batch.of(self.windows.take(mine), self.engine.device).split(self.rows_per_micro_batch)
        with timer("learn"):
            self.model.train()
            update = self.engine.update(micro_batches, lambda model, batch: self.stage.loss(model, batch, num_loss_tokens))
        if not update.applied:
            refused = self.ready.directory / "non_finite"
            if self.rank == 0:
                save_batch(refused, step + 1, {"windows": everyone, **asdict(self.windows.take(everyone))}, {"step": str(step + 1)})
            raise FloatingPointError(
                f"step {step + 1}: a loss or gradient is not finite and no update was applied; the batch is in {batch_path(refused, step + 1)}; lower optimizer.lr, or look at the data"
            )
        num_tokens = int(self.windows.num_tokens[everyone].sum())
        self.num_tokens_seen += num_tokens
        seconds = sum(timer.seconds.values())
        return {
            "train/epoch": (step + 1) * config.batch_size / len(self.windows),
            **{f"train/{name}": value for name, value in self.stage.metrics(update.stats).items()},
            "train/lr": update.lr,
            "train/grad_norm": update.grad_norm,
            "train/num_tokens_seen": self.num_tokens_seen,
            **self.rates.step(step + 1, seconds, num_tokens, int(self.windows.num_examples[everyone].sum()), self._flops(everyone)),
            "time/step_s": seconds,
            **timer.metrics(),
        }

    def _validate(self) -> dict[str, float]:
        """Loss of all validation windows; every rank makes as many forwards, if need be of windows that count for nothing."""
        self.model.eval()
        num_loss_tokens = int(self.validation.num_loss_tokens.sum())
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
                _, parts = self.stage.loss(self.engine.engine, batch, num_loss_tokens)
            stats = {name: stats.get(name, torch.zeros((), device=self.engine.device)) + part for name, part in parts.items()}
        return {f"validation/{name}": value for name, value in self.stage.metrics(all_reduce_sum(stats)).items()}

    def _flops(self, rows: np.ndarray) -> float:
        """Useful FLOPs of a step: forward and backward, the backward pass twice the forward."""
        windows = self.windows
        linear = linear_flops(self.shape, int(windows.num_tokens[rows].sum()))
        attention = attention_flops(self.shape, int(windows.num_pairs[rows].sum()))
        return 3 * (linear + attention + head_flops(self.shape, self.model.config.vocab_size, int(windows.num_loss_tokens[rows].sum())))

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
        return step % self.config.checkpoint.every == 0 or step == self.config.steps

    def restore(self) -> int:
        """Go on from the newest checkpoint; returns its step, 0 when there is none."""
        found = [self.ready.checkpoints.latest() if self.rank == 0 else None]
        dist.broadcast_object_list(found)
        if found[0] is None:
            return 0
        self.engine.load(found[0] / "engine")
        self.num_tokens_seen = self.ready.checkpoints.load_state(found[0])["num_tokens_seen"]
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
            checkpoints.save_state(begun[0], {"step": step, "num_tokens_seen": self.num_tokens_seen})
            write_resolved(self.config, begun[0])
            checkpoints.commit(step)
        dist.barrier()

    def export(self) -> None:
        """Write the Hugging Face directory, whole or not at all. Collective."""
        weights = {name: tensor.cpu().clone() for name, tensor in self.engine.named_weights(self.model) if self.rank == 0}
        if self.rank == 0:
            final, partial = self.ready.directory / "model", self.ready.directory / ".model.partial"
            for directory in (partial, final):
                shutil.rmtree(directory, ignore_errors=True)
            export(self.model, self.tokenizer, partial, weights)
            partial.rename(final)
        dist.barrier()
