"""From documents to PPO with a model of each family; a mixture of experts has other names of weights in the model than in files and in vLLM."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.numpy import load_file

from minigpt_ray.presets import PRESETS, ModelShape
from minigpt_ray.tracking import read_metrics

ROOT = Path(__file__).parents[2]
SMALL = ["documents.sources.palindromes.count=200", "documents.sources.words.count=100", "demonstrations.sources.spelling.count=40"]
PREPARE = {"files": ["configs/data/spelling.yaml"], "overrides": [*SMALL, "prompts.sources.spelling.count=60", "held_out=0.1"]}
PPO = {
    "files": ["configs/debug/ppo.yaml"],
    "overrides": ["policy.init_from=pretrain", "steps=2", "evaluation.num_prompts=2", "placement.colocate=[[policy, critic, reference, rewards]]"],
}
A_WEIGHT = {
    "nano": "model.layers.0.self_attn.q_norm.weight",
    "llama-nano": "model.layers.0.mlp.gate_proj.weight",
    "qwen3-moe-nano": "model.layers.0.mlp.experts.3.gate_proj.weight",
}
"""Preset -> the name of a weight in the file of its model."""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("preset", A_WEIGHT)
def test_a_model_goes_from_documents_to_ppo(tmp_path: Path, preset: str) -> None:
    pretrain = {"files": ["configs/debug/pretrain.yaml"], "overrides": [f"model.preset={preset}", "steps=3", "validation_every=3"]}
    stages = {"prepare_data": PREPARE, "pretrain": pretrain, "ppo": PPO}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"run": preset, "output_dir": str(tmp_path), "stages": stages}, sort_keys=False))
    command = [sys.executable, "-m", "jobs.pipeline", str(tmp_path / "pipeline.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {stage: read_metrics(tmp_path / preset / stage / "metrics.jsonl") for stage in ("pretrain", "ppo")}
    assert rows["pretrain"][0].keys() == {"step", "train/global_step", "validation/unigram_perplexity"}
    assert {"validation/loss/palindromes", "validation/loss/words"} <= rows["pretrain"][-1].keys()
    assert all(row["train/mfu_percent"] > 0 for row in rows["pretrain"] if "train/loss" in row)

    learnt = [row for row in rows["ppo"] if "train/actor_loss" in row]
    assert [row["weights/version"] for row in learnt] == [1, 2]
    assert all(row["weights/probe_gap"] < 1e-4 and row["generator/logprob_gap_max"] < 1e-3 for row in learnt)  # also after an update in place
    model = tmp_path / preset / "ppo" / "model"
    assert ModelShape.from_config_json(model / "config.json").matrix_parameters == PRESETS[preset].matrix_parameters
    assert A_WEIGHT[preset] in load_file(model / "model.safetensors")
