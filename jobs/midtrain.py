"""Midtraining on Ray Train: a pretrained model goes on with a mix of sources whose weights may change on the way.

    python -m jobs.midtrain configs/debug/midtrain.yaml run=first                  one machine, no GPU needed, under a minute
    ray job submit --working-dir . --runtime-env deploy/runtime_env.yaml -- python -m jobs.midtrain configs/midtrain.yaml output_dir=/shared/runs

Writes <output_dir>/<run>/midtrain, with the same files as jobs.pretrain; every source has its own directory in windows/.
"""

from actors.parent import keep_running
from actors.supervised_job import train
from minigpt_ray.cli import load_config
from minigpt_ray.config import MidtrainConfig

if __name__ == "__main__":
    keep_running(train, load_config(MidtrainConfig))
