"""TRL's PPO trainer on one workload: the peer. Run by ppo_vs_trl.py, in a process of its own.

    python -m benchmarks.trl_ppo <run directory> <workload> <steps>

Writes one row a step into <run directory>/trl/metrics.jsonl, under the names of our own metrics. Settings are the
fastest that this trainer has for the workload: all prompts generated and scored in one batch, no gradient checkpointing,
no accumulation inside a mini-batch, sdpa attention, all threads.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.inputs import PROMPTS, WORKLOADS
from minigpt_ray.tokenizer import load_tokenizer


class StepRows(TrainerCallback):
    """Writes what each step took, from the end of the one before it: rollout, scoring, update, logging."""

    def __init__(self, path: Path, end_token: int | None) -> None:
        self.file, self.end_token = path.open("w"), end_token
        self.rollout_seconds = self.start = 0.0
        self.responses = torch.zeros(0, 0)
        self.generate = ppo_trainer.batch_generation
        ppo_trainer.batch_generation = self._generate

    def _generate(self, model: Any, queries: torch.Tensor, *args: Any) -> Any:
        start = time.perf_counter()
        result = self.generate(model, queries, *args)
        self.rollout_seconds = time.perf_counter() - start
        self.responses = result[0][:, queries.shape[1] :]
        return result

    def _lengths(self) -> torch.Tensor:
        """Tokens of each response, its end token included."""
        ended = (self.responses == self.end_token).cumsum(1).bool() if self.end_token is not None else torch.zeros_like(self.responses, dtype=torch.bool)
        return ((~ended).sum(1) + ended.any(1)).float()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lengths, now = self._lengths(), time.perf_counter()
        row = {
            "step": state.global_step,
            "time/step_s": now - self.start,
            "time/rollout_s": self.rollout_seconds,
            "train/avg_response_len": lengths.mean().item(),
            "response/length_p5": lengths.quantile(0.05).item(),
            "response/length_p95": lengths.quantile(0.95).item(),
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        self.start = now


def main(directory: Path, name: str, steps: int) -> None:
    workload = WORKLOADS[name]
    models = {part: str(directory / part / "model") for part in ("start", "reward_model", "critic")}
    tokenizer = load_tokenizer(models["start"])
    tokenizer.padding_side = "left"
    lines = (directory / "prepare_data" / "prompts.jsonl").read_text().splitlines()
    prompts = Dataset.from_dict({"input_ids": [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]})
    policy, reference = (AutoModelForCausalLM.from_pretrained(models["start"], dtype=torch.float32) for _ in range(2))
    reward_model, critic = (
        AutoModelForSequenceClassification.from_pretrained(models[part], num_labels=1, dtype=torch.float32) for part in ("reward_model", "critic")
    )
    (directory / "trl").mkdir(exist_ok=True)
    config = PPOConfig(
        output_dir=str(directory / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        total_episodes=PROMPTS * steps,
        per_device_train_batch_size=PROMPTS,
        gradient_accumulation_steps=1,
        num_mini_batches=PROMPTS // 16,
        local_rollout_forward_batch_size=PROMPTS,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=workload.max_tokens,
        stop_token="eos" if workload.stops else None,
        temperature=1.0,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        kl_coef=0.01,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=critic,
        train_dataset=prompts,
        eval_dataset=prompts,
        callbacks=[StepRows(directory / "trl" / "metrics.jsonl", tokenizer.eos_token_id if workload.stops else None)],
    )
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
