"""Erdős–Rényi sparsity (`er`, `er-plus`): small and oblong linears keep more, whatever they hold.

Rigging the Lottery (Evci 2020, 1911.11134) without its kernel term, which linears do not have:
`density ∝ (in + out)/(in·out)`. A linear that would get more than 1 is dense, and the factor is solved again
for the others. ER-plus (Liu 2022, 2202.02643) also keeps the last linear dense. Both are baselines of the OWL
paper (2310.05175): on a language model, whose blocks have equal shapes, they know nothing of depth.
"""

from __future__ import annotations

from dataclasses import dataclass

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, Profile
from tawny.errors import RecipeError


def _raw(profile: Profile, target: float, dense: set[str]) -> dict[str, float]:
    """Sparsities before rounding; `dense` grows by every linear whose density would exceed 1."""
    linears = {info.name: info for info in profile.linears}
    kept = (1 - target) * sum(info.numel for info in linears.values())
    if dense and kept <= sum(linears[name].numel for name in dense):
        names = ", ".join(sorted(dense))
        raise RecipeError(
            f"er-plus keeps {names} dense, which alone is more than the {1 - target:.4g} of the weights that "
            f"sparsity {target:.4g} leaves: choose a lower sparsity or the allocator er"
        )
    while True:
        # density·numel = factor·(in + out), so the factor follows from the sum of the sides
        left = max(0.0, kept - sum(linears[name].numel for name in dense))
        sides = sum(sum(info.shape) for info in linears.values() if info.name not in dense)
        factor = left / sides if sides else 0.0
        full = {
            name
            for name, info in linears.items()
            if name not in dense and factor * sum(info.shape) > info.numel
        }
        if not full:
            return {
                name: 0.0 if name in dense else 1 - factor * sum(info.shape) / info.numel
                for name, info in linears.items()
            }
        dense |= full


@dataclass(frozen=True)
class Er(Allocator):
    """density ∝ (in + out)/(in·out): the shapes alone decide.

    Evci 2020 (1911.11134). Needs no data and no weights.
    """

    def allocate(self, profile: Profile, target: float) -> Allocation:
        sizes = profile.sizes
        return exact(_raw(profile, target, set()), sizes, target)


@dataclass(frozen=True)
class ErPlus(Allocator):
    """Er, and the last linear of the model stays dense.

    Liu 2022 (2202.02643). Refused when the last linear alone is more than the sparsity leaves.

    Raises:
        RecipeError: the last linear alone is more than the sparsity leaves.
    """

    def allocate(self, profile: Profile, target: float) -> Allocation:
        last = profile.linears[-1].name
        raw = _raw(profile, target, {last} if target > 0 else set())
        sizes = profile.sizes
        if target == 0:
            return exact(raw, sizes, target)
        # Rounded over the others alone, so that the shift that makes the budget exact cannot reach the last.
        others = {name: size for name, size in sizes.items() if name != last}
        share = target * sum(sizes.values()) / sum(others.values())
        return {**exact({name: raw[name] for name in others}, others, min(share, 1.0)), last: 0.0}
