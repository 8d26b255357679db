"""`auto`: try the others on held-out text, refine the best, keep uniform where nothing beats it there. Only its options live here.

What is tried and how is `search/run.py`: this allocator cannot decide from a profile, it needs the model itself.
The ideas are EvoPress's (Sieberling 2025, ICML, 2410.14649): solve every linear at several sparsities once, put
candidates together from these solutions, compare them with the dense model by KL divergence on a few tokens first and
on more for the best, and improve by moving a step of budget from one place to another.
"""

from __future__ import annotations

__all__ = ["FAMILIES", "Auto", "seconds_of"]

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tawny.allocation.budget import Allocation
from tawny.allocation.profile import Profile
from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import RecipeError, nearest

# Whose strengths can be tried beside uniform, which always is.
FAMILIES = ("owl", "dlp", "atp", "lsa", "alpha", "blend")
_DECIDING = 4  # windows to decide on, for each to search on
_FINALISTS = 4  # three proposals and what was refined: what pruning/evolution.py ends with
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds_of(budget: str | float) -> float:
    """`90s`, `10m`, `1.5h` or a number of seconds."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", str(budget))
    if not found:
        raise RecipeError(f"allocator.budget is {budget!r}; expected a time such as 90s, 10m or 1.5h")
    return float(found[1]) * _UNITS[found[2] or "s"]


def _holds_a_password(url: str) -> bool:
    """Whether a password stands in a URL as itself, before its host or in its query."""
    before_host = re.match(r"[^:]+://[^:/@]*:(.*)@", url)
    queried = re.findall(r"[?&]\w*pass\w*=([^&]*)", url, re.IGNORECASE)
    found = [before_host[1]] if before_host else []
    return any(value and not re.fullmatch(r"\$(\w+|\{\w+\})", value) for value in found + queried)


@dataclass(frozen=True)
class Auto:
    """Tries uniform and every allocator of `candidates` on held-out text and refines the best; uniform if nothing is better.

    `trials` allocations in all, in rounds of `offspring`, put together from solutions at `levels` sparsities that are
    `step` apart; compared by the KL divergence to the dense model on up to `windows` windows of `length` tokens (or of as
    many as a calibration sample has), and the last few on as many others. The last `repeat` of each window, a share, says
    again what stood before, so that copying counts. `tokens` of calibration make the solutions, by `proxy`; without it by
    the recipe's solver, or by sparsegpt where that is alps. The best `finalists` of the last few, and uniform, are pruned in
    earnest, by the recipe's solver on these tokens, without refining; the last word is on those models (0: on what was put
    together), by four times as many windows as the search had, where the text has them. `budget` (10m) may end the search
    early, and then another run need not give the same bytes. `study` is the URL of an Optuna storage that machines share.

    Raises:
        RecipeError: an option is out of range, or it is asked to decide from a profile.
    """

    trials: int = 160
    offspring: int = 16
    levels: int = 11
    step: float | None = None
    candidates: str = ",".join(FAMILIES)
    finalists: int = 3
    windows: int = 4
    length: int = 1024
    repeat: float = 0.125
    tokens: int = 32768
    proxy: str | None = None
    budget: str | float | None = None
    study: str | None = None
    needs: ClassVar[Needs] = "hessian"
    measures_weights: ClassVar[bool] = True
    searches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.finalists <= _FINALISTS:
            raise RecipeError(
                f"allocator.finalists is {self.finalists}; expected a whole number from 0 to {_FINALISTS}, which is how many "
                "a search ends with beside uniform"
            )
        least = {
            "trials": 1,
            "offspring": 1,
            "levels": 3,
            "windows": 1,
            "length": 2,
            "tokens": 1,
        }
        for name, low in least.items():
            if getattr(self, name) < low:
                raise RecipeError(
                    f"allocator.{name} is {getattr(self, name)}; expected a whole number from {low} on"
                )
        if self.levels % 2 == 0:
            raise RecipeError(
                f"allocator.levels is {self.levels}; expected an odd number: as many below the target as above it"
            )
        if self.step is not None and not 0 < self.step < 0.5:
            raise RecipeError(
                f"allocator.step is {self.step}; expected a share of the weights between two levels, such as 0.03"
            )
        if not 0 <= self.repeat <= 0.5:
            raise RecipeError(
                f"allocator.repeat is {self.repeat}; expected the share of a window that repeats what stood before, from 0 to 0.5"
            )
        for name in self.families:
            if name not in FAMILIES:
                raise RecipeError(
                    f"allocator.candidates names {name!r}{nearest(name, FAMILIES)}: {', '.join(FAMILIES)}"
                )
        if self.proxy is not None:
            from tawny.solvers import SOLVERS

            if self.proxy not in SOLVERS:
                raise RecipeError(
                    f"allocator.proxy {self.proxy!r} is no solver{nearest(self.proxy, SOLVERS)}: {', '.join(SOLVERS)}"
                )
        if self.budget is not None:
            seconds_of(self.budget)
        if self.study is not None and _holds_a_password(self.study):
            raise RecipeError(
                "allocator.study holds a password, and a recipe is published with its model: write it as $NAME, "
                "an environment variable is filled in when the study is opened"
            )

    @property
    def held_out(self) -> int:
        """Windows to keep out of the calibration: those to search on, and others to decide on.

        Divergences of two finalists on 4,096 tokens differ by chance by as much as most finalists do (0.03 nats for
        SmolLM2-135M at 70 %); beside pruning them the larger part costs little.
        """
        return (1 + _DECIDING) * self.windows

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.candidates.split(",") if name.strip()))

    def measure(self, linears: Mapping[str, tuple[Tensor, Statistics | None]]) -> dict[str, Any]:
        return {}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        raise RecipeError(
            "auto tries allocations on the model itself and cannot decide from a profile: prune with it"
        )
