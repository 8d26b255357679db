"""Measure for several allocators in one walk through the dense model. Each gets its own measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from tawny.allocation.owl import measure_outliers
from tawny.allocation.profile import Allocator, Linears, Measuring, Profile, largest
from tawny.calibration.output import Factor, most_felt
from tawny.calibration.statistics import Needs, most


@dataclass(frozen=True)
class Joint:
    """The measuring half of an `Allocator`, for all of `allocators` (by names of the caller's choice) at once."""

    allocators: Mapping[str, Allocator]

    @property
    def needs(self) -> Needs:
        return most(allocator.needs for allocator in self.allocators.values())

    @property
    def output(self) -> Factor:
        return most_felt(allocator.output for allocator in self.allocators.values())

    @property
    def measuring(self) -> dict[str, Allocator]:
        return {name: one for name, one in self.allocators.items() if one.measures_weights}

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """They measure one after the other."""
        return max((allocator.workspace(shapes) for allocator in self.measuring.values()), default=0)

    def measure(self, linears: Linears) -> dict[str, Any]:
        return self._measure(linears, [])

    def _measure(self, linears: Linears, done: list[tuple[Allocator, dict[str, Any]]]) -> dict[str, Any]:
        """Each allocator once: spectra that `alpha` wants and a blend of `alpha` too are taken for both."""
        measures: dict[str, Any] = {}
        for name, allocator in self.measuring.items():
            if isinstance(allocator, _Joined):
                measures[name] = allocator.members._measure(linears, done)
                continue
            known = next((measured for other, measured in done if other == allocator), None)
            if known is None:
                known = allocator.measure(linears)
                done.append((allocator, known))
            measures[name] = known
        return measures

    def profile_of(self, name: str, walked: Profile) -> Profile:
        """What the walk measured for one of the allocators."""
        if name not in self.measuring:
            return Profile(walked.linears)
        return Profile(walked.linears, tuple(measured[name] for measured in walked.measures))


@runtime_checkable
class _Joined(Protocol):
    """An allocator that is made of others."""

    @property
    def members(self) -> Joint: ...


@dataclass(frozen=True)
class Survey(Measuring):
    """What a profile measures of each block: outlier shares for several M, and whatever `joint` wants to know.

    Attributes:
        Ms: multiples of the mean whose outlier shares are counted; none if empty.
    """

    joint: Joint
    Ms: tuple[float, ...] = ()
    measures_weights: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return most([self.joint.needs, "norms" if self.Ms else "none"])

    @property
    def output(self) -> Factor:
        return self.joint.output

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Outliers are counted before the others measure."""
        return max(self.joint.workspace(shapes), 16 * largest(shapes))

    def measure(self, linears: Linears) -> dict[str, Any]:
        measures: dict[str, Any] = {}
        if self.Ms:
            zeros = sum(int((weight == 0).sum()) for weight, _ in linears.values())
            measures = {**measure_outliers(linears, self.Ms), "zeros": zeros}
        return {**measures, "allocators": self.joint.measure(linears)}

    def profile_of(self, name: str, walked: Profile) -> Profile:
        """What the walk measured for one of the allocators; what every walk knows for one that it was not told of."""
        if name not in self.joint.allocators:
            return walked
        return self.joint.profile_of(
            name, Profile(walked.linears, tuple(measured["allocators"] for measured in walked.measures))
        )
