"""Several allocators in one walk through the dense model, each given back what it measured itself."""

from __future__ import annotations

__all__ = ["Several"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tawny.allocation.profile import Allocator, Profile, measuring_bytes
from tawny.calibration.statistics import Needs, Statistics, most


@dataclass(frozen=True)
class Several:
    """What `Allocator` asks of a walk, for all of `allocators` (by names of the caller's choice) at once."""

    allocators: Mapping[str, Allocator]

    @property
    def needs(self) -> Needs:
        return most(allocator.needs for allocator in self.allocators.values())

    @property
    def measures_weights(self) -> bool:
        return any(allocator.measures_weights for allocator in self.allocators.values())

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """They measure one after the other."""
        measuring = (allocator for allocator in self.allocators.values() if allocator.measures_weights)
        return max((measuring_bytes(allocator, shapes) for allocator in measuring), default=0)

    def measure(self, linears: Mapping[str, tuple[Tensor, Statistics | None]]) -> dict[str, Any]:
        return self._measure(linears, [])

    def _measure(
        self,
        linears: Mapping[str, tuple[Tensor, Statistics | None]],
        done: list[tuple[Allocator, dict[str, Any]]],
    ) -> dict[str, Any]:
        """Each allocator once: spectra that `alpha` wants and a blend of `alpha` too are taken for both."""
        made: dict[str, Any] = {}
        for name, allocator in self.allocators.items():
            if not allocator.measures_weights:
                continue
            members = getattr(allocator, "members", None)
            if isinstance(members, Several):
                made[name] = members._measure(linears, done)
                continue
            known = next((measured for other, measured in done if other == allocator), None)
            if known is None:
                known = allocator.measure(linears)
                done.append((allocator, known))
            made[name] = known
        return made

    def profile_of(self, name: str, walked: Profile) -> Profile:
        """What the walk measured for one of the allocators."""
        if not self.allocators[name].measures_weights:
            return Profile(walked.linears)
        return Profile(walked.linears, tuple(measured[name] for measured in walked.measures))
