"""Preference optimisation on Ray Train (DPO, IPO, SimPO): preference pairs in, a better policy out.

    python -m jobs.dpo configs/debug/dpo.yaml run=first                            one machine, no GPU needed, under a minute
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.dpo configs/dpo.yaml output_dir=/shared/runs

Writes <output_dir>/<run>/dpo: config.yaml, metrics.jsonl, windows/ (the packed pairs, and the reference's logprobs of them),
checkpoint/ and model/, which `init_from: dpo` and `AutoModelForCausalLM.from_pretrained` load.
"""

from actors.parent import keep_running
from actors.supervised_job import train
from minigpt_ray.cli import load_config
from minigpt_ray.config import DPOConfig

if __name__ == "__main__":
    keep_running(train, load_config(DPOConfig))
