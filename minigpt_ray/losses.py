"""Losses and the token arithmetic below them.

Every loss and statistic is a sum over tokens divided by a count that is passed in (the tokens of the whole optimizer
step, over all ranks and micro-batches), so that micro-batches and ranks add up to what one large batch would give.
What stands in masked positions, even inf or nan, changes neither a value nor a gradient.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from minigpt_ray.config import AlgorithmConfig, DPOConfig
from minigpt_ray.rl.experience import Experience
from minigpt_ray.rl.kl import KL_ESTIMATORS, k3


def align(x: Float[Tensor, "B T *rest"]) -> Float[Tensor, "B T+1 *rest"]:
    """Shift model outputs to the tokens they speak about: column t is the output at position t - 1, column 0 is zero."""
    return torch.cat([torch.zeros_like(x[:, :1]), x], dim=1)


def token_values(head_outputs: Float[Tensor, "B T"]) -> Float[Tensor, "B T+1"]:
    """The critic's estimate before token t, column 0 is 0; column `lengths[b]` is the estimate after the last token of row b."""
    return align(head_outputs.float())


def language_model_loss(logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], num_tokens: int) -> Float[Tensor, ""]:
    """Negative log-likelihood of the tokens under the mask, in nats: -sum(logprobs) / num_tokens."""
    return -token_mean(torch.where(mask, logprobs, 0), num_tokens)


# ------------------------------------------------------------------------------------------------ preference pairs


def log_odds_loss(margins: Float[Tensor, "P"], label_smoothing: float = 0.0) -> Float[Tensor, "P"]:
    """-log sigmoid(margin), the Bradley-Terry negative log-likelihood that the better answer wins, for each pair.

    With label smoothing as if a share of the pairs were labelled the wrong way round (cDPO, ericmitchell.ai/cdpo.pdf).
    """
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


@dataclass(frozen=True)
class PairLogprobs:
    """What a model says about the two answers of P pairs."""

    chosen: Float[Tensor, "P"]
    """Sum over the tokens of the answer."""
    rejected: Float[Tensor, "P"]
    chosen_lengths: Float[Tensor, "P"]
    """Tokens."""
    rejected_lengths: Float[Tensor, "P"]

    @property
    def means(self) -> "PairLogprobs":
        """The same for a token of each answer."""
        one = torch.ones_like(self.chosen)
        return PairLogprobs(self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths, one, one)

    def above(self, reference: "PairLogprobs") -> "PairLogprobs":
        """log(policy / reference) of each answer."""
        return PairLogprobs(self.chosen - reference.chosen, self.rejected - reference.rejected, self.chosen_lengths, self.rejected_lengths)


Preferences = tuple[Float[Tensor, "P"], Float[Tensor, "P"], Float[Tensor, "P"]]
"""Loss of each pair, and the implicit rewards of its answers."""


def dpo_losses(policy: PairLogprobs, reference: PairLogprobs, config: DPOConfig) -> Preferences:
    """-log sigmoid(beta * (gain of the chosen answer - gain of the rejected)), gain = log(policy / reference) (arXiv:2305.18290)."""
    gains = policy.above(reference)
    chosen, rejected = config.beta * gains.chosen, config.beta * gains.rejected
    return log_odds_loss(chosen - rejected, config.label_smoothing), chosen, rejected


def ipo_losses(policy: PairLogprobs, reference: PairLogprobs, config: DPOConfig) -> Preferences:
    """(gain of the chosen answer - gain of the rejected - 1 / (2 beta))^2 (arXiv:2310.12036, eq. 17), gains for a token, as its authors train."""
    gains = policy.above(reference).means
    return (gains.chosen - gains.rejected - 1 / (2 * config.beta)).square(), config.beta * gains.chosen, config.beta * gains.rejected


def simpo_losses(policy: PairLogprobs, reference: PairLogprobs, config: DPOConfig) -> Preferences:
    """-log sigmoid(beta * (mean logprob of the chosen answer - of the rejected) - gamma) (arXiv:2405.14734); no reference is read."""
    chosen, rejected = config.beta * policy.means.chosen, config.beta * policy.means.rejected
    return log_odds_loss(chosen - rejected - config.gamma, config.label_smoothing), chosen, rejected


PREFERENCE_LOSSES = {"dpo": dpo_losses, "ipo": ipo_losses, "simpo": simpo_losses}


# ------------------------------------------------------------------------------------------------------------- PPO


@dataclass(frozen=True)
class Loss:
    """A loss and its statistics; both add up over micro-batches and ranks."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    stats: dict[str, Float[Tensor, ""]]
    """Detached, by name."""


def policy_loss(logprobs: Float[Tensor, "B T"], entropy: Float[Tensor, "B T"], experience: Experience, num_tokens: int, algorithm: AlgorithmConfig) -> Loss:
    """What the policy minimises: the clipped surrogate loss - entropy_coef * entropy, and with kl_in=loss + kl_coef * KL to the reference."""
    mask = experience.response_mask
    surrogate = clipped_policy_loss(
        logprobs, experience.logprobs, experience.advantages, mask, num_tokens, algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip
    )
    mean_entropy = token_mean(torch.where(mask, entropy, 0), num_tokens)
    loss, stats = surrogate.loss - algorithm.entropy_coef * mean_entropy, surrogate.stats | {"entropy": mean_entropy.detach()}
    if algorithm.kl_in == "loss":
        kl = kl_loss(logprobs, experience.reference_logprobs, mask, num_tokens, algorithm.kl_estimator)
        loss, stats = loss + experience.kl_coef * kl, stats | {"kl_loss": kl.detach()}
    return Loss(loss, {"actor_loss": loss.detach(), **stats})


def clipped_policy_loss(
    logprobs: Float[Tensor, "B T"],
    old_logprobs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    num_tokens: int,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> Loss:
    """Clipped surrogate loss (arXiv:1707.06347), summed over tokens and divided by num_tokens.

    -min(ratio * A, clamp(ratio, 1 - clip_low, 1 + clip_high) * A), ratio = exp(logprobs - old_logprobs); for A < 0 at most
    -dual_clip * A (arXiv:1912.09729), None: without bound.

    The KL is KL(old || new) by k3 on tokens that the old policy drew: ratio - 1 - log(ratio), unbiased and never negative.
    A token counts as clipped where the clip is what stops its gradient: low and dual for A < 0, high for A > 0.
    """
    logprobs, old_logprobs, advantages = (torch.where(mask, x, 0) for x in (logprobs, old_logprobs, advantages))
    ratio = (logprobs - old_logprobs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    ratio = ratio.detach()
    stats = {
        "kl": token_mean(k3(old_logprobs, logprobs.detach()), num_tokens),
        "ratio_mean": token_mean(torch.where(mask, ratio, 0), num_tokens),
        "clip_fraction_low": token_mean(((ratio < 1 - clip_low) & (advantages < 0)).float(), num_tokens),
        "clip_fraction_high": token_mean(((ratio > 1 + clip_high) & (advantages > 0)).float(), num_tokens),
    }
    if dual_clip is not None:
        stats["clip_fraction_dual"] = token_mean(((ratio > dual_clip) & (advantages < 0)).float(), num_tokens)
    return Loss(token_mean(-surrogate, num_tokens), stats)


def kl_loss(
    logprobs: Float[Tensor, "B T"], reference_logprobs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], num_tokens: int, estimator: str
) -> Float[Tensor, ""]:
    """KL(policy || reference) as the estimator sees it, summed over tokens and divided by num_tokens.

    On tokens that the policy drew; those that it drew before the step's earlier updates count alike, without a ratio.
    """
    logprobs, reference_logprobs = (torch.where(mask, x, 0) for x in (logprobs, reference_logprobs))
    return token_mean(KL_ESTIMATORS[estimator](logprobs, reference_logprobs), num_tokens)


def clipped_value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    num_tokens: int,
    value_clip: float | None,
) -> Loss:
    """Half the squared error, summed over tokens and divided by num_tokens, flat beyond old_values +- value_clip.

    max((values - returns)^2, (old_values + clamp(values - old_values, -value_clip, value_clip) - returns)^2) / 2; None: no clip.
    A token counts as clipped where the second term is the larger one, so that it has no gradient.
    """
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    error = (values - returns).square()
    clipped = error
    if value_clip is not None:
        clipped = (values.clamp(old_values - value_clip, old_values + value_clip) - returns).square()
    loss = token_mean(torch.maximum(error, clipped) / 2, num_tokens)
    stats = {
        "critic_loss": loss.detach(),
        "value_clip_fraction": token_mean((clipped > error).float(), num_tokens),
    }
    return Loss(loss, stats)


def token_mean(x: Float[Tensor, "B T"], num_tokens: int) -> Float[Tensor, ""]:
    """sum(x) / num_tokens, the tokens of the whole optimizer step; 0 for a step without any."""
    return x.sum() / max(num_tokens, 1)
