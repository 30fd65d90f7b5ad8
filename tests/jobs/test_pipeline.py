"""python -m jobs.pipeline: what runs, what is skipped, where it ends, and what a signal does."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from jobs.pipeline import call, plan
from minigpt_ray.cli import ConfigError, read_config
from minigpt_ray.config import PipelineConfig, SFTConfig
from minigpt_ray.course import outcome

ROOT = Path(__file__).parents[2]
SMALL = "stages.prepare_data.overrides=[demonstrations=30,prompts=40,held_out=10]"


def pipeline(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.pipeline", "configs/debug/pipeline.yaml", f"output_dir={home}", "run=r", SMALL, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"})


def config(*arguments: str) -> PipelineConfig:
    return read_config(PipelineConfig, [str(ROOT / "configs/debug/pipeline.yaml"), *arguments])


def test_what_is_complete_is_skipped_until_its_configuration_changes(tmp_path: Path) -> None:
    first, second = (pipeline(tmp_path, "only=[prepare_data]") for _ in range(2))
    assert first.returncode == 0 and second.returncode == 0, first.stderr + second.stderr
    assert "prepare_data │ ran" in first.stdout and "30 demonstrations, 40 prompts, 10 held_out" in first.stdout
    assert "prepare_data │ complete before" in second.stdout and "(1 of 1)" not in second.stdout
    third = pipeline(tmp_path, "only=[prepare_data]", "stages.prepare_data.overrides=[demonstrations=31,prompts=40,held_out=10]")
    assert third.returncode == 2
    assert "demonstrations: 30 then, 31 now" in third.stderr and third.stderr.endswith(
        "prepare_data ended with code 2; once that is mended, the same command goes on from here\n"
    )


def test_the_first_stage_that_fails_ends_it_with_its_own_sentence_and_code(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "pipeline.json").write_text(json.dumps({"ppo": {"digest": "of what began from an earlier SFT", "seconds": 1.0}}))
    done = pipeline(tmp_path, "stages.sft.overrides=['files=[missing.jsonl]']")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    sentence, last = done.stderr.splitlines()
    assert "no data file" in sentence and "missing.jsonl" in sentence
    assert last == "sft ended with code 2; not begun: ppo, evaluate; once that is mended, the same command goes on from here"
    assert json.loads((tmp_path / "r" / "pipeline.json").read_text()).keys() == {"prepare_data"}


def test_a_mistake_in_a_later_stage_is_refused_before_the_first_begins(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "stages.ppo.overrides=[prompts_per_step=7]")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("stages.ppo: ") and "prompts_per_step=7" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_stage_gets_the_pipelines_run_directory_and_seed() -> None:
    (stage,) = plan(config("only=[ppo]", "run=mine", "seed=3", "output_dir=/shared", "stages.ppo.overrides=[steps=9]"))
    assert stage.arguments[1:] == ("steps=9", "run=mine", "output_dir=/shared", "seed=3")
    assert stage.command[1:3] == ["-m", "jobs.ppo"]
    (other,) = plan(config("only=[ppo]", "run=mine", "seed=3", "output_dir=/shared", "stages.ppo.overrides=[steps=8]"))
    assert stage.digest != other.digest


@pytest.mark.parametrize(
    ("said", "resume", "goes_on"), [("steps=9", "auto", True), ("checkpoint.resume=never", "never", False), ("checkpoint={every: 3}", "auto", True)]
)
def test_a_stage_goes_on_where_it_stopped_unless_it_says_otherwise(said: str, resume: str, goes_on: bool) -> None:
    (stage,) = plan(config("only=[sft]", f"stages.sft={{overrides: ['{said}']}}"))
    assert read_config(SFTConfig, list(stage.arguments)).checkpoint.resume == resume
    assert stage.goes_on == goes_on


def test_a_stage_that_may_not_go_on_is_said_to_need_it(tmp_path: Path) -> None:
    done = pipeline(tmp_path, "only=[sft]", "stages.sft={overrides: [checkpoint.resume=never]}")
    assert done.returncode == 2
    assert done.stderr.endswith("sft ended with code 2; once that is mended, with checkpoint.resume=auto in stages.sft the same command goes on from here\n")


def test_the_data_may_be_a_mix_of_sources() -> None:
    mix = "stages.prepare_data={files: [%s]}" % (ROOT / "configs/data/posttrain/sft/maths.yaml")
    (stage,) = plan(config("only=[prepare_data]", mix))
    assert stage.arguments[0].endswith("maths.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stages.spelling={}", "stages.spelling is no stage; use some of prepare_data, "),
        ("only=[dpo,pretraining]", "which is not among the stages"),
        ("stages={}", "stages is empty"),
    ],
)
def test_what_is_no_stage_is_refused(override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        config(override)


@pytest.mark.parametrize(("answer", "code"), [("lambda *_: sys.exit(7)", 7), ("signal.SIG_DFL", 143)])
def test_sigterm_reaches_the_stage_and_ends_the_pipeline_with_its_code(tmp_path: Path, answer: str, code: int) -> None:
    begun = tmp_path / "begun"
    program = f"import signal, sys, time, pathlib\nsignal.signal(signal.SIGTERM, {answer})\npathlib.Path(sys.argv[1]).touch()\ntime.sleep(60)"

    def send() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=send).start()
    with pytest.raises(SystemExit) as ended:
        call([sys.executable, "-c", program, str(begun)])
    assert ended.value.code == code
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stage_that_a_signal_ends_has_the_code_that_a_shell_gives() -> None:
    assert call([sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"]) == 137


def test_a_stage_dies_with_the_pipeline() -> None:
    program = "import sys; from jobs.pipeline import call; call([sys.executable, '-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(60)'])"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        stage = psutil.Process(int(process.stdout.readline()))
        process.kill()
    _, alive = psutil.wait_procs([stage], timeout=10)
    assert not alive or stage.status() == psutil.STATUS_ZOMBIE


def test_the_outcome_of_a_stage_is_its_last_held_out_numbers(tmp_path: Path) -> None:
    rows = [{"step": 1, "validation/perplexity": 9.0}, {"step": 2, "train/loss": 1.0}, {"step": 2, "validation/perplexity": 3.0, "validation/accuracy": 0.875}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert outcome(tmp_path, {}) == "perplexity 3.00, accuracy 87.5% on held-out pairs"
    assert outcome(tmp_path, {"eval/accuracy": 0.25, "eval/sampled_accuracy": 0.2}).endswith("on held-out pairs, exact match 25.0%, sampled 20.0%")
    (tmp_path / "results.json").write_text(json.dumps({"sft": {"eval/accuracy": 0.5}, "ppo": {"eval/accuracy": 0.75}}))
    assert outcome(tmp_path, {}) == "sft 50.0%, ppo 75.0%"
    assert outcome(tmp_path / "none", {}) == ""
