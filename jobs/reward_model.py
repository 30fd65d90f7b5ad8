"""Training of a reward model on Ray Train (Bradley-Terry): preference pairs in, a scalar head out.

    python -m jobs.reward_model configs/debug/reward_model.yaml run=first          one machine, no GPU needed, under a minute
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.reward_model configs/reward_model.yaml output_dir=/shared/runs

Writes <output_dir>/<run>/reward_model: config.yaml, metrics.jsonl, windows/ (the packed pairs), checkpoint/ and model/, which
PPO reads as `rewards.rm={kind: model, init_from: reward_model}`. Its validation.json holds mean and spread of the rewards on
held-out answers, by which `normalize: true` makes scores comparable.
"""

from actors.parent import keep_running
from actors.supervised_job import train
from minigpt_ray.cli import load_config
from minigpt_ray.config import RewardModelConfig

if __name__ == "__main__":
    keep_running(train, load_config(RewardModelConfig))
