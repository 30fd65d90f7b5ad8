"""From documents to PPO with a mixture of experts, whose weights have other names in the model than in files and in vLLM.

Dense models of the same way: tests/jobs/test_pipeline.py, test_midtrain.py and test_ppo.py.
"""

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
STAGES = {
    "prepare_data": {"files": ["configs/data/spelling.yaml"], "overrides": [*SMALL, "prompts.sources.spelling.count=60", "held_out=0.1"]},
    "pretrain": {"files": ["configs/debug/pretrain.yaml"], "overrides": ["model.preset=qwen3-moe-nano", "steps=3", "validation_every=3"]},
    "ppo": {
        "files": ["configs/debug/ppo.yaml"],
        "overrides": ["policy.init_from=pretrain", "steps=2", "evaluation.num_prompts=2", "placement.colocate=[[policy, critic, reference, rewards]]"],
    },
}


@pytest.mark.ray
@pytest.mark.slow
def test_a_mixture_of_experts_goes_from_documents_to_ppo(tmp_path: Path) -> None:
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"run": "experts", "output_dir": str(tmp_path), "stages": STAGES}, sort_keys=False))
    command = [sys.executable, "-m", "jobs.pipeline", str(tmp_path / "pipeline.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "120"}, timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {stage: read_metrics(tmp_path / "experts" / stage / "metrics.jsonl") for stage in ("pretrain", "ppo")}
    assert rows["pretrain"][0].keys() == {"step", "train/global_step", "validation/unigram_perplexity"}
    assert {"validation/loss/palindromes", "validation/loss/words"} <= rows["pretrain"][-1].keys()
    assert all(row["train/mfu_percent"] > 0 for row in rows["pretrain"] if "train/loss" in row)

    learnt = [row for row in rows["ppo"] if "train/actor_loss" in row]
    assert [row["weights/version"] for row in learnt] == [1, 2]
    assert all(row["weights/probe_gap"] < 1e-4 and row["generator/logprob_gap_max"] < 1e-3 for row in learnt)  # also after an update in place
    model = tmp_path / "experts" / "ppo" / "model"
    assert ModelShape.from_config_json(model / "config.json").matrix_parameters == PRESETS["qwen3-moe-nano"].matrix_parameters
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in load_file(model / "model.safetensors")
