"""Forward passes over a batch, in token-budget micro-batches, spread over ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

from actors.rank_host import Rank
from minigpt_ray.rl.batching import micro_batches
from minigpt_ray.rl.experience import RolloutBatch


def in_micro_batches(rank: Rank, batch: RolloutBatch, budget: int, device: torch.device, forward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`forward(token_ids, response_mask)` over this rank's share of the rows, in token-budget micro-batches, rows in order.

    The result keeps the width that `forward` gives relative to its input (T or T + 1 columns), 0 in the padding. Every
    rank runs the same number of forward passes, since each may be a collective.
    """
    size, width = batch.token_ids.shape
    shares = [Rank(index, rank.world, rank.device).share(size) for index in range(rank.world)]
    plans = [micro_batches(batch.lengths[share].tolist(), budget, 1)[0] for share in shares]
    mine, offset = plans[rank.index], shares[rank.index].start
    rows_here = shares[rank.index].stop - offset
    result: Tensor | None = None
    for index in range(max(len(plan) for plan in plans)):
        rows = torch.tensor(mine[index] if index < len(mine) else [0]) + (offset if index < len(mine) else 0)
        columns = int(batch.lengths[rows].max())
        output = forward(batch.token_ids[rows, :columns].to(device), batch.response_mask[rows, :columns].to(device)).cpu()
        if result is None:
            result = torch.zeros(rows_here, width + output.shape[1] - columns)
        if index < len(mine):
            result[rows - offset, : output.shape[1]] = output
    assert result is not None
    return result
