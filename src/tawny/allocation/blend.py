"""`blend`: the mean of what several allocators give each linear.

    s_l = 1/n · Σ_a s_l^(a)

Each allocation meets the budget, so their mean does. What allocators agree on stays, and what only one of them wants is
halved. Whether that helps depends on the model: of depth and spectra the mean was the better choice for one, and the worse for
another (docs/log.md), so it is there to be tried, by `auto` too (`allocator.candidates`).
"""

from __future__ import annotations

__all__ = ["MEMBERS", "Blend"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tawny.allocation.alpha import Alpha
from tawny.allocation.atp import Atp
from tawny.allocation.budget import Allocation, exact
from tawny.allocation.dlp import Dlp
from tawny.allocation.er import Er, ErPlus
from tawny.allocation.global_ import Global
from tawny.allocation.lsa import Lsa
from tawny.allocation.owl import Owl
from tawny.allocation.profile import Allocator, LinearInfo, Profile
from tawny.allocation.uniform import Uniform
from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import RecipeError, nearest

MEMBERS: dict[str, type[Allocator]] = {
    "uniform": Uniform,
    "er": Er,
    "er-plus": ErPlus,
    "global": Global,
    "owl": Owl,
    "dlp": Dlp,
    "alpha": Alpha,
    "atp": Atp,
    "lsa": Lsa,
}
_ORDER: tuple[Needs, ...] = ("none", "norms", "hessian")


@dataclass(frozen=True)
class Blend:
    """The mean of what the allocators named in `of` give, each with its own defaults.

    Raises:
        RecipeError: `of` names none, one twice, or one that is unknown.
        NumericalError, ValueError: of the allocators that it names.
    """

    of: str = "atp,alpha"

    def __post_init__(self) -> None:
        names = self.names
        if not names or len(set(names)) < len(names):
            raise RecipeError(
                f"allocator.of is {self.of!r}; expected different allocators, such as atp,alpha"
            )
        for name in names:
            if name not in MEMBERS:
                raise RecipeError(
                    f"allocator.of names {name!r}{nearest(name, MEMBERS)}: {', '.join(MEMBERS)}"
                )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.of.split(",") if name.strip())

    @property
    def members(self) -> dict[str, Allocator]:
        return {name: MEMBERS[name]() for name in self.names}

    @property
    def needs(self) -> Needs:
        return max((member.needs for member in self.members.values()), key=_ORDER.index)

    @property
    def measures_weights(self) -> bool:
        return any(member.measures_weights for member in self.members.values())

    def work(self, linears: Sequence[LinearInfo]) -> float:
        """What its members measure beside statistics, in float32 operations that take as long."""
        counted = (getattr(member, "work", None) for member in self.members.values())
        return float(sum(work(linears) for work in counted if work is not None))

    def measure(self, linears: Mapping[str, tuple[Tensor, Statistics | None]]) -> dict[str, Any]:
        return {name: m.measure(linears) for name, m in self.members.items() if m.measures_weights}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        made = []
        for name, member in self.members.items():
            measures = (
                tuple(measured[name] for measured in profile.measures) if member.measures_weights else ()
            )
            made.append(member.allocate(Profile(profile.linears, measures), target))
        mean = {info.name: sum(one[info.name] for one in made) / len(made) for info in profile.linears}
        return exact(mean, profile.sizes, target)
