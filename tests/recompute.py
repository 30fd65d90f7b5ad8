"""Recompute the metrics of a PPO run from what it left behind, without a line of the project's code.

    python -m jobs.ppo configs/debug/ppo.yaml logging.batches=4 logging.samples_per_step=16
    python tests/recompute.py outputs/debug

The run must have kept every step from the first on (`logging.batches`) and every rollout (`logging.samples_per_step`), and have
gone through without a break (the averages of rates begin anew with a process).

Taken as given are the model that the run began with, its config.yaml, and of every step: token ids, masks, the generator's
logprobs, each source's scores (batches/), texts and finish reasons (samples.jsonl), and the seconds of its phases. The rest is
computed again by the formulas of docs/metrics.md: logprobs, entropies and values row by row and without padding, advantages
by a loop over tokens, losses, gradients and AdamW steps in plain torch in float64. So step n is right only if every update
before it was. Prints a table; exits with 1 when a number differs, with 2 when the run is not one that this can recompute.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, logging

RELATIVE, ABSOLUTE = 1e-4, 1e-6
LOGPROBS = 1e-5
"""Nats by which logprobs of a token in float32, and values, may differ from those in float64."""
GAP = 1e-3
"""Nats by which the generator may be away from the policy on a CPU in float32."""
WEIGHTS = 1e-3
"""Distance of the last weights from those of the run, as a share of the way that they came."""
PHASES = ("rollout", "score", "advantage", "learn", "publish")
COVERED = {
    "algorithm.estimator": "gae",
    "algorithm.critic_warmup_steps": 0,
    "algorithm.replacement_rounds": 0,
    "algorithm.normalize_rewards": False,
    "algorithm.reward_clip": None,
    "algorithm.length_penalty": 0,
    "algorithm.kl_in": "reward",
    "algorithm.kl_target": None,
    "algorithm.kl_stop": None,
    "algorithm.dual_clip": None,
    "policy.dtype": "float32",
    "critic.dtype": "float32",
    "reference.dtype": "float32",
    "sampling.stop": [],
}
"""Where the run must be as this script assumes."""


# ----------------------------------------------------------------------------------------------------- the table


@dataclass
class Table:
    """Numbers side by side."""

    lines: list[tuple[int, str, float, float, bool]] = field(default_factory=list)

    def add(self, step: int, name: str, logged: float | None, recomputed: float, absolute: float = ABSOLUTE) -> None:
        """A logged null stands for nan: there was nothing to count."""
        found = math.nan if logged is None else logged
        equal = abs(found - recomputed) <= absolute + RELATIVE * abs(recomputed) or (math.isnan(found) and math.isnan(recomputed))
        self.lines.append((step, name, found, recomputed, equal))

    def bound(self, step: int, name: str, difference: float, bound: float) -> None:
        """A difference that must be 0, up to a bound."""
        self.add(step, name, 0.0, difference, absolute=bound)

    def print(self) -> None:
        print(f"{'step':>4}  {'name':<44}{'logged':>16}{'recomputed':>16}{'difference':>12}")
        for step, name, logged, recomputed, equal in self.lines:
            print(f"{step:>4}  {name:<44}{logged:>16.9g}{recomputed:>16.9g}{recomputed - logged:>12.1e}{'' if equal else '  DIFFERS'}")

    @property
    def differing(self) -> int:
        return sum(not equal for *_, equal in self.lines)


# -------------------------------------------------------------------------------------------------------- models


def model_path(run: Path, init_from: str) -> Path:
    stage = run / init_from / "model"
    return stage if stage.is_dir() else Path(init_from)


def token_logprobs(model: torch.nn.Module, ids: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(T,), (T,): log p(token t | tokens before it) and the entropy there; 0 for the first token."""
    logs = torch.log_softmax(model(input_ids=ids[None], use_cache=False).logits[0, :-1].double() / temperature, dim=-1)
    chosen, entropy = logs[torch.arange(len(ids) - 1), ids[1:]], -(logs.exp() * logs).sum(-1)
    return torch.cat([chosen.new_zeros(1), chosen]), torch.cat([entropy.new_zeros(1), entropy])


def token_values(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """(T + 1,): the head's output at token t - 1 is the value before token t; 0 before the first."""
    outputs = model.score(model.model(input_ids=ids[None], use_cache=False).last_hidden_state)[0, :, 0].double()
    return torch.cat([outputs.new_zeros(1), outputs])


def build_policy(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()


def build_critic(path: Path, fresh: bool) -> torch.nn.Module:
    """The trunk of `path` with a scalar head, which begins at zero when it is fresh."""
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=torch.float64).eval()
    if fresh:
        torch.nn.init.zeros_(model.score.weight)
    return model


class Learner:
    """A model and its AdamW, the learning rate by the number of updates."""

    def __init__(self, model: torch.nn.Module, optimizer: dict, total_updates: int) -> None:
        self.model, self.config, self.total_updates, self.updates = model, optimizer, total_updates, 0
        matrices, others = [p for p in model.parameters() if p.ndim > 1], [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": optimizer["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=1.0, betas=tuple(optimizer["betas"]), eps=optimizer["eps"], foreach=False)

    @property
    def lr(self) -> float:
        """Of the next update."""
        peak, warmup, least = self.config["lr"], self.config["warmup_steps"], self.config["min_lr_ratio"]
        if self.updates < warmup:
            return peak * (self.updates + 1) / warmup
        progress = min(1.0, (self.updates - warmup) / max(1, self.total_updates - warmup))
        course = {"constant": 1.0, "linear": least + (1 - least) * (1 - progress), "cosine": least + (1 - least) * math.cos(progress * math.pi / 2) ** 2}
        return peak * course[self.config["schedule"]]

    def step(self) -> float:
        """One AdamW step on the gradients that have been added up; returns their norm before clipping."""
        parameters = list(self.model.parameters())
        norm = math.sqrt(sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None))
        for p in parameters:
            if p.grad is not None:
                p.grad *= min(1.0, self.config["max_grad_norm"] / norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.lr
        self.adamw.step()
        self.adamw.zero_grad()
        self.updates += 1
        return norm


# ---------------------------------------------------------------------------------------------------- arithmetic


def penalty(estimator: str, p: float, q: float) -> float:
    """KL(p || q) of a token, from both logprobs."""
    return {"k1": p - q, "k2": (p - q) ** 2 / 2, "k3": math.exp(q - p) - 1 - (q - p)}[estimator]


def gae(rewards: list[float], values: list[float], after: float, discount: float, gae_lambda: float) -> list[float]:
    """Advantages of one response, its last token first computed; `after` is the value behind that token."""
    advantages: list[float] = []
    advantage = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        advantage = reward + discount * after - value + discount * gae_lambda * advantage
        after = value
        advantages.insert(0, advantage)
    return advantages


def policy_terms(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, entropy: torch.Tensor, algorithm: dict) -> dict[str, torch.Tensor]:
    """Sums over the tokens of one response; with a positive advantage the ratio counts up to its upper bound, with a negative one from its lower."""
    low, high, ratio = 1 - algorithm["clip_low"], 1 + algorithm["clip_high"], torch.exp(logprobs - old)
    counted = torch.where(advantages > 0, ratio.clamp(max=high), ratio.clamp(min=low))
    return {
        "train/actor_loss": -(counted * advantages).sum() - algorithm["entropy_coef"] * entropy.sum(),
        "train/kl": (ratio - 1 - ratio.log()).sum(),
        "policy/entropy": entropy.sum(),
        "policy/ratio_mean": ratio.sum(),
        "policy/clip_fraction_low": ((ratio < low) & (advantages < 0)).double().sum(),
        "policy/clip_fraction_high": ((ratio > high) & (advantages > 0)).double().sum(),
    }


def value_terms(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, algorithm: dict) -> dict[str, torch.Tensor]:
    """Sums over the tokens of one response; the loss is flat where the value has left its clip and the edge is further from the return."""
    clip = math.inf if algorithm["value_clip"] is None else algorithm["value_clip"]
    edge = torch.where(values > old + clip, old + clip, torch.where(values < old - clip, old - clip, values))
    error, at_edge = (values - returns) ** 2, (edge - returns) ** 2
    flat = at_edge > error
    return {"train/critic_loss": torch.where(flat, at_edge, error).sum() / 2, "critic/value_clip_fraction": flat.double().sum()}


# ------------------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class Row:
    """A rollout that counts: `at` are the columns of its response tokens."""

    ids: torch.Tensor
    at: np.ndarray
    old: np.ndarray
    """The policy's logprobs before the step's first update."""
    reference: np.ndarray
    values: np.ndarray
    advantages: np.ndarray
    returns: np.ndarray


class Replay:
    """Models and optimizers of a run, taken through its steps."""

    def __init__(self, run: Path, config: dict, rows: dict[int, dict], samples: dict[int, list[dict]], table: Table) -> None:
        self.run, self.config, self.rows, self.samples, self.table = run, config, rows, samples, table
        self.algorithm, self.temperature = config["algorithm"], config["sampling"]["temperature"]
        start = model_path(run, config["policy"]["init_from"])
        paths = {role: start if config[role]["init_from"] == "policy" else model_path(run, config[role]["init_from"]) for role in ("critic", "reference")}
        self.rollouts_per_step = config["prompts_per_step"] * config["sampling"]["n"]
        total = config["steps"] * self.algorithm["ppo_epochs"] * self.rollouts_per_step // self.algorithm["mini_batch_size"]
        self.policy = Learner(build_policy(start), config["policy"]["optimizer"], total)
        self.critic = Learner(build_critic(paths["critic"], fresh=config["critic"]["init_from"] == "policy"), config["critic"]["optimizer"], total)
        self.reference = build_policy(paths["reference"])
        self.start = {name: p.detach().clone() for name, p in self.policy.model.named_parameters()}
        prompts = config["data"]["files"] or [run / "prepare_data" / "prompts.jsonl"]
        self.num_prompts = sum(bool(line.strip()) for file in prompts for line in Path(file).read_text(encoding="utf-8").splitlines())
        self.tokens_generated, self.rollouts, self.seconds = 0, 0, 0.0

    def step(self, step: int) -> None:
        """Compare all of step `step`, counted from 1, and take its updates."""
        given = load_file(self.run / "ppo" / "batches" / f"step-{step:06d}.safetensors")
        self.check_rollouts(step, given)
        self.check_rates(step, given)
        rows = self.score(step, given)
        found = self.learn(step, rows, self.policy, self.policy_row, "actor") | self.learn(step, rows, self.critic, self.critic_row, "critic")
        for name, value in found.items():
            self.compare(step, name, value)

    def compare(self, step: int, name: str, value: float, absolute: float = ABSOLUTE) -> None:
        self.table.add(step, name, self.rows[step][name], value, absolute)

    def check_rollouts(self, step: int, given: dict[str, np.ndarray]) -> None:
        """Rewards and lengths, from samples.jsonl, which must be the rollouts of the batch."""
        samples, mask = self.samples[step], given["batch.response_mask"]
        valid, failed = mask.any(1), given["scores.rewards.failed"]
        reward = np.array([s["reward"] for s in samples])
        lengths = np.array([s["tokens"] for s in samples], dtype=float)[valid]
        sources = {name: given[f"scores.rewards.by_source.{name}"].astype(float) for name in self.config["rewards"]}
        weighted = sum(self.config["rewards"][name]["weight"] * scores for name, scores in sources.items())
        self.table.bound(step, "samples.jsonl: reward - weighted scores", np.abs(reward - np.where(failed, 0, weighted)).max(), 1e-6)
        self.table.bound(step, "samples.jsonl: tokens - response mask", np.abs(lengths - mask.sum(1)[valid]).max(), 0)
        truncated = np.array([s["finish_reason"] == "length" for s in samples])
        self.table.bound(step, "samples.jsonl: truncated, batch: not", float((truncated != given["batch.truncated"]).sum()), 0)
        counted = valid & ~failed
        names = np.array([s["source"] for s in samples])
        groups = given["batch.groups"]
        differ = [np.ptp(reward[(groups == group) & ~failed]) > 0 for group in np.unique(groups) if (~failed[groups == group]).any()]
        version = (step - 1 - given["batch.weight_versions"])[mask]
        for name, value in {
            "train/reward": reward[counted].mean(),
            "reward/std": reward[counted].std(),
            "reward/failed": failed.sum(),
            **{f"reward/{name}": scores[counted].mean() for name, scores in sources.items()},
            **{f"reward_by_source/{name}": reward[counted & (names == name)].mean() for name in np.unique(names[counted])},
            "train/avg_response_len": lengths.mean(),
            "response/length_p50": np.percentile(lengths, 50),
            "response/length_p95": np.percentile(lengths, 95),
            "response/length_max": lengths.max(),
            "response/truncated_fraction": truncated[valid].mean(),
            "rollouts/valid": valid.sum(),
            "rollouts/dropped": (~valid).sum(),
            "groups/drawn": len(np.unique(groups)),
            "groups/with_signal": sum(differ),
            "staleness/mean": version.mean(),
            "staleness/max": version.max(),
        }.items():
            self.compare(step, name, float(value))

    def check_rates(self, step: int, given: dict[str, np.ndarray]) -> None:
        """Counts, and what they make of the seconds that the row says."""
        row, tokens, rollouts = self.rows[step], int(given["batch.response_mask"].sum()), len(given["batch.lengths"])
        seconds = sum(row[f"time/{phase}_s"] for phase in PHASES)
        self.tokens_generated, self.rollouts, self.seconds = self.tokens_generated + tokens, self.rollouts + rollouts, self.seconds + seconds
        left = (self.config["steps"] - step) * self.seconds / step / 60
        for name, value in {
            "train/global_step": step,
            "train/num_tokens_generated": self.tokens_generated,
            "time/step_s": seconds,
            "train/tokens_per_second": tokens / seconds,
            "train/samples_per_second": rollouts / seconds,
            "train/steps_per_second": 1 / seconds,
            "train/tokens_per_second_avg": self.tokens_generated / self.seconds,
            "train/samples_per_second_avg": self.rollouts / self.seconds,
            "train/steps_per_second_avg": step / self.seconds,
            "train/eta_minutes": left,
            "system/epoch_time": left,
            "train/epoch": math.ceil(step * self.config["prompts_per_step"] / self.num_prompts),
            "weights/version": step,
            "weights/publish_bytes": sum(4 * p.numel() for p in self.policy.model.parameters()),
            "policy/skipped_updates": 0,
            "critic/skipped_updates": 0,
        }.items():
            self.compare(step, name, value)

    def score(self, step: int, given: dict[str, np.ndarray]) -> dict[int, Row]:
        """What the models say, and the advantages that follow, of every rollout that counts."""
        mask = given["batch.response_mask"] & ~given["scores.rewards.failed"][:, None]
        rows = {b: self.row(given, b, np.flatnonzero(mask[b])) for b in np.flatnonzero(mask.any(1)).tolist()}

        def column(name: str) -> np.ndarray:
            return np.concatenate([getattr(row, name) for row in rows.values()])

        def recorded(name: str) -> np.ndarray:
            return np.concatenate([given[name][b, row.at] for b, row in rows.items()])

        for name, ours in (("policy_logprobs", "old"), ("reference_logprobs", "reference"), ("values", "values")):
            self.table.bound(step, f"{name}: largest difference", np.abs(recorded(f"scores.{name}") - column(ours)).max(), LOGPROBS)
        values, returns, gap = column("values"), column("returns"), np.abs(recorded("batch.generator_logprobs") - column("old"))
        shift, scale = (column("advantages").mean(), column("advantages").std() + 1e-8) if self.algorithm["whiten_advantages"] is not False else (0.0, 1.0)
        learnt = (column("advantages") - shift) / scale
        self.table.bound(step, "generator's logprobs: largest difference", gap.max(), GAP)
        for name, value, absolute in (
            ("train/kl_ref", (column("old") - column("reference")).mean(), ABSOLUTE),
            ("generator/logprob_gap_mean", gap.mean(), LOGPROBS),
            ("generator/logprob_gap_max", gap.max(), LOGPROBS),
            ("critic/values_mean", values.mean(), ABSOLUTE),
            ("critic/returns_mean", returns.mean(), ABSOLUTE),
            ("critic/explained_variance", 1 - (returns - values).var() / returns.var(), ABSOLUTE),
            ("advantages/mean", learnt.mean(), ABSOLUTE),
            ("advantages/std", learnt.std(), ABSOLUTE),
        ):
            self.compare(step, name, float(value), absolute)
        return {b: replace(row, advantages=(row.advantages - shift) / scale) for b, row in rows.items()}

    def row(self, given: dict[str, np.ndarray], b: int, at: np.ndarray) -> Row:
        """One rollout through all models, and its advantages before whitening."""
        length, algorithm = int(given["batch.lengths"][b]), self.algorithm
        ids = torch.from_numpy(given["batch.token_ids"][b, :length]).long()
        with torch.no_grad():
            old = token_logprobs(self.policy.model, ids, self.temperature)[0].numpy()[at]
            reference = token_logprobs(self.reference, ids, self.temperature)[0].numpy()[at]
            values = token_values(self.critic.model, ids).numpy()
        score = sum(source["weight"] * float(given[f"scores.rewards.by_source.{name}"][b]) for name, source in self.config["rewards"].items())
        bootstrapped = bool(given["batch.truncated"][b]) and algorithm["truncated"] == "bootstrap"
        rewards = [-algorithm["kl_coef"] * penalty(algorithm["kl_estimator"], p, q) for p, q in zip(old, reference, strict=True)]
        rewards[-1] += 0.0 if bootstrapped else score
        after = float(values[length]) if bootstrapped else 0.0
        advantages = np.array(gae(rewards, values[at].tolist(), after, algorithm["discount"], algorithm["gae_lambda"]))
        return Row(ids, at, old, reference, values[at], advantages, advantages + values[at])

    def policy_row(self, row: Row) -> dict[str, torch.Tensor]:
        logprobs, entropy = token_logprobs(self.policy.model, row.ids, self.temperature)
        return policy_terms(logprobs[row.at], torch.from_numpy(row.old), torch.from_numpy(row.advantages), entropy[row.at], self.algorithm)

    def critic_row(self, row: Row) -> dict[str, torch.Tensor]:
        values = token_values(self.critic.model, row.ids)
        return value_terms(values[row.at], torch.from_numpy(row.values), torch.from_numpy(row.returns), self.algorithm)

    def learn(self, step: int, rows: dict[int, Row], learner: Learner, terms: Callable[[Row], dict[str, torch.Tensor]], name: str) -> dict[str, float]:
        """All PPO epochs of one learner; the statistics of the last: one sum over tokens divided by one count."""
        sums: dict[str, float] = {}
        norms, tokens, lr = [], 0, 0.0
        for epoch in range(self.algorithm["ppo_epochs"]):
            sums, norms, tokens = {}, [], 0
            for mini_batch in self.mini_batches(step, epoch):
                members = [rows[b] for b in mini_batch if b in rows]
                count = sum(len(row.at) for row in members)
                for row in members:
                    parts = terms(row)
                    (parts[f"train/{name}_loss"] / count).backward()
                    sums = {key: sums.get(key, 0.0) + part.item() for key, part in parts.items()}
                lr = learner.lr
                norms.append(learner.step())
                tokens += count
        return {key: value / tokens for key, value in sums.items()} | {f"train/{name}_grad_norm": sum(norms) / len(norms), f"train/{name}_lr": lr}

    def mini_batches(self, step: int, epoch: int) -> Iterator[np.ndarray]:
        size = self.algorithm["mini_batch_size"]
        order = np.random.default_rng([self.config["seed"], step - 1, epoch]).permutation(self.rollouts_per_step)
        return (order[start : start + size] for start in range(0, len(order), size))

    def check_model(self, step: int) -> None:
        """What all updates came to, against the model that the run wrote: length of the difference as a share of the way."""
        written = load_file(self.run / "ppo" / "model" / "model.safetensors")
        way = difference = 0.0
        for name, before in self.start.items():
            after = self.policy.model.get_parameter(name).detach()
            way += float((after - before).square().sum())
            difference += float((after - torch.from_numpy(written[name]).double()).square().sum())
        self.table.bound(step, "weights of the policy: difference / way", math.sqrt(difference / way), WEIGHTS)


# ---------------------------------------------------------------------------------------------------- the program


def by_step(path: Path, which: Callable[[dict], bool]) -> dict[int, list[dict]]:
    steps: dict[int, list[dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if which(row):
            steps.setdefault(row["step"], []).append(row)
    return steps


def uncovered(config: dict, steps: int, samples: dict[int, list[dict]]) -> str | None:
    """Why the run cannot be recomputed, in one sentence."""
    for name, needed in COVERED.items():
        section, _, key = name.partition(".")
        if config[section][key] != needed:
            return f"{name}={config[section][key]}, but this script covers {needed}"
    if not steps:
        return "there is no batches/step-000001.safetensors; run with logging.batches of at least the number of steps"
    rollouts = config["prompts_per_step"] * config["sampling"]["n"]
    short = next((step for step in range(1, steps + 1) if len(samples.get(step, [])) < rollouts), None)
    return None if short is None else f"samples.jsonl lacks rollouts of step {short}; run with logging.samples_per_step={rollouts}"


def main(run: Path) -> int:
    directory = run / "ppo"
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    rows = {step: found[0] for step, found in by_step(directory / "metrics.jsonl", lambda row: "train/epoch" in row).items()}
    samples = by_step(directory / "samples.jsonl", lambda row: row["kind"] == "train")
    steps = 0
    while (directory / "batches" / f"step-{steps + 1:06d}.safetensors").exists():
        steps += 1
    reason = uncovered(config, steps, samples)
    if reason is not None:
        print(f"{directory}: {reason}", file=sys.stderr)
        return 2
    table = Table()
    replay = Replay(run, config, rows, samples, table)
    for step in range(1, steps + 1):
        replay.step(step)
    if steps == config["steps"] and (directory / "model").exists():
        replay.check_model(steps)
    table.print()
    compared = {name for _, name, *_ in table.lines} | {"step"} | {f"time/{phase}_s" for phase in PHASES}
    print(f"\nnot recomputed: {', '.join(sorted(rows[1].keys() - compared))}")
    print(f"{len(table.lines)} numbers of {steps} steps, {table.differing} differ")
    return 1 if table.differing else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the run, <output_dir>/<run>")
    logging.set_verbosity_error()  # from_pretrained would report the critic's fresh head as a problem
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    sys.exit(main(parser.parse_args().run))
