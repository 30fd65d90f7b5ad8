"""What a PPO job settles before any process starts: which models, which prompts, where to go on. Bad input is refused here.

Whatever can be refused without a tokenizer is refused before one is loaded, and torch with it.
"""

import logging
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from actors.parent import driver_restarts
from actors.placement import roles_of
from actors.preflight import check_engine
from actors.prometheus import sinks
from actors.reward_sources import check_sources, check_vocabularies, reward_models
from minigpt_ray.checkpoint import Checkpoints
from minigpt_ray.cli import resolved, write_resolved
from minigpt_ray.config import AnyPlacement, ModelReward, PPOConfig, SupervisedConfig, VerifierReward
from minigpt_ray.data.prompts import PromptSet, encode_prompts, longest, read_prompts
from minigpt_ray.data.rows import Row
from minigpt_ray.flops import PPOShapes
from minigpt_ray.inputs import Inputs
from minigpt_ray.memory import per_process
from minigpt_ray.model_directory import check_context, config_json, resolve_model
from minigpt_ray.object_store import check_store
from minigpt_ray.presets import ModelShape
from minigpt_ray.status import refuse_another
from minigpt_ray.timeline import Mark
from minigpt_ray.tokenizer import load_tokenizer
from minigpt_ray.tracking import Tracker, writing

logger = logging.getLogger(__name__)

MAY_DIFFER_ON_RESUME = (
    *("run", "output_dir", "export_to", "steps", "logging", "checkpoint", "evaluation", "placement", "generator"),
    *("weights", "restart_limit", "score_chunk", "algorithm.non_finite"),
)
"""Fields, or sections, of the configuration that a resumed run may change; any other difference would be another run."""
OF_MEMORY = ("micro_batch_tokens", "activation_checkpointing")
"""The same in every section: how much is computed at a time, not what."""
LEARNER_RANKS = ("placement.policy.ranks", "placement.critic.ranks")
"""What of these may not: a checkpoint has a file for every rank."""
REWARD_FIELDS_THAT_MAY_DIFFER = ("url", "token_env", "timeout_s", "retries", "backoff_s", "concurrency", "max_response_bytes", "max_errors", "max_outages")
"""The same for a reward source: where it is and how patiently it is asked, not what it says."""


class Preparation:
    """A PPO configuration with everything that it refers to found, read and checked.

    Raises ValueError or FileNotFoundError with one sentence that names the place and the remedy.
    """

    def __init__(self, config: PPOConfig) -> None:
        self.config = config
        check_store(config.export_to)
        check_engine(config.generator, config.placement.generator)
        self.directory = config.stage_dir("ppo")
        self.policy_path = resolve_model(config.policy.init_from, config.run_dir)
        self.checkpoints = Checkpoints(self.directory / "checkpoint", config.checkpoint.keep)
        self.start = find_start(config, self.directory, self.checkpoints, MAY_DIFFER_ON_RESUME)
        default = config.stage_dir("prepare_data")
        prompts = read_prompts(config.data, default / "prompts.jsonl")
        held_out = read_prompts(config.evaluation.data, default / "held_out.jsonl")
        self._check_rewards(prompts)
        self.inputs = self._inputs(config.data.files or (default / "prompts.jsonl",))
        if self.start is not None:
            self.inputs.refuse_others(self.directory, self.start)
        self.tokenizer = load_tokenizer(self.policy_path)
        self.prompts = encode_prompts(config.data, prompts, self.tokenizer)
        self.held_out = encode_prompts(config.evaluation.data, held_out, self.tokenizer).prompts[: config.evaluation.num_prompts]
        self._check_models()

    @property
    def roles(self) -> dict[str, AnyPlacement]:
        return roles_of(self.config.placement, self.config.rewards, self.config.algorithm.uses_critic)

    @property
    def memory(self) -> dict[str, float]:
        """Estimated GiB of one rank of these roles, as far as it is known."""
        return per_process(self.config)

    @property
    def max_model_len(self) -> int:
        """Longest prompt and longest response together, at least what the probe of the weights takes: its tokens and one more."""
        from actors.weights import PROBE_LENGTH  # imports torch, which this module does not

        return max(max(self._prompt_lengths.values()) + max(self._response_lengths.values()), PROBE_LENGTH + 1)

    @property
    def _prompt_lengths(self) -> dict[str, int]:
        """The longest of each set, by its section."""
        return {"data": longest(self.prompts.prompts), "evaluation.data": longest(self.held_out)}

    @property
    def _response_lengths(self) -> dict[str, int]:
        return {"sampling.max_tokens": self.config.sampling.max_tokens, "evaluation.sampling.max_tokens": self.config.evaluation.sampling.max_tokens}

    def _check_models(self) -> None:
        """Every model can read the longest prompt with the longest response, and a reward model the policy's token ids."""
        check_context(self._models(), self._prompt_lengths, self._response_lengths)
        check_vocabularies(self.config.rewards, self.config.run_dir, {"the policy": self.tokenizer})

    def _models(self) -> dict[str, str]:
        """What `from_pretrained` takes, of every role and reward source that has a model, by its section."""
        config = self.config
        roles = {"policy": config.policy.init_from, "reference": config.reference.init_from}
        if config.algorithm.uses_critic:
            roles["critic"] = config.critic.init_from
        return {role: self._path(init_from) for role, init_from in roles.items()} | reward_models(config.rewards, config.run_dir)

    @cached_property
    def shapes(self) -> PPOShapes:
        """Shapes of all models, for counting FLOPs."""
        policy = self._shape(self.config.policy.init_from)
        assert policy.vocab_size is not None
        rewards = tuple(self._shape(source.init_from) for source in self.config.rewards.values() if isinstance(source, ModelReward))
        critic = self._shape(self.config.critic.init_from) if self.config.algorithm.uses_critic else None
        return PPOShapes(policy, critic, self._shape(self.config.reference.init_from), rewards, policy.vocab_size)

    def _shape(self, init_from: str) -> ModelShape:
        return ModelShape.from_config_json(config_json(self._path(init_from)))

    def _path(self, init_from: str) -> str:
        return self.policy_path if init_from == "policy" else resolve_model(init_from, self.config.run_dir)

    def _inputs(self, files: Sequence[Path]) -> Inputs:
        """What a run begins from; evaluation may have other prompts when it goes on."""
        found = self._models()
        return Inputs.of({f"{name}.init_from": path for name, path in found.items() if name == "policy" or path != self.policy_path}, files)

    def tracker(self) -> Tracker:
        """Opens the run's files, cut back to the checkpoint that the run goes on from."""
        refuse_another(self.directory)  # which may have begun meanwhile
        with writing(self.directory / "config.yaml"):
            write_resolved(self.config, self.directory)
            if self.start is None:
                self.inputs.keep(self.directory)
        step = 0 if self.start is None else self.checkpoints.step_of(self.start)
        epochs = -(-self.config.steps * self.config.prompts_per_step // len(self.prompts))
        exported = sinks(self.config.logging, self.config.run, "ppo")
        tracker = Tracker(self.directory, "ppo", resolved(self.config), self.config.logging, self.config.steps, step, epochs=epochs, sinks=exported)
        if driver_restarts():
            tracker.events("driver", marks=[Mark("driver restarted", time.time())])
        tracker.message(self._greeting(self.prompts, step))
        return tracker

    def _greeting(self, prompts: PromptSet, step: int) -> str:
        lost = f" ({prompts.dropped} too long and dropped, {prompts.truncated} cut)" if prompts.dropped or prompts.truncated else ""
        beginning = f"goes on after step {step}" if step else "starts"
        return f"PPO {beginning}: {len(prompts):,} prompts{lost}, {len(self.held_out):,} held out, policy {self.policy_path}"

    def _check_rewards(self, prompts: Sequence[Row]) -> None:
        without = sum(prompt.answer is None for prompt in prompts)
        for name, source in self.config.rewards.items():
            if isinstance(source, VerifierReward) and without:
                raise ValueError(
                    f"rewards.{name} verifies answers, but {without} of {len(prompts)} prompts carry none; give every prompt an answer or use another reward"
                )
        check_sources(self.config.rewards, self.config.run_dir)


def find_start(config: PPOConfig | SupervisedConfig, directory: Path, checkpoints: Checkpoints, may_differ: Collection[str]) -> Path | None:
    """The checkpoint to go on from, None for the beginning.

    Raises ValueError where checkpoint.resume=never would write over an earlier run, where a resumed run would be another run
    than the one that was saved, and where another driver is at it.
    """
    if config.checkpoint.resume == "never":
        found = [path for path in (directory / "checkpoint", directory / "model", directory / "metrics.jsonl") if path.exists()]
        if found:
            raise ValueError(
                f"{found[0]} is there from an earlier run, which would be written over; go on from it with checkpoint.resume=auto, choose another run=, or remove {directory}"
            )
        return None
    refuse_another(directory)
    start = checkpoints.latest()
    if start is not None:
        refuse_differences(yaml.safe_load((start / "config.yaml").read_text()), resolved(config), start, may_differ)
    return start


def refuse_differences(before: Mapping[str, Any], now: Mapping[str, Any], start: Path, may_differ: Collection[str] = MAY_DIFFER_ON_RESUME) -> None:
    """Raise ValueError, naming every field, when a resumed run would not be the run that was saved."""
    old, new = _flat(before), _flat(now)
    different = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    changed = [name for name in different if name in LEARNER_RANKS or not _may_differ(name, may_differ)]
    if changed:
        listed = ", ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in changed)
        raise ValueError(f"cannot resume from {start}, the configuration has changed ({listed}); undo that, or choose another run=")


def _may_differ(name: str, may_differ: Collection[str]) -> bool:
    field = name.rpartition(".")[2]
    within = any(name == allowed or name.startswith(f"{allowed}.") for allowed in may_differ)
    return within or field in OF_MEMORY or (name.startswith("rewards.") and field in REWARD_FIELDS_THAT_MAY_DIFFER)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
