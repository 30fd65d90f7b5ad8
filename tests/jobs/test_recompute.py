"""The rows that a PPO run logs are what an independent script makes of its tokens and rewards; it tells a wrong row from a right one.

The run is as unlike the debug mode as a small one can be: two policy ranks, micro-batches, shared processes, two PPO epochs of
two mini-batches, a warm-up, clips that hold many tokens, a penalty, a bonus, two reward sources, a temperature.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from minigpt_ray.tracking import read_samples
from tests.jobs.starts import random_start
from tests.recompute import main as recompute
from tests.test_metrics_doc import FIXED

CHECKOUT = Path(__file__).parents[2]
SCRIPT = CHECKOUT / "tests" / "recompute.py"
REWARD = """
def lower_case(rollouts):
    return [sum("a" <= c <= "z" for c in r.text) / 16 for r in rollouts]
"""
OVERRIDES = """
steps=2 logging.batches=2 logging.samples_per_step=16 evaluation.num_prompts=2 sampling.temperature=0.9
rewards.letters.kind=function rewards.letters.function=a_users_rewards:lower_case rewards.letters.weight=0.5
algorithm.ppo_epochs=2 algorithm.clip_low=0.05 algorithm.clip_high=0.05 algorithm.value_clip=0.02 algorithm.entropy_coef=0.01
algorithm.kl_coef=0.1 algorithm.kl_estimator=k3 algorithm.discount=0.98 algorithm.gae_lambda=0.9
policy.optimizer.lr=2e-3 policy.optimizer.warmup_steps=3 policy.optimizer.weight_decay=0.1 policy.micro_batch_tokens=300
critic.optimizer.lr=3e-3 critic.optimizer.schedule=cosine critic.zero_stage=0
placement.policy.ranks=2 placement.reference.ranks=2 placement.colocate=[[policy,reference],[critic,rewards]]
"""
RECOMPUTED = [name for name in FIXED if name not in ("train/mfu_percent",)] + [
    *("reward/std", "reward/verifier", "reward/letters", "reward_by_source/spell_backward", "response/length_p95", "response/truncated_fraction"),
    *("generator/logprob_gap_mean", "generator/logprob_gap_max", "advantages/mean", "advantages/std", "critic/values_mean", "critic/returns_mean"),
    *(
        "critic/explained_variance",
        "critic/value_clip_fraction",
        "policy/entropy",
        "policy/ratio_mean",
        "policy/clip_fraction_low",
        "policy/clip_fraction_high",
    ),
]
LINE = re.compile(r" +(\d)  (\S.*?) +(\S+) +(\S+) +(\S+?)( +DIFFERS)?")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of two steps that begins with random weights."""
    home = tmp_path_factory.mktemp("home")
    random_start(home, "r")
    (home / "a_users_rewards.py").write_text(REWARD)
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(home)}
    command = [sys.executable, "-m", "jobs.ppo", "configs/debug/ppo.yaml", f"output_dir={home}", "run=r", *OVERRIDES.split()]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "r"


def table(output: str) -> dict[tuple[int, str], tuple[float, float, float, bool]]:
    """(step, name) -> logged, recomputed, difference, whether it differs."""
    matches = [LINE.fullmatch(line) for line in output.splitlines()]
    return {(int(m[1]), m[2]): (float(m[3]), float(m[4]), float(m[5]), bool(m[6])) for m in matches if m}


def test_the_script_imports_nothing_of_the_project() -> None:
    nodes = [node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {node.module if isinstance(node, ast.ImportFrom) else alias.name for node in nodes for alias in node.names}
    assert {str(module).partition(".")[0] for module in modules} <= sys.stdlib_module_names | {"numpy", "torch", "transformers", "safetensors", "yaml"}


@pytest.mark.slow
def test_every_row_is_what_the_script_makes_of_tokens_and_rewards(run: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), str(run)], cwd=run, capture_output=True, text=True, timeout=300)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = table(done.stdout)
    assert not [(step, name) for step in (1, 2) for name in RECOMPUTED if (step, name) not in lines]
    for logged, recomputed, difference, differs in lines.values():
        assert not differs and abs(difference) <= max(1e-5, 1e-4 * abs(recomputed), 1e-4 * abs(logged))
    assert lines[2, "generator's logprobs: largest difference"][1] < 1e-3
    for name in ("policy/clip_fraction_low", "policy/clip_fraction_high", "critic/value_clip_fraction"):
        assert all(0.05 < lines[step, name][0] < 0.95 for step in (1, 2)), name  # so the clips took part
    for name in ("train/kl_ref", "train/kl", "critic/values_mean", "critic/explained_variance"):
        assert abs(lines[2, name][0]) > 1e-3, name


@pytest.mark.slow
def test_the_scores_are_what_the_function_gives_for_the_texts(run: Path) -> None:
    for step in (1, 2):
        texts = [row["response"] for row in read_samples(run / "ppo" / "samples.jsonl") if row["kind"] == "train" and row["step"] == step]
        scores = load_file(run / "ppo" / "batches" / f"step-{step:06d}.safetensors")["scores.rewards.by_source.letters"]
        assert np.array_equal(scores, [sum("a" <= c <= "z" for c in text) / 16 for text in texts])


@pytest.mark.slow
def test_a_row_that_was_tampered_with_is_found(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four numbers of step 2, each by a hundredth."""
    other = tmp_path / "r"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoint"))
    path, names = other / "ppo" / "metrics.jsonl", ("train/reward", "train/kl", "policy/clip_fraction_high", "train/critic_grad_norm")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{name: value * 1.01 if row["step"] == 2 and name in names else value for name, value in row.items()} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert recompute(other) == 1
    output = capsys.readouterr().out
    assert [key for key, (*_, differs) in table(output).items() if differs] == [(2, name) for name in names]
    assert output.splitlines()[-1].endswith("of 2 steps, 4 differ")


@pytest.mark.slow
def test_what_the_script_lacks_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "r"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoint", "batches"))
    assert recompute(other) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and "run with logging.batches of at least the number of steps" in err
