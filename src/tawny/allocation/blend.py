"""`blend`: the mean of what several allocators give each linear.

    s_l = 1/n · Σ_a s_l^(a)

Each allocation meets the budget, so their mean does. What allocators agree on stays, and what only one of them wants is
halved. Whether that helps depends on the model: of depth and spectra the mean was the better choice for one, and the worse for
another (docs/log/blend.md), so it is there to be tried, and `tawny search` tries it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tawny.allocation.budget import exact
from tawny.allocation.joint import Joint
from tawny.allocation.profile import Allocation, Allocator, LinearInfo, Linears, Profile
from tawny.allocation.registry import SINGLE
from tawny.calibration.output import Factor
from tawny.calibration.statistics import Needs
from tawny.errors import RecipeError, check_option, nearest


@dataclass(frozen=True)
class Blend(Allocator):
    """The mean of what the allocators named in `of` give, each with its own defaults.

    Raises:
        RecipeError: `of` names none, one twice, or one that cannot be blended.
        NumericalError, ValueError: of the allocators that it names.
    """

    of: str = "atp,alpha"

    def __post_init__(self) -> None:
        different = 0 < len(self.names) == len(set(self.names))
        check_option(different, "allocator.of", repr(self.of), "different allocators, such as atp,alpha")
        for name in self.names:
            if name not in SINGLE:
                raise RecipeError(f"allocator.of names {name!r}{nearest(name, SINGLE)}: {', '.join(SINGLE)}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.of.split(",") if name.strip())

    @property
    def members(self) -> Joint:
        return Joint({name: SINGLE[name]() for name in self.names})

    @property
    def needs(self) -> Needs:
        return self.members.needs

    @property
    def output(self) -> Factor:
        return self.members.output

    @property
    def measures_weights(self) -> bool:
        return bool(self.members.measuring)

    def work(self, linears: Sequence[LinearInfo]) -> float:
        """What its members measure beside statistics, in float32 operations that take as long."""
        return sum(member.work(linears) for member in self.members.allocators.values())

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Its members measure one after the other."""
        return self.members.workspace(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        return self.members.measure(linears)

    def allocate(self, profile: Profile, target: float) -> Allocation:
        members = self.members
        parts = [
            member.allocate(members.profile_of(name, profile), target)
            for name, member in members.allocators.items()
        ]
        mean = {info.name: sum(one[info.name] for one in parts) / len(parts) for info in profile.linears}
        return exact(mean, profile.sizes, target)
