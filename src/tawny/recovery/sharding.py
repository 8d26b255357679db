"""Train on N processes with FSDP2: each holds 1/N of the blocks and of what is trained, 50 % with two of them.

torch gathers a block's weights in front of its forward and its backward, drops them after, and adds up gradients row
by row where those rows live (`torch.distributed.fsdp.fully_shard`). The optimiser's vectors are made from the rows that a
process keeps. Rows are whole and in order: the vectors of all processes, one after the other, are the vector that a
single process would have. What it costs in speed was not measured.
"""

from __future__ import annotations

__all__ = ["filled", "here", "rows_of", "shard"]

import torch
from torch import Tensor, nn

from tawny.recovery.processes import Processes


def shard(block: nn.Module, processes: Processes) -> None:
    """Let this process keep its rows of the block's parameters only; forwards and backwards gather the others."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(torch.device(processes.device).type, (processes.size,))
    # Gradients in bfloat16 are summed in float32. No block is inside another: each must let go of its weights by itself.
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    fully_shard(block, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: its rows of a sharded one, else the tensor itself. Without a graph."""
    local = getattr(tensor, "to_local", None)
    if local is None:
        return tensor
    with torch.no_grad():  # hands out the storage itself
        rows: Tensor = local()
    return rows


def rows_of(whole: Tensor, processes: Processes) -> Tensor:
    """The rows of a tensor that `shard` leaves to this process; none, if there are fewer rows than processes."""
    parts = torch.chunk(whole, processes.size)
    return parts[processes.rank] if processes.rank < len(parts) else whole[:0]


def filled(stored: Tensor, vector: Tensor) -> Tensor:
    """A float32 tensor shaped like `stored`, with the vector where `stored` is not zero (everywhere, if it is that long)."""
    if vector.numel() == stored.numel():
        return vector.view(stored.shape)
    dense = torch.zeros(stored.shape)
    dense.view(-1)[torch.nonzero(stored.reshape(-1)).squeeze(1)] = vector
    return dense
