"""What PPO computes: estimator, clips, KL, penalties."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from minigpt_ray.config.base import Config


class AlgorithmConfig(Config):
    """What PPO computes from a batch of rollouts: advantages, rewards, KL, losses, updates."""

    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    """Advantage estimator: gae (arXiv:1506.02438) learns a critic; rloo (arXiv:2402.14740), grpo (arXiv:2402.03300) and reinforce++ (arXiv:2501.03262) start none."""
    discount: float = Field(default=1.0, gt=0, le=1)
    """Discount per token, for gae and reinforce++; rloo and grpo judge whole responses."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of GAE: 1 is return minus value, 0 the one-step TD error."""
    divide_by_group_std: bool = True
    """Whether grpo divides by the group's standard deviation; false: without the bias to the easiest and hardest prompts (arXiv:2503.20783)."""
    whiten_advantages: bool | None = None
    """Shift and scale advantages to mean 0 and standard deviation 1 over all response tokens of the step; none: with gae and reinforce++, and not with rloo and grpo, where it moves groups without signal away from 0."""
    replacement_rounds: NonNegativeInt = 0
    """Rounds in which prompts whose rollouts all earn the same, and so teach nothing, are replaced by the next ones (dynamic sampling, arXiv:2503.14476)."""

    truncated: Literal["score", "bootstrap"] = "score"
    """What a response cut at sampling.max_tokens is worth: its score, as the limit is part of the task, or, in place of the score, the critic's estimate after its last token. Never both: a response that never ends would then earn twice."""
    normalize_rewards: bool = False
    """Subtract the mean and divide by the standard deviation of all weighted rewards since the run began (arXiv:2307.04964)."""
    reward_clip: PositiveFloat | None = None
    """The weighted reward, normalised if so configured, is clipped to [-reward_clip, reward_clip]; none: no clip."""
    length_penalty: NonNegativeFloat = 0.0
    """Taken off the rewards, after normalisation and clip, for every response token beyond length_free. With 1 / buffer, and length_free = sampling.max_tokens - buffer, the soft overlong punishment of arXiv:2503.14476."""
    length_free: NonNegativeInt = 0
    """Response tokens that cost nothing."""

    kl_coef: NonNegativeFloat = 0.01
    """Weight of the KL penalty to the reference; with kl_target its value in the first step."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the penalty is taken: off the rewards of tokens, so that advantages hold it, or as a term of the policy's loss (as in arXiv:2402.03300)."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"
    """Estimator of the KL penalty. In the loss its gradient counts: k2 has that of KL(policy || reference), k3 that of KL(reference || policy), k1 none (arXiv:2506.09477)."""
    kl_target: PositiveFloat | None = None
    """KL to the reference, in nats per token (train/kl_ref), to which kl_coef is adapted after every step (arXiv:1909.08593); none: kl_coef is fixed."""
    kl_horizon: float = Field(default=10.0, ge=1)
    """Inertia of the adaptation, in steps: a KL that is off by 20 % or more changes kl_coef by 20 % / kl_horizon; 10 is the paper's."""

    clip_low: PositiveFloat = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high] (arXiv:1707.06347)."""
    clip_high: PositiveFloat = 0.2
    """Larger than clip_low it lets unlikely tokens rise (arXiv:2503.14476 takes 0.28)."""
    dual_clip: float | None = Field(default=None, gt=1)
    """For a negative advantage the ratio counts at most so much, 3 for example (arXiv:1912.09729); none: no bound."""
    value_clip: PositiveFloat | None = 0.2
    """Values move at most this far from the old ones before the loss goes flat; none: no clip."""
    entropy_coef: NonNegativeFloat = 0.0
    """Weight of the entropy bonus."""

    ppo_epochs: PositiveInt = 1
    """Passes over the step's rollouts."""
    mini_batch_size: PositiveInt = 64
    """Rollouts per optimizer step, over all ranks."""
    kl_stop: PositiveFloat | None = None
    """A mini-batch on which the policy has moved further than this from the one that sampled (train/kl, nats per token) is not learnt from, nor any after it in the step; the critic learns on. none: no early stop."""
    critic_warmup_steps: NonNegativeInt = 0
    """First steps in which only the critic learns."""
    non_finite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite no update is applied; then the run stops, or goes on and counts it."""

    @property
    def uses_critic(self) -> bool:
        return self.estimator == "gae"

    @property
    def whitens(self) -> bool:
        return self.estimator in ("gae", "reinforce++") if self.whiten_advantages is None else self.whiten_advantages

    @model_validator(mode="after")
    def _possible(self) -> "AlgorithmConfig":
        if not self.uses_critic and self.truncated == "bootstrap":
            raise ValueError(
                f"truncated=bootstrap needs a critic's estimate, but estimator={self.estimator} starts no critic; set truncated=score or estimator=gae"
            )
        if not self.uses_critic and self.critic_warmup_steps:
            raise ValueError(
                f"critic_warmup_steps={self.critic_warmup_steps} waits for a critic, but estimator={self.estimator} starts none; set it to 0 or estimator=gae"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            raise ValueError("kl_in=loss with kl_estimator=k1 has no gradient on average; set kl_estimator=k2 or k3, or kl_in=reward")
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError(f"kl_target={self.kl_target:g} adapts kl_coef by a factor, and kl_coef=0 stays 0; start from a small positive kl_coef")
        return self
