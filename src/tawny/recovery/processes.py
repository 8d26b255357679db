"""The processes that share a recovery: one, or as many as `torchrun` started. Each reads its part of every batch."""

from __future__ import annotations

__all__ = ["Processes"]

import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from tawny.process_group import close_group, open_group
from tawny.recovery.objective import Losses


class Processes:
    """Data parallel training: gradients of survivors are added up, everything else is done by all alike.

    Args:
        device: of this process; `cuda` is the one that torchrun counted out for it.
        shard: each keeps its rows of the blocks only (sharding.py).
    """

    def __init__(self, device: str, *, shard: bool = False) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.sharded = shard and self.count > 1
        self._started = False
        self.device = torch.device(device)
        if self.count > 1 and device == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        if self.count > 1:
            self._started = open_group(self.device.type == "cuda")

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """This process's part of the windows of a step; it depends on the step alone."""
        return list(rows[self.rank :: self.count])

    def rounds(self, rows: Sequence[int], size: int) -> int:
        """Forwards of `size` windows that see all rows: as many in every process, where each takes part in all."""
        mine = -(-len(rows) // self.count) if self.sharded else len(self.share(rows))
        return -(-mine // size)

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

    def total(self, count: int) -> int:
        """Sum of a count over all processes."""
        told = torch.tensor([count], device=self.device)
        self.add([told])
        return int(told)

    def any(self, here: bool) -> bool:
        return self.total(int(here)) > 0

    def all_of(self, mine: Any) -> list[Any]:
        """What every process tells, in the order of ranks; also the point that none passes before all have come."""
        if self.count == 1:
            return [mine]
        told: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(told, mine)
        return told

    def clip(self, whole: Sequence[Tensor], parts: Sequence[Tensor], limit: float) -> float:
        """Scale gradients so that their joint norm is at most `limit`; the norm before.

        Args:
            whole: tensors that every process has.
            parts: tensors of which each process has its own rows.
        """
        if not parts:
            return float(torch.nn.utils.clip_grad_norm_(whole, limit))
        sums = [
            sum(float(t.grad.square().sum(dtype=torch.float64)) for t in some if t.grad is not None)
            for some in (parts, whole)
        ]
        told = torch.tensor([sums[0]], dtype=torch.float64, device=self.device)
        self.add([told])
        norm = math.sqrt(float(told) + sums[1])
        for tensor in (*parts, *whole):
            if tensor.grad is not None and norm > limit:
                tensor.grad.mul_(limit / norm)
        return norm

    def decide(self, here: bool) -> bool:
        """What the first process sees."""
        return bool(self.agree(float(here)))

    def once(self, job: Callable[[], object]) -> None:
        """Let the first process do something once all have come here, while the others wait; its error ends them all."""
        self.all_of(None)  # what the job takes away, another process may still be reading
        if self.first:
            job()
        self.all_of(None)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._started:
            close_group()
