"""What a run says about itself: metrics.jsonl, samples.jsonl, the console line, W&B, TensorBoard; timers and rates.

    with Tracker(config.stage_dir("ppo"), "ppo", resolved(config), config.logging, config.steps) as tracker:
        timer = Timer()
        with timer("rollout"):
            ...
        tracker.log(step, {"train/reward": reward, **timer.metrics(), **rates.step(...)})

metrics.jsonl is the source of truth: every row, written at once, floats to the last bit. One row is one `log`; a step
may have several (its training row, then its evaluation). The driver owns the tracker; no other process writes.

With `logging.batches` the tensors that a step was made of are kept as well; tests/recompute.py recomputes rows from them.
"""

import errno
import json
import math
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from io import FileIO
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from minigpt_ray.checkpoint import CheckpointError, batch_path, save_batch
from minigpt_ray.config import LoggingConfig
from minigpt_ray.data.records import DataError
from minigpt_ray.status import Status
from minigpt_ray.timeline import Mark, Span, Timeline

Row = Mapping[str, int | float]
"""Metrics by name."""


class NotWritten(CheckpointError):
    """A file of a run could not be written, which ends a job as a checkpoint does that could not be: one sentence with the reason, the place and the remedy."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file an error of writing is about; raises NotWritten."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # the latter has no number
        number, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (errno.EIO, str(error))
        raise NotWritten(number, f"{reason} while writing {path}; checkpoints are untouched: make room, and go on with checkpoint.resume=auto") from error


# ------------------------------------------------------------------------------------------------ time and rates


@dataclass
class Timer:
    """Wall-clock seconds of the phases of one step.

    A phase entered twice adds up. A phase inside another is called `outer/inner`, and its time is also the outer's: the
    names without a slash add up to the step.
    """

    entered: Callable[[str], object] = lambda phase: None
    """Told the name of the phase that is entered, then of the one that it goes back to, empty for none."""
    seconds: dict[str, float] = field(default_factory=dict)
    _open: list[str] = field(default_factory=list)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._open.append(phase)
        name, start = "/".join(self._open), time.perf_counter()
        self.entered(name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._open.pop()
            self.entered("/".join(self._open))

    def metrics(self) -> dict[str, float]:
        return {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}


@dataclass
class Rates:
    """Speed of a run: of the last step, and as `..._avg` of all steps since this process began."""

    last_step: int
    """Where the run ends."""
    peak_flops: int | float
    """FLOP/s that all devices used could do together; set anew when they become more or fewer."""
    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    samples: int = 0
    flops: float = 0.0
    possible: float = 0.0
    """FLOPs that the devices could have done."""

    def step(self, step: int, seconds: float, tokens: int, samples: int, flops: int | float) -> dict[str, float]:
        """Rates after `step`, which took `seconds` for `tokens` tokens, `samples` samples and `flops` useful FLOPs.

        mfu_percent = 100 flops / (seconds x peak_flops). The time left, in minutes, goes by the average.
        """
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens
        self.samples += samples
        self.flops += flops
        self.possible += seconds * self.peak_flops
        now = self._rates(1, seconds, tokens, samples, flops / (seconds * self.peak_flops))
        average = self._rates(self.steps, self.seconds, self.tokens, self.samples, self.flops / self.possible)
        left = (self.last_step - step) * self.seconds / self.steps / 60
        return now | {f"{name}_avg": value for name, value in average.items()} | {"train/eta_minutes": left, "system/epoch_time": left}

    def _rates(self, steps: int, seconds: float, tokens: int, samples: int, used: float) -> dict[str, float]:
        return {
            "train/tokens_per_second": tokens / seconds,
            "train/samples_per_second": samples / seconds,
            "train/steps_per_second": steps / seconds,
            "train/mfu_percent": 100 * used,
        }


# -------------------------------------------------------------------------------------------------- console line

# What the console line shows of a training row, in this order; what a stage does not have is left out.
CONSOLE = (
    ("actor_loss", "train/actor_loss", "{:.4f}"),
    ("critic_loss", "train/critic_loss", "{:.4f}"),
    ("loss", "train/loss", "{:.4f}"),
    ("accuracy", "train/accuracy", "{:.4f}"),
    ("margin", "train/margin", "{:.4f}"),
    ("reward", "train/reward", "{:.4f}"),
    ("kl", "train/kl", "{:.4f}"),
    ("lr", "train/lr", "{:.3g}"),
    ("grad_norm_actor", "train/actor_grad_norm", "{:.4f}"),
    ("grad_norm", "train/grad_norm", "{:.4f}"),
    ("tokens/s", "train/tokens_per_second", "{:.0f}"),
    ("MFU", "train/mfu_percent", "{:.2f}%"),
    ("epoch_Time", "system/epoch_time", "{:.0f}min"),
)


def console_line(step: int, total_steps: int, epochs: int, metrics: Row) -> str:
    """`Epoch:[1/1](100/500) actor_loss:0.2346 ...` for a training row, `Eval(100/500) accuracy:0.5310 ...` for another."""
    place = f"({step}/{total_steps})"
    if "train/epoch" in metrics:
        epoch = max(1, math.ceil(metrics["train/epoch"]))
        parts = [
            f"{label}:{form.format(metrics[name])}"
            for label, name, form in CONSOLE
            if name in metrics and not (name == "train/mfu_percent" and math.isnan(metrics[name]))
        ]
        return " ".join([f"Epoch:[{epoch}/{max(epoch, epochs)}]{place}", *parts])
    groups = {name.partition("/")[0] for name in metrics}
    parts = [f"{name.partition('/')[2] if len(groups) == 1 else name}:{value:.4f}" for name, value in metrics.items()]
    return " ".join([f"{groups.pop().capitalize() if len(groups) == 1 else 'Metrics'}{place}", *parts])


# ------------------------------------------------------------------------------------------------------- JSONL


def read_metrics(path: Path) -> list[dict[str, int | float]]:
    """Rows of a metrics.jsonl in their order, null as nan; a last line that was being written is left out."""
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in _rows(path)]


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Rows of a samples.jsonl in their order."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is empty, or a row cut short
        try:
            yield json.loads(line)
        except ValueError:
            raise DataError(f"{path}, line {number}: not a JSON row, and not the last line, so no interrupted write; repair or remove the file") from None


def _cut_back(path: Path, step: int) -> None:
    """Keep the rows up to `step`."""
    if not path.exists():
        return
    kept = [row for row in _rows(path) if row["step"] <= step]
    part = path.with_name(f".{path.name}.partial")
    with writing(path), part.open("w", encoding="utf-8") as file:
        file.writelines(_line(row) for row in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _line(row: Mapping[str, Any]) -> str:
    """One JSON line. A number that is not finite becomes null: JSON has no nan, and a run does not end because of one."""
    return json.dumps({name: _plain(value) for name, value in row.items()}, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------- W&B, TensorBoard


@runtime_checkable
class Sink(Protocol):
    """Where metrics go besides metrics.jsonl."""

    def log(self, step: int, metrics: Row) -> None: ...

    def close(self, failed: bool) -> None: ...


class _WandB:
    """One W&B run for a stage, found again by the id in `directory`.

    A history cannot be cut back there: after a rewind the repeated steps are appended, and since the step axis is
    train/global_step, they are drawn over the old ones.
    """

    def __init__(self, directory: Path, stage: str, config: dict[str, Any], logging: LoggingConfig, resumed: bool) -> None:
        import wandb  # only here: it starts a service process

        name = directory.parent.name
        self.run = wandb.init(
            project=logging.wandb_project,
            name=f"{name}/{stage}",
            group=name,
            job_type=stage,
            id=_run_id(directory / "wandb_id", resumed),
            resume="allow",
            mode=logging.wandb if logging.wandb != "disabled" else None,
            dir=directory,
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
        self.run.define_metric("train/global_step", hidden=True)
        self.run.define_metric("*", step_metric="train/global_step")

    def log(self, step: int, metrics: Row) -> None:
        self.run.log(dict(metrics))

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


def _run_id(path: Path, resumed: bool) -> str:
    """The id of the W&B run: the stored one when the stage goes on, else a new one."""
    if not (resumed and path.exists()):
        path.write_text(secrets.token_hex(8))
    return path.read_text()


class _TensorBoard:
    """Event files in `directory`/tensorboard."""

    def __init__(self, directory: Path, resume_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ModuleNotFoundError(
                "logging.tensorboard=true needs the package tensorboard, which is not installed; pip install tensorboard, or set logging.tensorboard=false"
            ) from None
        self.writer = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1 if resume_step else None)

    def log(self, step: int, metrics: Row) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self.writer.close()


def prometheus_name(metric: str) -> str:
    """`train/kl_ref` -> `minigpt_train_kl_ref`, since Prometheus allows letters, digits and underscores; Ray puts `ray_` before it."""
    return "minigpt_" + re.sub(r"\W", "_", metric, flags=re.ASCII)


# ----------------------------------------------------------------------------------------------------- tracker


class Tracker:
    """Writes the metrics and samples of one stage of a run; a context manager."""

    def __init__(
        self,
        directory: Path,
        stage: str,
        config: dict[str, Any],
        logging: LoggingConfig,
        total_steps: int,
        resume_step: int = 0,
        *,
        epochs: int = 1,
        sinks: Sequence[Sink] = (),
        console: Console | None = None,
    ) -> None:
        """Open the files of `directory`.

        With resume_step > 0 they go on, cut back to rows with step <= resume_step. Else they begin anew, and those of an
        earlier run are kept beside them as *.previous.jsonl. `epochs` is how many passes over the data `total_steps` are.
        Metrics go to `sinks` as well.
        """
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.total_steps, self.epochs, self.every, self.batches = directory, total_steps, epochs, logging.every, logging.batches
        self.step = resume_step
        for path in (self.metrics_path, self.samples_path):
            if resume_step:
                _cut_back(path, resume_step)
            elif path.exists() and path.stat().st_size:
                path.replace(path.with_suffix(".previous.jsonl"))
        self._open()
        self.status = Status(directory, stage, resume_step, total_steps)
        with writing(directory / "timeline.json"):
            self.timeline = Timeline(directory / "timeline.json", resumed=resume_step > 0) if logging.timeline else None
        self._phase = ("", 0.0)
        self._sinks: list[Sink] = list(sinks)
        if logging.wandb != "disabled":
            self._sinks.append(_WandB(directory, stage, config, logging, resumed=resume_step > 0))
        if logging.tensorboard:
            self._sinks.append(_TensorBoard(directory, resume_step))
        self.console = Console(soft_wrap=True) if console is None else console
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self.console.is_terminal:
            columns = (TextColumn(stage), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("<"), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.console)
            self._task = self._bar.add_task(stage, total=total_steps, completed=resume_step)

    @property
    def metrics_path(self) -> Path:
        return self.directory / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        return self.directory / "samples.jsonl"

    def __enter__(self) -> "Tracker":
        self.status.__enter__()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for sink in self._sinks:
            sink.close(failed=kind is not None and not issubclass(kind, SystemExit))
        self._metrics.close()
        self._samples.close()
        self.status.__exit__(kind, error, trace)

    def phase(self, name: str) -> None:
        """The driver enters a phase; with an empty name it is between two."""
        before, since = self._phase
        self._phase = (name, time.time())
        self.status.phase(name or "between two phases")
        if before:
            self.events("driver", [Span(0, before, since, time.time())])

    def events(self, role: str, spans: Iterable[Span] = (), marks: Iterable[Mark] = ()) -> None:
        """What a role did in the step that is under way, for timeline.json."""
        if self.timeline is not None:
            with writing(self.timeline.path):
                self.timeline.add(role, spans, marks, self.step + 1)

    def log(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
        """Append one row, `{"step", "train/global_step", **metrics}`, and pass it on; a non-finite value is written as null."""
        row = {name: int(value) if isinstance(value, Integral) else float(value) for name, value in metrics.items()}
        _append(self._metrics, [{"step": step, "train/global_step": step} | row])
        for sink in self._sinks:
            sink.log(step, {"train/global_step": step} | row)
        self._progress(step)
        training = "train/epoch" in metrics
        if not training or step % self.every == 0 or step in (1, self.total_steps):
            self.message(console_line(step, self.total_steps, self.epochs, row))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows to samples.jsonl, each with its step."""
        _append(self._samples, [{"step": step} | dict(row) for row in rows])

    def batch(self, step: int, **values: Any) -> None:
        """Write the tensors and numbers in `values` to batches/, by dotted names; those of the newest `logging.batches` steps stay."""
        if self.batches:
            with writing(batch_path(self.directory / "batches", step)):
                save_batch(self.directory / "batches", step, dict(_arrays("", values)), {}, keep=self.batches)

    def sync(self) -> None:
        """Have the disk hold all rows, before a checkpoint says that their steps were taken."""
        for path in (self.metrics_path, self.samples_path, self.directory):
            handle = os.open(path, os.O_RDONLY)
            try:
                with writing(path):
                    os.fsync(handle)
            finally:
                os.close(handle)

    def rewind(self, step: int) -> None:
        """Forget the rows after `step`, since these steps will be taken again."""
        self._metrics.close()
        self._samples.close()
        _cut_back(self.metrics_path, step)
        _cut_back(self.samples_path, step)
        self._open()
        self._progress(step)

    def message(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _open(self) -> None:
        with writing(self.directory):
            self._metrics, self._samples = (
                FileIO(self.metrics_path, "a"),
                FileIO(self.samples_path, "a"),
            )  # no buffer, whose rest a full disk would refuse again at the end

    def _progress(self, step: int) -> None:
        self.step = step
        self.status.progress(step)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)


def _append(file: FileIO, rows: list[dict[str, Any]]) -> None:
    lines = "".join(_line(row) for row in rows).encode()
    with writing(Path(os.fsdecode(file.name))):
        while lines:  # a disk that is nearly full takes a part
            lines = lines[file.write(lines) :]


def _arrays(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Tensors and numbers below a dataclass or mapping, as arrays: `scores.rewards.total`."""
    parts = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else value
    if not isinstance(parts, Mapping):
        yield place, np.asarray(value)
        return
    for name, part in parts.items():
        yield from _arrays(f"{place}.{name}" if place else name, part)
