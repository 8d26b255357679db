"""Where a checkpoint holds the experts of a fused parameter."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tawny.model.checkpoint import Unit
from tawny.model.linears import Linear


@dataclass(frozen=True)
class CheckpointPlace:
    """Where a checkpoint holds one weight: in tensors of its own, whose rows follow each other, or at `index` in a common one."""

    sources: list[str]
    rows: tuple[int, ...] | None = None
    index: int | None = None


def places_of(
    unit: Unit, stored: Mapping[str, Tensor], fused: Tensor, experts: Sequence[Linear]
) -> list[CheckpointPlace] | None:
    """Where each expert of a fused parameter comes from; None where the parameter is not just its tensors put together.

    That is found by comparing weights, so that nothing need be known of what transformers does to a layout.
    """
    if any(experts[number].expert != number for number in range(len(experts))) or len(fused) != len(experts):
        return None
    if len({value.dtype for value in stored.values()}) > 1:
        return None
    if len(unit.sources) == 1:
        (source,) = unit.sources
        same = _same(stored[source], fused)
        return (
            [CheckpointPlace(unit.sources, index=number) for number in range(len(experts))] if same else None
        )
    by_pattern: dict[str, list[str]] = {}
    for source, pattern in zip(unit.sources, unit.patterns, strict=True):
        by_pattern.setdefault(pattern, []).append(source)
    if {len(sources) for sources in by_pattern.values()} != {len(experts)}:
        return None
    for order in itertools.permutations(by_pattern.values()):
        places = [list(sources) for sources in zip(*order, strict=True)]
        if all(
            _is_put_together(expert.view(fused), expert, of, stored)
            for expert, of in zip(experts, places, strict=True)
        ):
            return [
                CheckpointPlace(of, rows=_rows(expert, of, stored))
                for expert, of in zip(experts, places, strict=True)
            ]
    return None


def _rows(expert: Linear, sources: Sequence[str], stored: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(int(stored[source].shape[1 if expert.transposed else 0]) for source in sources)


def _is_put_together(
    W_OI: Tensor, expert: Linear, sources: Sequence[str], stored: Mapping[str, Tensor]
) -> bool:
    if any(stored[source].dim() != 2 for source in sources):
        return False
    parts = [stored[source].T if expert.transposed else stored[source] for source in sources]
    rows = [len(part) for part in parts]
    return sum(rows) == len(W_OI) and all(map(_same, parts, torch.split(W_OI, rows)))


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN too."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.dtype.itemsize)
    if a.shape != b.shape or a.dtype is not b.dtype or whole is None:
        return False
    return torch.equal(a.view(whole), b.view(whole))
