"""Pretraining on Ray Train: documents in, a Hugging Face model directory out.

    python -m jobs.pretrain configs/debug/pretrain.yaml run=first                  one machine, no GPU needed, under a minute
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.pretrain configs/pretrain.yaml output_dir=/shared/runs

Writes <output_dir>/<run>/pretrain: config.yaml, metrics.jsonl, windows/ (the packed data, reused while nothing it was made
from changes), checkpoint/ and model/, which `init_from: pretrain` and `AutoModelForCausalLM.from_pretrained` load.
"""

from actors.parent import keep_running
from actors.supervised_job import train
from minigpt_ray.cli import load_config
from minigpt_ray.config import PretrainConfig

if __name__ == "__main__":
    keep_running(train, load_config(PretrainConfig))
