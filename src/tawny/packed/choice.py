"""Which weights are packed, and into which kind: decided alike for a folder (convert.py) and a live model (live.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from tawny.kinds import kind_of
from tawny.model.linears import Linear
from tawny.packed import format
from tawny.packed.format import PackedTensor
from tawny.progress import Progress


@dataclass(frozen=True)
class LinearForm:
    """What became of one weight: `form` is "packed" or "dense", and `why` says why it stayed dense."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    form: str
    bytes: int
    why: str = ""


def _sparsity(W: Tensor) -> float:
    return 1.0 - int(torch.count_nonzero(W)) / W.numel()


@dataclass(frozen=True)
class PackingKinds:
    """The kinds that a person asked for; those that do not exist are refused before any work is done.

    Attributes:
        embedding: kind of an embedding that shares no weight with the head; None is that of the head.
        kinds: of linears, by name, that were solved for another kind than `values`.

    Raises:
        UserError: unknown values or group.
    """

    values: str
    group: int | None = None
    head: str | None = None
    embedding: str | None = None
    kinds: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kind = kind_of(self.values, self.group)
        object.__setattr__(self, "group", kind.span(self.group))  # frozen
        for end in (self.head, self.embedding):
            if end is not None:
                kind_of(end)

    @property
    def told(self) -> dict[str, Any]:
        """For configs and reports; the index says what holds for each weight."""
        return {
            "values": self.values,
            "group": self.group,
            "head": self.head,
            "embedding": self.embedding,
        }

    @property
    def table(self) -> str | None:
        """Kind of an embedding that shares no weight with the head; None leaves it as it is."""
        return self.embedding or self.head

    def pays(self, sparsity: float) -> bool:
        """True when a linear of this sparsity decodes faster packed than dense in bfloat16, by measurement."""
        return sparsity >= kind_of(self.values).break_even

    def pack(self, W_OI: Tensor, sparsity: float, name: str) -> PackedTensor:
        values = self.kinds.get(name, self.values)
        whole = format.cheaper_whole(1 - sparsity, kind_of(values))
        with format.naming(name):
            return format.pack(W_OI, values, self.group, whole=whole)

    def pack_linear(self, W_OI: Tensor, name: str) -> tuple[PackedTensor | None, float]:
        """The packed weight, or None where dense is cheaper; and its share of zeros."""
        format.check_dtype(W_OI)
        sparsity = _sparsity(W_OI)
        return self.pack(W_OI, sparsity, name) if self.pays(sparsity) else None, sparsity

    def sparsities(self, fused: Tensor, experts: Sequence[Linear]) -> tuple[list[float], float]:
        """Each expert's share of zeros, and the mean, which decides for all experts of a parameter."""
        format.check_dtype(fused)
        each = [_sparsity(fused[expert.expert]) for expert in experts]
        return each, mean(each)

    def pack_expert(self, fused: Tensor, expert: Linear, sparsity: float) -> PackedTensor:
        return self.pack(expert.view(fused), sparsity, expert.name)


def pack_end(W_OI: Tensor, kind: str, name: str) -> PackedTensor:
    """A head or an embedding is packed whatever its zeros: it is asked for to save bytes, and integers alone do.

    Nobody removed its zeros, so they have a mask only where that saves bytes.
    """
    format.check_dtype(W_OI)
    whole = _sparsity(W_OI) < 1 / kind_of(kind).bits
    with format.naming(name):
        return format.pack(W_OI, kind, whole=whole)


def experts_by_parameter(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """The experts among `linears`, by the name of the fused parameter that holds them."""
    experts: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.expert is not None:
            experts.setdefault(linear.key, []).append(linear)
    return experts


def is_changed(packed: PackedTensor, W_OI: Tensor) -> bool:
    """Whether a weight of integers lost something: it was not solved on the grid."""
    scaled = kind_of(packed.values).scaled
    return scaled and not torch.equal(format.unpack(packed, W_OI.dtype), W_OI.detach().cpu())


def tell(progress: Progress, packed: int, dense: int, untouched: int, rounded: int = 0) -> None:
    progress.say(f"{packed} linears packed, {dense} left dense because their zeros are too few to pay")
    if rounded:
        progress.say(
            f"{rounded} linears were only rounded: `tawny prune --values` solves them on the grid, which loses far less"
        )
    if untouched:
        progress.say(
            f"{untouched} weights stay as they are: their modules do more than multiply, or their file holds them in a "
            "layout that is not packed"
        )
