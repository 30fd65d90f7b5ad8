"""The driver of a supervised stage, the same for all of them: Ray Train with N workers (actors/supervised_rank.py).

    ready = prepare(config)     # actors/stage_inputs.py: bad input is refused before any process starts
    fit(ready)                  # in the driver: trains, writes checkpoints and <run_dir>/<stage>/model

The driver owns the tracker: rank 0 sends it rows through a Mailbox, since Ray Train leaves the driver nothing to do but
wait. Checkpoints are this project's own, so Ray Train's directory is a fresh one every time: under an old name it would
silently resume.
"""

import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

from actors.dataset import Sources, left_out, prepare_windows
from actors.group import RoleLost
from actors.mailbox import Begun, Logged, Mailbox, Saving, Started, Stopped, work
from actors.parent import driver_restarts, got_further
from actors.placement import connect, environment, environment_of
from actors.preflight import PlacementError, preflight
from actors.prometheus import sinks
from actors.rank_host import Disconnected
from actors.stage_inputs import Ready, StageError
from actors.supervised_rank import num_steps
from actors.watchdog import START_SECONDS, Whereabouts, collective_timeout, end_hung_processes
from minigpt_ray.checkpoint import write_json_atomic
from minigpt_ray.cli import resolved, write_resolved
from minigpt_ray.config import ExamplesConfig
from minigpt_ray.data.prepared import provenance
from minigpt_ray.data.records import DataError
from minigpt_ray.model_directory import ExportError
from minigpt_ray.object_store import deliver
from minigpt_ray.stages import STAGES, Stage
from minigpt_ray.status import refuse_another
from minigpt_ray.tokenizer import TokenizerError, load_tokenizer
from minigpt_ray.tracking import Tracker, writing

SENTENCES = (DataError, ExportError, PlacementError, StageError, TokenizerError)
"""What `fit` refuses, or ends a run with, and says in a sentence why."""

DEATHS = (RayActorError, WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError)
"""What Ray Train reports of a worker that died, or does not answer it. It may not have noticed it yet when those that waited for it have failed: Disconnected."""

KEEP_FREED_MEMORY = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(256 << 20)}
"""glibc's malloc keeps what a step frees for the next one. Ray Train computes in a thread, where malloc by itself gives it back to the kernel and
takes it again, page by page, after every operation. 32 MiB is the largest block that it can keep."""

SAMPLE = 4096
"""Windows that a baseline is computed from."""


def fit(ready: Ready) -> Path:
    """Train as configured; returns the directory of the model.

    Raises SENTENCES, StageError among them when a loss is not finite or a disk is full, and RoleLost when workers died too often.
    """
    config, stage = ready.config, STAGES[ready.config.stage]
    own = connect(None, config.workers.ranks * config.workers.cpus)
    preflight({stage.name: config.workers}, wait_seconds=config.wait_seconds, own=own, section="")
    tokenizer = load_tokenizer(ready.tokenizer)
    stored = {name: prepare_windows(stage, config, files, tokenizer, ready.directory / "windows") for name, files in ready.sources.items()}
    windows, validation = Sources.load(stored, "train"), Sources.load(stored, "validation")
    for name, size in zip(stored, windows.sizes, strict=True):
        if not size:
            raise StageError(
                f"{'mix.' + name if name else 'files'}: no document or answer can be learnt from, since all are too short or too long; give other data or remove the source"
            )
    steps = num_steps(config, windows)
    baseline = _baseline(stage, windows, validation)
    refuse_another(ready.directory)  # which may have begun meanwhile
    with writing(ready.directory / "config.yaml"):
        write_resolved(config, ready.directory)
        if not ready.start:
            ready.inputs.keep(ready.directory)
    epochs = -(-steps * config.batch_size // len(windows))
    exported = sinks(config.logging, config.run, stage.name)
    mailbox: Any = ray.remote(Mailbox).options(num_cpus=0, runtime_env=environment(1)).remote()  # type: ignore[call-overload]
    tracker = Tracker(ready.directory, stage.name, resolved(config), config.logging, steps, ready.start, epochs=epochs, sinks=exported)
    begun = threading.Event()
    with tracker, _asking_at_sigterm(mailbox, begun):
        beginning = f"goes on after step {ready.start}" if ready.start else "starts"
        tracker.message(
            f"{stage.name} {beginning}: {len(windows):,} windows of {config.window} tokens, {config.batch_size} a step, {config.num_workers} workers"
        )
        if isinstance(config, ExamplesConfig) and config.too_long == "drop":
            tracker.message(f"too_long=drop: {left_out(stored, windows, validation):,} rows of more than {config.window} tokens left out")
        tracker.message(f"data: {provenance(path for files in ready.sources.values() for path in files.paths)}")
        if baseline and not ready.start:
            tracker.log(0, baseline)
        with ThreadPoolExecutor(1) as threads:
            delivery = threads.submit(_deliver, mailbox, tracker, ready.directory, config.hang_after_s, begun)
            try:
                _train(ready, stored, mailbox)
            finally:
                mailbox.put.remote(Stopped(""))  # else a failure would leave the delivery waiting
                stopped = delivery.result()  # whose own failure, as of a full disk, is the reason of the workers'
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


@contextmanager
def _asking_at_sigterm(mailbox: Any, begun: threading.Event) -> Iterator[None]:
    """At SIGTERM the workers are asked to end; those that have taken their last step write the model, which is delivered as ever.

    Until they have `begun` there is nothing to save, and it ends this process as before.
    """

    def ask(number: int, frame: Any) -> None:
        if begun.is_set():
            mailbox.ask_to_end.remote()
        elif callable(handler):
            mailbox.put.remote(Stopped(""))  # else the thread of the delivery would wait, wherever this one is
            handler(number, frame)

    handler = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is ask:  # else this process is about to end, and another one changes nothing
            signal.signal(signal.SIGTERM, handler)


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


def _train(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> None:
    """Raises RoleLost when workers died too often, at work or while they were started: the reason lies with a machine, and another driver goes on."""
    try:
        _trainer(ready, stored, mailbox).fit()
    except WorkerGroupError as error:
        failures = error.worker_failures.values()
        if any(isinstance(failure, DEATHS) for failure in failures) or all(isinstance(failure, Disconnected) for failure in failures):
            raise RoleLost(f"{ready.config.stage}'s workers") from error
        raise
    except ControllerError as error:
        if isinstance(error.controller_failure, RayActorError):
            raise RoleLost(f"{ready.config.stage}'s workers") from error
        raise


def _trainer(ready: Ready, stored: Mapping[str, Path], mailbox: Any) -> TorchTrainer:
    config = ready.config
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less; this loop would not listen to it
    return _Trainer(
        work,
        train_loop_config={"ready_and_stored": pickle.dumps((ready, stored)), "mailbox": mailbox},
        torch_config=TorchConfig(timeout_s=int(collective_timeout(config.hang_after_s).total_seconds())),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]  # mypy reads the older API
            num_workers=config.num_workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": config.cpus_per_worker,
                **({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
                **config.resources_per_worker,
            },
            label_selector=config.labels_per_worker or None,
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=f"{time.time_ns():x}",
            storage_path=str(ready.directory / "ray_train"),
            failure_config=FailureConfig(max_failures=config.worker_restarts),
            worker_runtime_env={"env_vars": KEEP_FREED_MEMORY | environment_of(config.cpus_per_worker, config.gpus_per_worker)["env_vars"]},
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _deliver(mailbox: Any, tracker: Tracker, directory: Path, hang_after_s: float, has_begun: threading.Event) -> Stopped:
    """Pass messages on to the tracker until there are no more, and keep processes.json of the stage's directory. When that fails, the mailbox goes, and with it the workers.

    When there is none for `hang_after_s`, while workers start at least for START_SECONDS, they hang and are ended.
    """
    done = begun = 0
    saved = False
    workers: dict[str, Whereabouts] = {}
    processes: dict[int, dict[str, Any]] = {}
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
                    processes[message.process["rank"]] = message.process
                    with writing(directory / "processes.json"):
                        write_json_atomic(
                            directory / "processes.json", {"driver": os.getpid(), "roles": {"workers": [processes[rank] for rank in sorted(processes)]}}
                        )
                if isinstance(message, Stopped):
                    return message
                if isinstance(message, Logged):
                    for row in message.rows:
                        tracker.log(message.step, row | ({"restarts/driver": driver_restarts(), "restarts/workers": begun - 1} if "train/epoch" in row else {}))
                elif isinstance(message, Saving):
                    tracker.sync()
                    if saved:  # the one before is complete
                        got_further()
                    saved = True
                elif isinstance(message, Begun):
                    begun, patience = begun + 1, hang_after_s
                    has_begun.set()
                    if begun > 1:
                        tracker.message(f"workers were lost; new ones go on after step {message.step}")
                        tracker.rewind(message.step)
            done = len(messages)
    except BaseException:
        ray.kill(mailbox)
        raise
