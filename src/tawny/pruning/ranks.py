"""A run shared by several processes: `torchrun --nproc-per-node N -m tawny prune …`.

torchrun starts the processes and torch.distributed carries what they tell each other. Samples are split over the
ranks, so forwards and statistics are; statistics are summed over all ranks; the linears of a stage are spread by what
they cost to solve, and each result is sent to all. Rank 0 decides, writes and talks; the others keep quiet unless
they fail. Every sum is taken in the same order by the same collective, so that the same number of ranks gives the
same bytes; another number gives another order of summation, and so differs by rounding.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from tawny.calibration.statistics import Statistics
from tawny.errors import LostProcess, UserError
from tawny.model.stack import chunks_of
from tawny.model.streams import Samples, samples_a_chunk
from tawny.process_group import close_group, open_group
from tawny.progress import started_by_torchrun

T = TypeVar("T")


class Ranks:
    """This process among all of a run; alone unless torchrun started it.

    Args:
        device: the recipe's device.
        alone: keep to oneself in any case.
    """

    def __init__(self, device: str = "cpu", alone: bool = False) -> None:
        self.rank, self.size, self.device = 0, 1, device
        self._opened = False
        if alone or not started_by_torchrun():
            return
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device == "cuda":
            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        self._opened = open_group(device.startswith("cuda"))
        if self._opened:
            # torchrun ends the others when one is lost; they say so instead of vanishing.
            signal.signal(signal.SIGTERM, _lost)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def close(self) -> None:
        if self._opened:
            close_group()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._opened = False

    def deafen(self) -> None:
        """The run is ending anyway: what is left to do for it must not be cut off by torchrun's signal."""
        if self._opened:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)

    @property
    def several(self) -> bool:
        return self.size > 1

    # --- who does what -----------------------------------------------------------------------------

    def part(self, samples: Samples) -> Samples:
        """This rank's samples: neighbours, as many chunks for each as for any other, give or take one.

        A forward takes a chunk at once, so the ranks run the very forwards that one process would. Where there are
        fewer chunks than ranks, single samples are shared out.

        Raises:
            UserError: there are fewer samples than ranks.
        """
        if self.size == 1:
            return samples
        count = len(samples)
        if count < self.size:
            raise UserError(
                f"{count} samples cannot be shared by {self.size} processes; give at least --samples {self.size}"
            )
        here = self._shares(count, samples.seqlen)[self.rank]
        return Samples(samples.tokens[here], None if samples.mask is None else samples.mask[here])

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
        made = [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            made[index] = min(range(self.size), key=lambda rank: (load[rank], rank))
            load[made[index]] += costs[index]
        return made

    # --- what they tell each other -----------------------------------------------------------------

    def same(self, value: T) -> T:
        """Rank 0's value, on all ranks (JSON types, or anything that can be pickled)."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        made: T = held[0]
        return made

    def all_of(self, value: T) -> list[T]:
        """Every rank's value, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    def send(self, value: Tensor, owner: int) -> Tensor:
        """The owner's tensor, on all ranks; the others give one of the same shape and dtype."""
        import torch.distributed as dist

        made = value.contiguous()
        dist.broadcast(made.view(-1).view(torch.uint8), src=owner)
        return made

    def wait(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier()

    def add(self, statistics: Mapping[str, Statistics]) -> None:
        """Sum exact statistics over all ranks and round them, in place.

        Linears of one input share the object and are summed once.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        for one in _distinct(statistics[name] for name in sorted(statistics)):
            tokens = torch.tensor(one.tokens, device=one.squared_norms.device)
            dist.all_reduce(tokens)
            one.tokens = int(tokens)
            if one.hessian is None:
                dist.all_reduce(one.squared_norms)
            else:
                dist.all_reduce(one.hessian)
                one.round()


def _distinct(values: Iterable[T]) -> list[T]:
    return list({id(value): value for value in values}.values())


def _lost(signum: int, frame: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # said once; what follows must not be cut off
    raise LostProcess("another process of this run has ended")


def is_lost(error: BaseException) -> bool:
    """Whether an error of torch.distributed says that another process is gone."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "nccl", "connection", "peer", "timed out", "process group")
    )
