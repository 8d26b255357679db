"""How pruning is shared by several processes: `torchrun --nproc-per-node N -m tawny prune …`.

Samples are split over the ranks, so forwards and statistics are; statistics are summed over all ranks; the linears of a
stage are spread by what they cost to solve, and each result is sent to all. Every sum is taken in the same order by the
same collective, so that the same number of ranks gives the same bytes; another number gives another order of summation,
and so differs by rounding.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import LostProcess, UserError
from tawny.model.stack import chunks_of
from tawny.model.streams import Samples, samples_a_chunk
from tawny.process_group import ProcessGroup


class Ranks(ProcessGroup):
    """This process among all that prune one model."""

    def __init__(self, device: str = "cpu", *, alone: bool = False) -> None:
        super().__init__(device, alone=alone)
        if self._opened:
            # torchrun ends the others when one is lost; they say so instead of vanishing.
            signal.signal(signal.SIGTERM, _lost)

    def close(self) -> None:
        if self._opened:
            super().close()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def deafen(self) -> None:
        """The run is ending anyway: what is left to do for it must not be cut off by torchrun's signal."""
        if self._opened:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def part(self, samples: Samples) -> Samples:
        """This rank's samples: neighbours, as many chunks for each as for any other, give or take one.

        A forward takes a chunk at once, so the ranks run the very forwards that one process would. Where there are
        fewer chunks than ranks, single samples are shared out; fewer samples than ranks are a UserError.
        """
        return samples if self.size == 1 else samples.take(self.here(samples))

    def here(self, samples: Samples) -> slice:
        """Where this rank's part lies among the samples."""
        count = len(samples)
        if count < self.size:
            raise UserError(
                f"{count} samples cannot be shared by {self.size} processes; give at least --samples {self.size}"
            )
        return self._shares(count, samples.seqlen)[self.rank]

    def largest_part(self, count: int, seqlen: int) -> int:
        """How many of `count` samples the rank with most of them gets."""
        shares = self._shares(count, seqlen) if count else []
        return max((len(range(count)[here]) for here in shares), default=0)

    def _shares(self, count: int, seqlen: int) -> list[slice]:
        chunks = chunks_of(count, samples_a_chunk(seqlen))
        if len(chunks) < self.size:
            chunks = chunks_of(count, 1)
        edges = [*(chunk.start for chunk in chunks), count]
        ends = [edges[rank * len(chunks) // self.size] for rank in range(self.size + 1)]
        return [slice(*pair) for pair in itertools.pairwise(ends)]

    def owners(self, costs: Sequence[float]) -> list[int]:
        """A rank for each piece of work: the dearest first, each to the one with least to do."""
        load = [0.0] * self.size
        chosen = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            chosen[index] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[chosen[index]] += costs[index]
        return chosen

    def send(self, value: Tensor, owner: int) -> Tensor:
        """The owner's tensor, on all ranks; the others give one of the same shape and dtype."""
        import torch.distributed as dist

        whole = value.contiguous()
        dist.broadcast(whole.view(-1).view(torch.uint8), src=owner)
        return whole

    def add(self, statistics: Mapping[str, Statistics]) -> None:
        """Sum exact statistics over all ranks and round them, in place.

        Linears of one input share the object and are summed once.
        """
        if self.size == 1:
            return
        for one in {id(statistics[name]): statistics[name] for name in sorted(statistics)}.values():
            tokens = torch.tensor(one.tokens, device=one.squared_norms.device)
            sums = [] if one.sums is None else [one.sums]
            self.sum([tokens, one.squared_norms if one.hessian is None else one.hessian, *sums])
            one.tokens = int(tokens)
            if one.hessian is not None:
                one.round()


def _lost(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said once; what follows must not be cut off
    raise LostProcess("another process of this run has ended")


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection", "peer", "timed out", "process group")
    )
