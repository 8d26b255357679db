"""The processes that share a recovery: one, or as many as `torchrun` started. Each reads its part of every batch."""

from __future__ import annotations

__all__ = ["Processes"]

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from tawny.recovery.objective import Losses


class Processes:
    """Data parallel training: gradients of survivors are added up, everything else is done by all alike."""

    def __init__(self, device: str) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self._started = False
        self.device = torch.device(device)
        if self.count > 1 and not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            self._started = True

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: list[int]) -> list[int]:
        """This process's part of the windows of a step; it depends on the step alone."""
        return rows[self.rank :: self.count]

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                torch.distributed.all_reduce(tensor)

    def add_losses(self, losses: Losses) -> Losses:
        if self.count == 1:
            return losses
        numbers = [losses.tokens, losses.next_token, losses.kl, losses.agree]
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.add([sums])
        tokens, next_token, kl, agree = sums.tolist()
        return Losses(int(tokens), next_token, kl, int(agree))

    def agree(self, number: float) -> float:
        """The first process's value, for decisions that clocks would make differently."""
        if self.count == 1:
            return number
        told = torch.tensor([number], dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(told, 0)
        return float(told)

    def close(self) -> None:
        if self._started:
            torch.distributed.destroy_process_group()
