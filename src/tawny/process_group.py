"""torch.distributed's group of processes, opened for a run and closed behind it, as often as a script has runs."""

from __future__ import annotations

__all__ = ["close_group", "open_group"]

import itertools
from datetime import timedelta

# How long one process waits for another: longer than any block takes to solve.
_PATIENCE = timedelta(hours=6)
_opened = itertools.count()


def open_group(cuda: bool) -> bool:
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


def close_group() -> None:
    import torch.distributed as dist

    dist.destroy_process_group()
