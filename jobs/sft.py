"""Supervised fine-tuning on Ray Train: demonstrations in, a Hugging Face model directory out.

    python -m jobs.sft configs/debug/sft.yaml run=first                          one machine, no GPU needed, under a minute
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.sft configs/sft.yaml output_dir=/shared/runs

Writes <output_dir>/<run>/sft: config.yaml, metrics.jsonl, windows/ (the packed data, reused while nothing it was made
from changes), checkpoint/ and model/, which `init_from: sft` and `AutoModelForCausalLM.from_pretrained` load.
"""

from actors.parent import keep_running
from actors.supervised_job import train
from minigpt_ray.cli import load_config
from minigpt_ray.config import SFTConfig

if __name__ == "__main__":
    keep_running(train, load_config(SFTConfig))
