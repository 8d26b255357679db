"""What a checkpoint really holds: zeros and n:m validity of every prunable linear, read one block at a time."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from tawny.model.gguf_conversion import gguf_form
from tawny.model.source import gguf_behind, resolve, stored_bytes
from tawny.model.stack import Stack
from tawny.model.structure import head_of, staying_dense
from tawny.model.trust import opens_models
from tawny.packed.opening import open_stack
from tawny.patterns import matches
from tawny.progress import Progress, silent
from tawny.run.run import Run
from tawny.run.walk import Block, Visitor, walk

# Tried from the strictest; the first that holds is reported.
_N_OF_M = [(n, m) for m in (4, 8, 16) for n in range(1, m)]


@dataclass(frozen=True)
class LinearInspection:
    """One linear: its shape `[out, in]`, exact zeros, and the n:m pattern it satisfies, if any.

    `ties` counts weights whose magnitude equals another's in the linear beyond the first: where they are many, a
    threshold on magnitudes cannot prune an exact count.
    """

    name: str
    shape: tuple[int, int]
    zeros: int
    sparsity: float
    pattern: str
    ties: int


@dataclass(frozen=True)
class Inspection:
    """All prunable linears of a checkpoint, and its parameters as a whole; `stored` says how most of its files hold it.

    `dense` names, in one line, convolutions and linears that a model of several stacks has outside what is pruned."""

    source: str
    stored: str
    sparsity: float
    zeros: int
    prunable: int
    parameters: int
    bytes: int
    blocks: int
    tied_head: bool
    dense: list[str] = field(default_factory=list)
    linears: list[LinearInspection] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def pattern_of(weight_OI: Tensor, zeros: int) -> str:
    """`"n:m"` for the sparsest n of m that holds in every group along `in`, "dense" without zeros, else "unstructured"."""
    if zeros == 0:
        return "dense"
    density = 1.0 - zeros / weight_OI.numel()
    for n, m in sorted(_N_OF_M, key=lambda nm: (nm[0] / nm[1], nm[1])):
        # A group may hold fewer than n, so density bounds n/m only from one side, and by little when it is n:m at all.
        if weight_OI.shape[1] % m == 0 and density <= n / m < density + 0.05 and matches(weight_OI, n, m):
            return f"{n}:{m}"
    return "unstructured"


def tied(weight_OI: Tensor) -> int:
    """How many magnitudes equal another's, beyond the first."""
    magnitudes = weight_OI.abs().flatten()
    for short in (torch.bfloat16, torch.float16):
        if torch.equal(magnitudes.to(short).to(magnitudes.dtype), magnitudes):
            # A magnitude of 16 bits is a number below 2¹⁵: counting them is far quicker than sorting.
            bins = torch.bincount(magnitudes.to(short).view(torch.int16).int())
            return magnitudes.numel() - int((bins > 0).sum())
    ordered = magnitudes.sort().values
    return int((ordered[1:] == ordered[:-1]).sum())


@torch.no_grad()
@opens_models
def inspect(
    source: str | Path, *, progress: Progress = silent, trust_remote_code: bool = False
) -> Inspection:
    """Read every prunable linear of a checkpoint and count.

    Args:
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: neither a decoder nor an encoder.
        CheckpointError: files are missing, truncated or do not fit the configuration.
    """
    folder = resolve(source, progress.say)
    stack = open_stack(folder, torch.float32)
    inspecting = _Inspect()
    walk(Run.unkept(progress), stack, {}, [inspecting], phase="inspecting")
    linears = inspecting.linears
    prunable = sum(x.shape[0] * x.shape[1] for x in linears)
    zeros = sum(x.zeros for x in linears)
    assert stack.checkpoint is not None
    gguf = gguf_behind(source)
    return Inspection(
        source=str(source),
        stored=stack.checkpoint.stored_as if gguf is None else gguf_form(gguf),
        sparsity=zeros / max(1, prunable),
        zeros=zeros,
        prunable=prunable,
        parameters=sum(p.numel() for p in stack.model.parameters()),
        bytes=stored_bytes(source),
        blocks=len(stack),
        tied_head=_tied(stack.model),
        dense=staying_dense(stack.model, stack.structure),
        linears=linears,
    )


def count_zeros(stack: Stack) -> tuple[int, int]:
    """Exact zeros of the prunable weights, and how many weights these are."""
    counting = _Count()
    walk(Run.unkept(silent), stack, {}, [counting])
    return counting.zeros, counting.weights


@final
class _Count(Visitor):
    """Counts zeros."""

    def __init__(self) -> None:
        self.zeros = self.weights = 0

    def visit(self, block: Block) -> None:
        for linear in block.stack.linears(block.index):
            self.zeros += int((block.stack.weight(linear) == 0).sum())
            self.weights += linear.numel


@final
class _Inspect(Visitor):
    """Counts what is in every linear."""

    def __init__(self) -> None:
        self.linears: list[LinearInspection] = []

    def visit(self, block: Block) -> None:
        for linear in block.stack.linears(block.index):
            weight = block.stack.weight(linear)
            zeros = int((weight == 0).sum())
            pattern, share = pattern_of(weight, zeros), zeros / linear.numel
            self.linears.append(
                LinearInspection(linear.name, linear.shape, zeros, share, pattern, tied(weight))
            )


def _tied(model: Any) -> bool:
    """Whether head and embedding are one matrix, whatever the configuration says: files may hold two, or no head at all."""
    head = head_of(model)
    embedding = None if head is None else model.get_input_embeddings()
    return head is not None and embedding is not None and head.weight is embedding.weight
