"""A run directory as the jobs write it: PPO with everything that it measures, and SFT."""

import io
import math

from rich.console import Console

from minigpt_ray.cli import write_resolved
from minigpt_ray.config import LoggingConfig, PPOConfig
from minigpt_ray.tracking import Tracker


def sample(step, kind="train", prompt="2 + 2?", response="4", reward=1.0):
    return {"step": step, "kind": kind, "prompt": prompt, "response": response, "answer": "4", "reward": reward, "source": "chain_sum"}


def write_run(directory):
    """Write it, and return its path."""
    for stage in ("ppo", "sft"):
        with Tracker(directory / stage, stage, {}, LoggingConfig(), 50, console=Console(file=io.StringIO())) as tracker:
            for step in range(51):
                if stage == "ppo" and step % 25 == 0:
                    tracker.log(step, {"eval/accuracy": 0.4 + step / 200, "eval/mean_reward": 0.5, "eval/sampled_accuracy": 0.3})
                    tracker.samples(step, [sample(step, "eval", response=f"<b>{step}</b>", reward=math.nan)])
                if step and stage == "ppo":
                    tracker.log(
                        step,
                        {
                            "train/epoch": 1,
                            "train/reward": step / 50,
                            "train/kl_ref": math.nan,
                            "time/step_s": 2.0,
                            "time/rollout_s": 1.5,
                            "time/learn_s": 0.5,
                            "time/learn/publish_s": 0.1,
                            "time/idle_share/generator": 0.25,
                        },
                    )
                    tracker.samples(step, [sample(step)])
                if step and stage == "sft":
                    tracker.log(step, {"train/epoch": 1, "train/loss": 3 / step, "time/step_s": 1.0})
    write_resolved(PPOConfig(run="demo"), directory / "ppo")
    return directory
