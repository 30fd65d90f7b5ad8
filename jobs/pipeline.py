"""The whole life of a model: several stages of one run, each in a process of its own, so that its memory comes back.

    python -m jobs.pipeline configs/demo/pipeline.yaml                  everything that is not complete
    python -m jobs.pipeline configs/demo/pipeline.yaml only=[ppo,evaluate]

Every stage's configuration is read before the first one starts. What was completed with the same configuration is skipped, unless
a stage before it ran now; what was interrupted goes on, since a stage whose files and overrides say nothing of checkpoint.resume
gets checkpoint.resume=auto. The first stage that fails ends the pipeline with its code. Keeps <run_dir>/pipeline.json.
"""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.lineage import die_with_parent
from minigpt_ray.cli import ConfigError, given, is_mix, load_config, one_sentence, read_config, to_yaml
from minigpt_ray.config import JobConfig, MixConfig, PipelineConfig, PPOConfig, SupervisedConfig
from minigpt_ray.config.pipeline import STAGE_CONFIGS

RECORD = "pipeline.json"


@dataclass(frozen=True)
class Planned:
    """A stage with its command line."""

    name: str
    arguments: tuple[str, ...]
    digest: str
    """Of its resolved configuration."""
    goes_on: bool
    """Whether, started again, it goes on from where it stopped."""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", f"jobs.{self.name}", *self.arguments]


def run(config: PipelineConfig) -> None:
    """Run the stages; exits with the code of the first that fails."""
    from rich.console import Console

    from minigpt_ray.checkpoint import write_json_atomic
    from minigpt_ray.course import course_table

    with one_sentence():
        stages = plan(config)
    console = Console()
    record: dict[str, Any] = json.loads(path.read_text()) if (path := config.run_dir / RECORD).exists() else {}
    fates: dict[str, str] = {}
    for number, stage in enumerate(stages, start=1):
        if not any(fate == "ran" for fate in fates.values()) and record.get(stage.name, {}).get("digest") == stage.digest:
            fates[stage.name] = "complete before"
            continue
        console.rule(f"{stage.name} ({number} of {len(stages)})", align="left")
        for later in stages[number - 1 :]:  # which begin from what this one writes
            record.pop(later.name, None)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, record)
        start = time.monotonic()
        code = call(stage.command)
        if code:
            left = [later.name for later in stages[number:]]
            then = f"; not begun: {', '.join(left)}" if left else ""
            mended = "once that is mended, " if code == 2 else ""  # a refusal, which would come again
            first = "" if stage.goes_on else f"with checkpoint.resume=auto in stages.{stage.name} "
            print(f"{stage.name} ended with code {code}{then}; {mended}{first}the same command goes on from here", file=sys.stderr)
            raise SystemExit(code)
        fates[stage.name] = "ran"
        record[stage.name] = {"digest": stage.digest, "seconds": round(time.monotonic() - start, 1)}
        write_json_atomic(path, record)
    console.print(course_table(config.run_dir, fates, {name: done["seconds"] for name, done in record.items()}))


def plan(config: PipelineConfig) -> list[Planned]:
    """The stages that are asked for. Raises ConfigError, which names the stage, when one's configuration cannot be read."""
    shared = (f"run={config.run}", f"output_dir={config.output_dir}", f"seed={config.seed}")
    stages = []
    for name, stage in config.stages.items():
        if config.only and name not in config.only:
            continue
        arguments = [*map(str, stage.files), *stage.overrides, *shared]
        try:
            root: type[JobConfig] = MixConfig if name == "prepare_data" and is_mix(arguments) else STAGE_CONFIGS[name]
            if issubclass(root, PPOConfig | SupervisedConfig) and ("checkpoint", "resume") not in given(arguments):
                arguments.append("checkpoint.resume=auto")
            resolved = read_config(root, arguments)
        except ConfigError as error:
            raise ConfigError("\n".join(f"stages.{name}: {line}" for line in str(error).splitlines())) from None
        goes_on = not isinstance(resolved, PPOConfig | SupervisedConfig) or resolved.checkpoint.resume == "auto"
        stages.append(Planned(name, tuple(arguments), hashlib.sha256(to_yaml(resolved).encode()).hexdigest(), goes_on))
    return stages


def call(command: list[str]) -> int:
    """Run a stage, which dies with this process, to its end and return its code, 128 + n when signal n ended it; SIGTERM is passed on, and ends this one too."""
    process = subprocess.Popen(command, preexec_fn=die_with_parent)
    with passing_on(process) as asked:
        code = process.wait()
    code = code if code >= 0 else 128 - code
    if asked:
        raise SystemExit(code)
    return code


@contextmanager
def passing_on(process: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """SIGTERM goes to the stage, which saves and ends; so does Ctrl-C, which a terminal sends to both. Gives the list of the SIGTERMs that came."""
    asked: list[int] = []

    def terminate(number: int, frame: object) -> None:
        asked.append(number)
        process.send_signal(signal.SIGTERM)

    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, terminate), signal.SIGINT: signal.signal(signal.SIGINT, lambda number, frame: None)}
    try:
        yield asked
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run(load_config(PipelineConfig))
