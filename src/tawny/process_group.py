"""The processes that share a run: this one alone, or as many as `torchrun` started.

torch.distributed carries what they tell each other. A group is opened for a run and closed after it, as often as a
script has runs. Rank 0 decides, writes and talks; the others keep quiet unless they fail.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar

from tawny.errors import RecipeError, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

# How long one process waits for another: longer than any block takes to solve.
_PATIENCE = timedelta(hours=6)
_opened = itertools.count()


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that share a run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def refuse_several(what: str) -> None:
    """Raise a RecipeError where torchrun started several processes, for what works in one."""
    if started_by_torchrun():
        raise RecipeError(f"{what} works in one process, and torchrun started several: run it with one")


def speaks() -> bool:
    """Whether this process is the one of them that talks and writes."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"


class ProcessGroup:
    """This process among all of a run. `Ranks` adds what pruning shares out.

    Args:
        device: the one asked for; `cuda` becomes the one that torchrun counted out for this process.
        alone: ignore torchrun.
    """

    def __init__(self, device: str = "cpu", *, alone: bool = False) -> None:
        self.rank, self.size, self.device = 0, 1, device
        self._opened = False
        if alone or not started_by_torchrun():
            return
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if device.startswith("cuda:"):
            raise UserError(f"torchrun gives each process a GPU of its own: {device} given, expected cuda")
        if device == "cuda":
            import torch

            self.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
            torch.cuda.set_device(self.device)
        self._opened = _open(self.device.startswith("cuda"))

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def same(self, value: T) -> T:
        """Rank 0's value, on all ranks (anything that can be pickled)."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0)
        made: T = held[0]
        return made

    def all_of(self, value: T) -> list[T]:
        """Every rank's value, by rank; no process passes before all have come here."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        held: list[Any] = [None] * self.size
        dist.all_gather_object(held, value)
        return held

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Sum tensors over all ranks, in place and always in the same order."""
        if self.size > 1:
            import torch.distributed as dist

            for tensor in tensors:
                dist.all_reduce(tensor)

    def wait(self) -> None:
        """Until all ranks have come here."""
        self.all_of(None)

    def once(self, job: Callable[[], object]) -> None:
        """Let rank 0 do something once all have come here, while the others wait; its error ends them all."""
        self.wait()  # what the job takes away, another process may still be reading
        if self.first:
            job()
        self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._opened:
            import torch.distributed as dist

            dist.destroy_process_group()
            self._opened = False


def _open(cuda: bool) -> bool:
    """Join the processes that torchrun started; False if the script has opened a group of its own."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if dist.is_initialized():
        return False
    store, rank, size = next(iter(rendezvous("env://")))
    # A second group would find the addresses of the first one's processes under the same names, and wait for them forever.
    own = PrefixStore(f"tawny-{next(_opened)}", store)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=_PATIENCE)
    return True
