"""How training is shared by several processes: each reads its part of every batch, and gradients are summed."""

from __future__ import annotations

__all__ = ["Processes"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tawny.process_group import ProcessGroup
from tawny.recovery.objective import Losses


class Processes(ProcessGroup):
    """This process among all that train one model.

    Args:
        shard: each keeps its rows of the blocks only (sharding.py).
    """

    def __init__(self, device: str, *, shard: bool = False) -> None:
        super().__init__(device)
        self.sharded = shard and self.several

    def share(self, rows: Sequence[int]) -> list[int]:
        """This process's part of the windows of a step; it depends on the step alone."""
        return list(rows[self.rank :: self.size])

    def rounds(self, rows: Sequence[int], size: int) -> int:
        """Forwards of `size` windows that see all rows: as many in every process, where each takes part in all."""
        mine = -(-len(rows) // self.size) if self.sharded else len(self.share(rows))
        return -(-mine // size)

    def add_losses(self, losses: Losses) -> Losses:
        tokens, next_token, kl, agree = self._sums(losses.tokens, losses.next_token, losses.kl, losses.agree)
        return Losses(int(tokens), next_token, kl, int(agree))

    def total(self, count: int) -> int:
        """Sum of a count over all processes."""
        return int(self._sums(count)[0])

    def _sums(self, *numbers: float) -> list[float]:
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum([sums])
        return sums.tolist()

    def clip(self, whole: Sequence[Tensor], parts: Sequence[Tensor], limit: float) -> float:
        """Scale gradients so that their joint norm is at most `limit`; the norm before.

        Args:
            whole: tensors that every process has.
            parts: tensors of which each process has its own rows.
        """
        if not parts:
            return float(torch.nn.utils.clip_grad_norm_(whole, limit))
        mine, everybodys = (
            sum(float(t.grad.square().sum(dtype=torch.float64)) for t in some if t.grad is not None)
            for some in (parts, whole)
        )
        norm = math.sqrt(self._sums(mine)[0] + everybodys)
        for tensor in (*parts, *whole):
            if tensor.grad is not None and norm > limit:
                tensor.grad.mul_(limit / norm)
        return norm
