"""The frozen reference model that the KL is measured to."""

import torch
from jaxtyping import Float
from torch import Tensor

from actors.forward import in_micro_batches
from actors.group import Group, Pending
from actors.placement import Cluster
from actors.rank_host import Rank
from minigpt_ray.config import PPOConfig, ReferenceConfig
from minigpt_ray.model_directory import resolve_model
from minigpt_ray.models import TokenLogprobs, load_causal
from minigpt_ray.rl.experience import RolloutBatch


class ReferenceRank:
    """One replica of the reference."""

    def __init__(self, rank: Rank, path: str, config: ReferenceConfig, temperature: float) -> None:
        self.rank, self.config, self.temperature = rank, config, temperature
        self.device = torch.device(rank.device)
        self.model = TokenLogprobs(load_causal(path, config.dtype)).eval().requires_grad_(False).to(self.device)

    def logprobs(self, batch: RolloutBatch) -> Float[Tensor, "R T"]:
        """log p(token t | tokens < t) at the sampling temperature, 0 outside the response; this rank's share of the rows."""
        with torch.no_grad():
            return in_micro_batches(self.rank, batch, self.config.micro_batch_tokens, self.device, lambda ids, mask: self.model(ids, mask, self.temperature)[0])


class Reference(Group[ReferenceRank]):
    """The reference as the driver sees it."""

    def __init__(self, cluster: Cluster, config: PPOConfig) -> None:
        source = config.policy.init_from if config.reference.init_from == "policy" else config.reference.init_from
        path = resolve_model(source, config.run_dir)
        super().__init__(cluster, "reference", ReferenceRank, path, config.reference, config.sampling.temperature, restarts=config.restart_limit)

    def logprobs(self, batch: RolloutBatch) -> Pending[Float[Tensor, "B T"]]:
        return self.scatter(ReferenceRank.logprobs, batch, torch.cat)
