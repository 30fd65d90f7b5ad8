"""The README is true: its commands run, its code works, its names exist; and the other documents name what exists."""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.scripts.scripts import cli as ray_cli

from minigpt_ray import presets, stages
from minigpt_ray.cli import read_config
from minigpt_ray.config import (
    DPOConfig,
    EvaluateConfig,
    JobConfig,
    MidtrainConfig,
    PPOConfig,
    PrepareConfig,
    PretrainConfig,
    RewardModelConfig,
    ServeRewardConfig,
    SFTConfig,
    SupervisedConfig,
)
from minigpt_ray.data.packing import pack_groups
from minigpt_ray.data.rows import Row, read_rows
from minigpt_ray.losses import language_model_loss
from minigpt_ray.reward_protocol import Sample
from minigpt_ray.rl import advantages
from minigpt_ray.rl.experience import Prompt, Rollout
from minigpt_ray.tokenizer import train_tokenizer
from minigpt_ray.tracking import console_line, read_metrics
from tests.test_metrics_doc import FIXED, documented

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "AGENTS.md", *(ROOT / "docs").glob("*.md")])
OLD_FLAGS = ["--data_config", "--from_weight", "--use_prepared", "--epochs", "--batch_size", "--learning_rate", "--device", "--use_wandb", "--wandb_project"]
SUPERVISED: dict[str, type[SupervisedConfig]] = {root.stage: root for root in (PretrainConfig, MidtrainConfig, SFTConfig, DPOConfig, RewardModelConfig)}
ROOTS: dict[str, type[JobConfig]] = {"prepare_data": PrepareConfig, **SUPERVISED, "ppo": PPOConfig, "evaluate": EvaluateConfig}


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Every command of the bash blocks as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def is_cheap(words: list[str]) -> bool:
    """Ends by itself in seconds, without Ray, and touches nothing."""
    return words[0] == "python" and ("--help" in words or "--dry-run" in words)


def is_of_the_chain(words: list[str]) -> bool:
    """One of the commands of the run called readme, in which one needs what those before it wrote."""
    return words[0] == "python" and ("run=readme" in words or any(word.startswith("outputs/readme") for word in words))


def is_check(words: list[str]) -> bool:
    return words[:4] == ["python", "-m", "jobs.prepare_data", "--check"]


def run(words: list[str], cwd: Path = ROOT) -> str:
    """Run a README command as it stands, with this interpreter; returns its output."""
    done = subprocess.run([sys.executable, *words[1:]], cwd=cwd, input="hello\n", capture_output=True, text=True)  # a line for the chat
    assert done.returncode == 0, f"{shlex.join(words)} ended with code {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# ------------------------------------------------------------------------------------------------------- commands


def test_every_command_is_of_a_kind_that_is_tested() -> None:
    unknown = [
        shlex.join(words)
        for words in commands()
        if not (is_cheap(words) or is_of_the_chain(words) or is_check(words) or words[0] in ("make", "ray", "vllm", "source", "export"))
    ]
    assert not unknown, f"add a test of its kind: {unknown}"


@pytest.mark.parametrize("words", [words for words in commands() if is_cheap(words)], ids=shlex.join)
def test_a_cheap_command_runs(words: list[str]) -> None:
    assert run(words)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "make"], ids=shlex.join)
def test_a_make_target_exists(words: list[str]) -> None:
    assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "ray"], ids=shlex.join)
def test_a_ray_command_exists_and_its_job_can_be_read(words: list[str]) -> None:
    options, job = words[1:], []
    if "--" in words:
        at = words.index("--")
        options, job = words[1:at], words[at + 1 :]
    command: Any = ray_cli
    while options and options[0] in getattr(command, "commands", {}):
        command = command.commands[options.pop(0)]
    assert command is not ray_cli
    known = {name for parameter in command.params for name in parameter.opts}
    assert not [option for option in options if option.startswith("--") and option not in known]
    if job:
        assert job[:2] == ["python", "-m"]
        read_config(ROOTS[job[2].removeprefix("jobs.")], [str(ROOT / word) if word.endswith(".yaml") else word for word in job[3:]])


@pytest.mark.slow
@pytest.mark.parametrize("words", [words for words in commands() if words[0] == "vllm"], ids=shlex.join)
def test_vllm_knows_the_options_that_it_is_given(words: list[str]) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    assert words[1] == "serve" and words[2].startswith("outputs/readme/")
    make_arg_parser(FlexibleArgumentParser()).parse_args(words[2:])


def test_check_reads_the_rows_that_the_readme_shows(tmp_path: Path) -> None:
    (tmp_path / "my_prompts.jsonl").write_text("".join(blocks("json")))
    (check,) = [words for words in commands() if is_check(words)]
    done = subprocess.run([sys.executable, *check[1:]], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "their answers can be verified; demonstrations for SFT" in done.stdout


@pytest.mark.ray
@pytest.mark.slow
def test_the_stages_of_the_readme_run_one_after_another(tmp_path: Path) -> None:
    chain = [words for words in commands() if is_of_the_chain(words)]
    assert [words[2].removeprefix("jobs.") for words in chain] == ["prepare_data", "sft", "ppo", "evaluate", "report", "chat"]
    for words in chain:
        if "run=readme" in words:
            run([*words, f"output_dir={tmp_path}"])
        else:
            run([word.replace("outputs/readme", f"{tmp_path}/readme") for word in words])
    written = tmp_path / "readme"
    (layout,) = [block for block in blocks("text") if block.startswith("outputs/readme/")]
    for line in layout.splitlines()[1:-1]:
        stage, *entries = line.split()
        for entry in entries:
            assert (written / stage / entry).exists(), f"{stage}{entry} is missing"
    assert (written / "report.html").is_file()
    rows = [row for row in read_metrics(written / "ppo" / "metrics.jsonl") if "train/epoch" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert set(FIXED) <= rows[-1].keys()
    assert not [name for name in rows[-1] if name != "step" and not documented(name)]
    assert json.loads((written / "evaluate" / "results.json").read_text()).keys() == {"sft", "ppo"}


# ----------------------------------------------------------------------------------------------------------- code


def code(start: str) -> str:
    """The Python block that contains a definition."""
    (found,) = [block for block in blocks("python") if start in block]
    return found


def execute(source: str, module: Any) -> dict[str, Any]:
    """What the block defines, as if it stood in the module."""
    names = dict(vars(module))
    exec(compile(source, "README.md", "exec"), names)
    return names


def rollout(num_tokens: int) -> Rollout:
    prompt = Prompt(0, ({"role": "user", "content": "?"},), np.zeros(1, np.int32), "test", None)
    ids = np.zeros(num_tokens, np.int32)
    return Rollout(prompt, 0, ids, np.ones(num_tokens, bool), np.zeros(num_tokens, np.float32), ids, "", "stop")


def test_every_python_block_parses_and_is_tested() -> None:
    assert len(blocks("python")) == 5
    for block in blocks("python"):
        ast.parse(block if "ModelShape" not in block else f"{{{block}}}")


def test_the_reward_function_scores_each_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.reward_process import load_function

    (tmp_path / "my_rewards.py").write_text(code("def short("))
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = [words for words in commands() if any("my_rewards" in word for word in words)]
    source = read_config(PPOConfig, [str(ROOT / word) if word.endswith(".yaml") else word for word in command[3:-1]]).rewards["short"]
    assert load_function("short", source.function)([rollout(0), rollout(32), rollout(128)]) == [1.0, 0.5, 0.0]


def test_the_served_function_scores_each_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.reward_server import load_scorer

    (tmp_path / "my_server.py").write_text(code("def short_text"))
    monkeypatch.syspath_prepend(str(tmp_path))
    (command,) = [words for words in commands() if "jobs.serve_reward" in words]
    samples = [Sample(prompt=[], response="x" * size, answer=None, source="") for size in (0, 32, 128)]
    assert load_scorer(read_config(ServeRewardConfig, command[3:-1]))(samples) == [1.0, 0.5, 0.0]


def test_the_estimator_is_grpo_undivided_with_the_batch_as_its_group() -> None:
    estimators = dict(advantages.ESTIMATORS)
    try:
        reinforce = execute(code("def reinforce"), advantages)["reinforce"]
    finally:
        advantages.ESTIMATORS.clear()
        advantages.ESTIMATORS.update(estimators)
    generator = torch.Generator().manual_seed(0)
    rewards, mask = torch.randn(4, 9, generator=generator), torch.rand(4, 9, generator=generator) < 0.7
    mask[2] = False
    no, group = torch.zeros(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int32)
    inputs = advantages.EstimatorInputs(rewards, torch.zeros(4, 10), mask, group + 9, no, group, 1.0, 0.95, divide_by_group_std=False)
    torch.testing.assert_close(reinforce(inputs), advantages.grpo(inputs))


def test_the_recipes_are_configurations() -> None:
    recipes = [re.findall(r"`([^`]+=[^`]+)`", row[1]) for row in table("| | `algorithm.` |")]
    assert len(recipes) == 7
    for alternatives in recipes:
        given = {}
        for settings in alternatives:
            given |= dict(setting.split("=") for setting in settings.split())
        read_config(PPOConfig, ["sampling.n=4", *(f"algorithm.{name}={value}" for name, value in given.items())])


def test_the_preset_is_as_large_as_its_name_says() -> None:
    ((name, shape),) = eval(f"{{{code('ModelShape(')}}}", dict(vars(presets))).items()
    millions = int(re.findall(r"-(\d+)m$", name)[0])
    assert round(shape.num_parameters(6400) / 1e6) == millions and name not in presets.PRESETS


def test_the_stage_learns_every_token_but_the_first() -> None:
    before = dict(stages.STAGES)
    try:
        names = execute(code("def encode_dialogue"), stages)
        stage, config = stages.STAGES["dialogue"], names["DialogueConfig"]()
    finally:
        stages.STAGES.clear()
        stages.STAGES.update(before)
    assert stage.name == config.stage
    tokenizer = train_tokenizer(["some text"], 260)
    turns = ({"role": "user", "content": "some"}, {"role": "assistant", "content": "text"})
    (group,) = stage.encode(tokenizer, Row(turns, "test", None, "file:1"), config)
    windows = pack_groups([group, group], 2 * len(group))
    assert len(windows) == 1 and windows.loss_mask.sum() == 2 * (len(group) - 1)
    assert language_model_loss(-torch.ones(1, 2 * len(group)), torch.from_numpy(windows.loss_mask), 1) == windows.loss_mask.sum()


def test_the_table_of_stages_has_every_stage_and_where_it_begins() -> None:
    rows = {row[0].strip("`"): row for row in table("| `python -m jobs.` |")}
    assert list(rows) == list(stages.STAGES)
    for name, row in rows.items():
        init_from = SUPERVISED[name]().model.init_from
        assert row[3].startswith("none" if init_from is None else f"`{init_from}`") and (ROOT / "jobs" / f"{name}.py").is_file()


# ---------------------------------------------------------------------------------------------------------- names


def table(header: str) -> list[list[str]]:
    """Cells of the rows below a table's header."""
    rows = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_every_old_flag_is_mapped_to_fields_that_exist() -> None:
    rows = table("| Old flag |")
    assert [row[0].strip("`") for row in rows] == OLD_FLAGS
    for _, ppo, sft in rows:
        for root, cell in ((PPOConfig, ppo), (SFTConfig, sft)):
            overrides = re.findall(r"`([\w.]+=[^`]+)`", cell)
            assert overrides
            for override in overrides:
                read_config(root, [override])


def test_the_metrics_table_has_the_fixed_names_and_no_others() -> None:
    names = [name for row in table("| Name | Meaning |") for name in re.findall(r"`(\w+/\w+)`", row[0])]
    assert sorted(names) == sorted(FIXED)


def test_the_console_line_has_the_form_that_the_code_gives_it() -> None:
    numbers = {"actor_loss": 0.2346, "critic_loss": 0.1235, "reward": 1.2346, "kl": 0.0012, "actor_grad_norm": 0.8234, "tokens_per_second": 12345}
    row = {f"train/{name}": value for name, value in numbers.items()} | {"train/epoch": 1, "train/mfu_percent": 0.35, "system/epoch_time": 5}
    assert console_line(100, 500, 1, row) in README


@pytest.mark.parametrize("fields", [re.findall(r"`(\w+)`", part) for row in table("| Fields of a row |") for part in row[0].split(" or ")], ids=" ".join)
def test_a_row_with_the_fields_of_the_table_is_read(fields: list[str], tmp_path: Path) -> None:
    if fields == ["response"]:
        fields = ["instruction", "response"]
    entry = {"question": "?", "answer": "!", "metadata": {"source_dataset": "chain_sum"}}
    values = {"entry": entry, "metadata": entry["metadata"], "messages": [{"role": "user", "content": "?"}]}
    values |= {"conversations": [{"from": "human", "value": "?"}], "instances": [{"input": "", "output": "!"}]}
    fields = [name for name in fields if name not in ("role", "content", "from", "value")]
    (tmp_path / "data.jsonl").write_text(json.dumps({name: values.get(name, "text") for name in fields}))
    assert len(list(read_rows([tmp_path / "data.jsonl"]))) == 1


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_links_to_files_that_exist(path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]+)", prose)
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_a_document_names_files_and_tests_that_exist(path: Path) -> None:
    named = re.findall(r"`((?:tests|minigpt_ray|actors|jobs|configs|docs|requirements)/[\w./]+\.\w+)(?:::(\w+))?`", path.read_text(encoding="utf-8"))
    assert not [file for file, _ in named if not (ROOT / file).is_file()]
    assert not [f"{file}::{test}" for file, test in named if test and f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")]
