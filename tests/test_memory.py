"""The memory estimate: sharding as ZeRO says, exact where it can be, unknown where it must be."""

import subprocess
import sys
from pathlib import Path

import pytest

from minigpt_ray.checkpoint import write_json_atomic
from minigpt_ray.cli import load_config, read_config
from minigpt_ray.config import EngineConfig, EvaluateConfig, GeneratePreferencesConfig, PPOConfig
from minigpt_ray.memory import GIB, activation_bytes, estimate, find_shape, per_process, placement_table, state_bytes
from minigpt_ray.presets import PRESETS


@pytest.fixture
def run(tmp_path):
    """Overrides that point to a run with an SFT model of the nano preset."""
    directory = tmp_path / "demo/sft/model"
    directory.mkdir(parents=True)
    write_json_atomic(directory / "config.json", {**PRESETS["nano"].to_hf(), "vocab_size": 320})
    return ["run=demo", f"output_dir={tmp_path}"]


@pytest.mark.parametrize(
    ("dtype", "stage", "expected"),
    [
        ("float32", 0, (4, 4, 8)),
        ("float32", 1, (4, 4, 3)),
        ("bfloat16", 0, (2, 2, 12)),
        ("bfloat16", 1, (2, 2, 3)),
        ("bfloat16", 2, (2, 0.5, 3)),
        ("bfloat16", 3, (0.5, 0.5, 3)),
    ],
)
def test_bytes_per_parameter_on_four_ranks(dtype, stage, expected):
    found = state_bytes(1000, EngineConfig(dtype=dtype, zero_stage=stage), ranks=4)
    assert tuple(found[part] / 1000 for part in ("weights", "gradients", "optimizer")) == expected


def test_checkpointing_and_frozen_models_hold_fewer_activations():
    shape = PRESETS["qwen3-26m"]
    full, checkpointed = (activation_bytes(shape, 8192, "float32", training=True, checkpointing=c, logits=False) for c in (False, True))
    frozen = activation_bytes(shape, 8192, "float32", training=False, logits=False)
    assert full > checkpointed > frozen


def test_every_role_is_estimated_once_the_model_exists(run):
    config = read_config(PPOConfig, [*run, "rewards.rm={kind: model, init_from: sft}", "placement.policy.ranks=2"])
    roles = {role.name: role for role in estimate(config)}
    assert list(roles) == ["generator", "policy", "critic", "reference", "reward_model_0", "rewards"]
    assert all(role.gib is not None and 0 < role.gib < 3 for role in roles.values())
    shape = find_shape("sft", config.run_dir)
    assert roles["policy"].parameters == roles["generator"].parameters == shape.num_parameters()
    assert roles["critic"].parameters == shape.num_parameters() + shape.hidden_size
    assert roles["generator"].parts["cache"] == 256 / 1024
    assert roles["reference"].parts["weights"] == shape.num_parameters() * 4 / GIB


def test_an_estimator_without_a_critic_needs_no_memory_for_one(run):
    names = [role.name for role in estimate(read_config(PPOConfig, [*run, "algorithm.estimator=rloo", "sampling.n=2"]))]
    assert names == ["generator", "policy", "reference", "rewards"]


def test_a_model_that_is_split_without_gpus_is_in_one_host_s_memory_with_a_process_for_each_part(run):
    whole, split = (
        {role.name: role for role in estimate(read_config(PPOConfig, [*run, f"placement.generator.tensor_parallel={parts}"]))}["generator"] for parts in (1, 2)
    )
    assert split.gib == pytest.approx(whole.gib + 2 * whole.parts["process"]) and split.devices == whole.devices == 1


def test_a_role_in_the_processes_of_another_costs_no_process_of_its_own(run):
    separate, shared = (read_config(PPOConfig, [*run, *more]) for more in ([], ["placement.colocate=[[policy, reference], [critic, rewards]]"]))
    before, after = ({role.name: role for role in estimate(config)} for config in (separate, shared))
    assert after["policy"] == before["policy"]
    assert after["reference"].gib == pytest.approx(before["reference"].gib - before["reference"].parts["process"])
    assert (after["rewards"].gib, after["rewards"].own_processes) == (0, False)
    assert after["reference"].note == "in the processes of policy" and after["rewards"].note == "in the processes of critic"
    assert placement_table(list(after.values())).columns[2].footer == "3"


def test_before_the_model_exists_the_memory_is_unknown(tmp_path):
    roles = estimate(read_config(PPOConfig, [f"output_dir={tmp_path}"]))
    assert [role.name for role in roles if role.gib is not None] == ["rewards"]


@pytest.mark.parametrize("root", [PPOConfig, EvaluateConfig])
def test_dry_run_ends_with_the_placement_table(root, run, capsys):
    with pytest.raises(SystemExit) as caught:
        load_config(root, [*run, "--dry-run", "placement.generator.workers=3"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert "Placement" in out and "generator" in out and f"{find_shape('sft', Path(run[1].removeprefix('output_dir=')) / 'demo').num_parameters():,}" in out


@pytest.mark.parametrize("root", [EvaluateConfig, GeneratePreferencesConfig])
def test_a_job_that_answers_needs_its_generator_and_its_reward_models(root, run):
    config = load_config(root, [*run, "rewards.judge.kind=model", "rewards.judge.init_from=sft", "placement.reward_model.ranks=2"])
    assert list(per_process(config)) == ["generator", "reward_model_0", "rewards"]
    assert per_process(config)["generator"] > 0.5
    assert "generator" not in per_process(load_config(root, ["run=absent", run[1]]))  # there is no such model yet


def test_the_estimate_imports_neither_torch_nor_ray(run):
    code = "import sys; from minigpt_ray.memory import estimate; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True)
    assert done.stdout.strip() == "[]"


def test_a_micro_batch_holds_no_more_tokens_than_there_are(run):
    """Of the policy: a mini-batch of rollouts at their longest, split over its ranks; of the reference: a chunk that is scored."""

    def activations(*overrides):
        options = ["data.max_prompt_tokens=50", "sampling.max_tokens=50", "sampling.n=2", "policy.micro_batch_tokens=1000", "reference.micro_batch_tokens=1000"]
        found = {role.name: role.parts.get("activations") for role in estimate(load_config(PPOConfig, ["configs/debug/ppo.yaml", *run, *options, *overrides]))}
        return found["policy"], found["reference"]

    full = activations("algorithm.mini_batch_size=16", "score_chunk=8")
    assert activations("algorithm.mini_batch_size=8", "score_chunk=4") == pytest.approx((full[0] * 0.8, full[1] * 0.8))
    assert activations("algorithm.mini_batch_size=8", "score_chunk=4", "placement.policy.ranks=2", "placement.reference.ranks=4") == pytest.approx(
        (full[0] * 0.4, full[1] * 0.2)
    )
