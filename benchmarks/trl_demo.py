"""TRL's PPO trainer on a run of the demo: the same start, prompts, verifier, temperature and number of samples.

    .venv/bin/python -m benchmarks.trl_demo outputs/demo --steps 450    after `make demo`; needs `requirements/install.py --bench`

Writes <run>-trl/ppo/metrics.jsonl with the held-out accuracy under the names of our own, so that `--curves` draws both. Batch,
clip and KL coefficient are the demo's; it has one optimizer for policy and critic, for which of 1e-4 and the demo's 3e-4 the former is the better.
With --may-pad the policy may say the padding token, as TRL leaves it to, and collapses.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from minigpt_ray.config import PromptsConfig
from minigpt_ray.data.prompts import load_prompts
from minigpt_ray.data.verification import verify
from minigpt_ray.rl.experience import Prompt
from minigpt_ray.tokenizer import load_tokenizer

PROMPTS_PER_STEP = 256
MAX_TOKENS = 12
TEMPERATURE = 1.4


class Verifier:
    """Stands where TRL calls its reward model: half for a wholly right answer, half with partial credit, as configs/demo/ppo.yaml."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: tuple[Prompt, ...]) -> None:
        self.tokenizer = tokenizer
        self.answers = {tuple(prompt.token_ids.tolist()): prompt.answer for prompt in prompts}
        self.model = torch.nn.Identity()
        self.values = ppo_trainer.get_reward
        ppo_trainer.get_reward = self

    def __call__(self, model: Any, ids: Tensor, pad: int, context: int) -> tuple[Any, Tensor, Any]:
        """TRL's get_reward: the critic's values as TRL computes them, the verifier's scores for the reward model."""
        if model is not self.model:
            found: tuple[Any, Tensor, Any] = self.values(model, ids, pad, context)
            return found
        scores = []
        for row in ids.tolist():
            answer = self.answers[tuple(token for token in row[:context] if token != pad)]
            assert answer is not None
            score = verify(answer, str(self.tokenizer.decode(row[context:], skip_special_tokens=True)))
            scores.append(0.5 * (score == 1) + 0.5 * score)
        return None, torch.tensor(scores), None


def never_pads(model: PreTrainedModel, pad: int) -> None:
    """Take the padding token from what a model may say.

    TRL takes a sampled one for the end of a response and computes no loss on it. So nothing holds against its probability, which grows
    with every token that is made less likely, until all responses are empty.
    """

    def forbid(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        output.logits = output.logits.index_fill(-1, torch.tensor(pad), -1e4)
        return output

    model.register_forward_hook(forbid)


class Evaluation(TrainerCallback):
    """Held-out accuracy of greedy and of sampled answers, every so many steps and before the first."""

    def __init__(self, path: Path, tokenizer: PreTrainedTokenizerBase, prompts: tuple[Prompt, ...], every: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file, self.tokenizer, self.prompts, self.every = path.open("w"), tokenizer, prompts, every

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write(0, kwargs["model"].policy)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._write(state.global_step, kwargs["model"].policy)

    def _write(self, step: int, policy: Any) -> None:
        row = {"step": step, "eval/accuracy": self._accuracy(policy, do_sample=False), "eval/sampled_accuracy": self._accuracy(policy, do_sample=True)}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        print(row, flush=True)

    @torch.no_grad()
    def _accuracy(self, policy: Any, do_sample: bool) -> float:
        inputs = self.tokenizer.pad({"input_ids": [prompt.token_ids.tolist() for prompt in self.prompts]}, return_tensors="pt")
        sampling = {"temperature": 1.0, "top_k": 0} if do_sample else {}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            ids = policy.generate(**inputs, do_sample=do_sample, max_new_tokens=MAX_TOKENS, pad_token_id=self.tokenizer.pad_token_id, **sampling)
        texts = self.tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return sum(verify(prompt.answer, text) == 1 for prompt, text in zip(self.prompts, texts, strict=True) if prompt.answer) / len(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of the demo")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--every", type=int, default=45, help="steps between evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--may-pad", action="store_true", help="the policy may say the padding token")
    arguments = parser.parse_args()
    start, output = str(arguments.run / "sft" / "model"), arguments.run.with_name(f"{arguments.run.name}-trl") / "ppo"
    tokenizer = load_tokenizer(start)
    tokenizer.padding_side = "left"
    sets = (load_prompts(PromptsConfig(), arguments.run / "prepare_data" / f"{name}.jsonl", tokenizer).prompts for name in ("prompts", "held_out"))
    prompts, held_out = sets
    policy, reference = (AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32) for _ in range(2))
    if not arguments.may_pad:
        for model in (policy, reference):
            never_pads(model, tokenizer.pad_token_id)
    critic = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, dtype=torch.float32)
    verifier = Verifier(tokenizer, prompts)
    config = PPOConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        total_episodes=PROMPTS_PER_STEP * arguments.steps,
        per_device_train_batch_size=PROMPTS_PER_STEP,
        gradient_accumulation_steps=1,
        num_mini_batches=4,
        local_rollout_forward_batch_size=PROMPTS_PER_STEP,
        num_ppo_epochs=1,
        num_sample_generations=0,
        response_length=MAX_TOKENS,
        stop_token="eos",
        temperature=TEMPERATURE,
        learning_rate=arguments.lr,
        warmup_steps=20,
        lr_scheduler_type="constant_with_warmup",
        kl_coef=0.001,
        cliprange_value=1e9,  # as the demo, which clips no values
        vf_coef=1.0,
        whiten_rewards=False,
        seed=arguments.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=verifier.model,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": [prompt.token_ids.tolist() for prompt in prompts]}),
        eval_dataset=Dataset.from_dict({"input_ids": [prompt.token_ids.tolist() for prompt in held_out]}),
        callbacks=[Evaluation(output / "metrics.jsonl", tokenizer, held_out, arguments.every)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
