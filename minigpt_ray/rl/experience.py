"""The values of one PPO step: Prompt -> Rollout -> RolloutBatch -> Scores -> Experience.

All are frozen and complete when built. A batch has B rollouts (rows) and T columns; a row is its prompt followed by
its response, padded on the right. Column t speaks about token t: `logprobs[b, t]` = log p(token t | tokens < t),
`values[b, t]` is the critic's estimate before token t, `rewards[b, t]` arrives after it. Masks are bool, True counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from minigpt_ray.rl.rollout import Prompt as Prompt
from minigpt_ray.rl.rollout import Rollout as Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts as padded tensors: 13 bytes a token, 25 as an Experience."""

    token_ids: Int[Tensor, "B T"]
    prompt_lengths: Int[Tensor, "B"]
    lengths: Int[Tensor, "B"]
    """Prompt and response together."""
    response_mask: Bool[Tensor, "B T"]
    """True on the tokens that the policy wrote in a valid rollout: what every loss and metric counts."""
    truncated: Bool[Tensor, "B"]
    groups: Int[Tensor, "B"]
    generator_logprobs: Float[Tensor, "B T"]
    weight_versions: Int[Tensor, "B T"]

    @classmethod
    def of(cls, rollouts: Sequence[Rollout]) -> "RolloutBatch":
        """Pad rollouts to the longest; ids 0, masks False, floats 0 in the padding."""
        size = len(rollouts)
        prompt_lengths = [len(r.prompt.token_ids) for r in rollouts]
        lengths = [p + len(r.token_ids) for p, r in zip(prompt_lengths, rollouts, strict=True)]
        width = max(lengths)
        token_ids = np.zeros((size, width), np.int32)
        mask = np.zeros((size, width), bool)
        logprobs = np.zeros((size, width), np.float32)
        versions = np.zeros((size, width), np.int32)
        for row, (rollout, start, end) in enumerate(zip(rollouts, prompt_lengths, lengths, strict=True)):
            token_ids[row, :start] = rollout.prompt.token_ids
            token_ids[row, start:end] = rollout.token_ids
            mask[row, start:end] = rollout.model_mask & rollout.valid
            logprobs[row, start:end] = rollout.logprobs
            versions[row, start:end] = rollout.weight_versions
        return cls(
            token_ids=torch.from_numpy(token_ids),
            prompt_lengths=torch.tensor(prompt_lengths, dtype=torch.int32),
            lengths=torch.tensor(lengths, dtype=torch.int32),
            response_mask=torch.from_numpy(mask),
            truncated=torch.tensor([r.truncated for r in rollouts]),
            groups=torch.tensor([r.group for r in rollouts], dtype=torch.int32),
            generator_logprobs=torch.from_numpy(logprobs),
            weight_versions=torch.from_numpy(versions),
        )

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class RewardScores:
    """Rewards of whole responses, by source and weighted together."""

    total: Float[Tensor, "B"]
    by_source: dict[str, Float[Tensor, "B"]]
    """Unweighted."""
    failed: Bool[Tensor, "B"]
    """True where a source gave no score; such a rollout does not count."""

    def rows(self, index: Int[Tensor, "R"]) -> "RewardScores":
        return RewardScores(self.total[index], {name: scores[index] for name, scores in self.by_source.items()}, self.failed[index])

    @classmethod
    def join(cls, parts: Sequence["RewardScores"]) -> "RewardScores":
        """The rows of all parts, one after the other."""
        by_source = {name: torch.cat([part.by_source[name] for part in parts]) for name in parts[0].by_source}
        return cls(torch.cat([part.total for part in parts]), by_source, torch.cat([part.failed for part in parts]))


@dataclass(frozen=True)
class Scores:
    """What the models and reward sources say about a RolloutBatch."""

    policy_logprobs: Float[Tensor, "B T"]
    reference_logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T+1"]
    """`values[b, lengths[b]]` is the estimate after the last token: the bootstrap of a truncated response. 0 without a critic."""
    rewards: RewardScores

    def rows(self, index: Int[Tensor, "R"], width: int) -> "Scores":
        """The given rows, cut to `width` tokens, which none of them exceeds."""
        logprobs, reference, values = self.policy_logprobs[index, :width], self.reference_logprobs[index, :width], self.values[index, : width + 1]
        return Scores(logprobs, reference, values, self.rewards.rows(index))

    @classmethod
    def join(cls, parts: Sequence["Scores"]) -> "Scores":
        """The rows of all parts, one after the other, padded with 0 to the widest."""
        width = max(part.policy_logprobs.shape[1] for part in parts)
        return cls(
            torch.cat([pad(part.policy_logprobs, (0, width - part.policy_logprobs.shape[1])) for part in parts]),
            torch.cat([pad(part.reference_logprobs, (0, width - part.reference_logprobs.shape[1])) for part in parts]),
            torch.cat([pad(part.values, (0, width + 1 - part.values.shape[1])) for part in parts]),
            RewardScores.join([part.rewards for part in parts]),
        )


@dataclass(frozen=True)
class Experience:
    """What the learners train on."""

    token_ids: Int[Tensor, "B T"]
    lengths: Int[Tensor, "B"]
    response_mask: Bool[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    """Of the policy before the update, computed by the policy learner: the ratio's denominator."""
    reference_logprobs: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    """Advantages before whitening plus values: what the critic learns."""
    kl_coef: float
    """Weight of the KL to the reference in this step, wherever it is taken."""
    step: int
    """The step it was made in, from 0: seeds the choice of mini-batches."""

    def rows(self, index: Int[Tensor, "R"]) -> "Experience":
        """The given rows, cut to their longest; R rows."""
        width = int(self.lengths[index].max())
        tensors: dict[str, Any] = {f.name: column[index] for f in fields(self) if isinstance(column := getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in tensors.items()})

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class TrainingState:
    """What changes from step to step outside the models: passed along, saved, restored."""

    step: int
    """Completed steps."""
    prompts_drawn: int
    """Cursor of the prompt stream."""
    epoch: int
    """Passes over the prompt set that have been begun, from 1."""
    num_tokens_generated: int
    """Response tokens, cumulative."""
    kl_coef: float
    """Weight of the KL in the next step."""
    reward_count: int = 0
    """Rewards that the running normalisation has seen; it is over all of them."""
    reward_mean: float = 0.0
    reward_m2: float = 0.0
    """Sum of their squared deviations from the mean."""
