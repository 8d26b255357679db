"""How `tawny search` searches: options beside the recipe, under `search.` (`-o search.trials=40`)."""

from __future__ import annotations

__all__ = ["FAMILIES", "Settings", "seconds_in"]

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from tawny.checked import checked
from tawny.errors import RecipeError, nearest

# Whose strengths are tried beside uniform, which always is.
FAMILIES = ("owl", "dlp", "atp", "lsa", "alpha", "blend")
DECIDING = 4  # windows to decide on, for each to search on
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Settings:
    """What is tried, and what it is judged by; the ideas are EvoPress's (Sieberling 2025, ICML, 2410.14649).

    Attributes:
        trials: allocations to try in all.
        offspring: allocations a round.
        levels: sparsities that each linear is solved at; an odd number, spread over half of the way to 0 or 1.
        candidates: allocators whose strengths are tried, by name.
        finalists: how many of the best are pruned in earnest, beside uniform. With 0 the comparison of solutions decides.
        windows: held-out windows to search on; four times as many decide, where the text has them.
        length: tokens of a window, at most those of a calibration sample.
        repeat: share of a window, at its end, that says again what stood before, so that copying counts.
        tokens: of the calibration that the solutions are made with.
        proxy: solver of the solutions; None: the recipe's, or the quicker one that it names.
        budget: time such as 10m after which no new round begins; then another run need not give the same bytes.
    """

    trials: Count = 160
    offspring: Count = 16
    levels: Annotated[int, Field(ge=3)] = 11
    candidates: str = ",".join(FAMILIES)
    finalists: Annotated[int, Field(ge=0, le=4)] = 3  # a search ends with four beside uniform
    windows: Count = 4
    length: Annotated[int, Field(ge=2)] = 1024
    repeat: Annotated[float, Field(ge=0, le=0.5)] = 0.125
    tokens: Count = 32768
    proxy: str | None = None
    budget: str | float | None = None

    @classmethod
    def make(cls, base: Settings | None = None, /, **keys: Any) -> Settings:
        """The only door; a key that is None is unset.

        Raises:
            RecipeError: an unknown key or a value out of range.
        """
        from tawny.solvers import SOLVERS

        given = {key: value for key, value in keys.items() if value is not None}
        made = checked(cls, {**(asdict(base) if base else {}), **given}, "search key", "search")
        if made.levels % 2 == 0:
            raise RecipeError(
                f"search.levels is {made.levels}; expected an odd number: as many below the target as above it"
            )
        for name in made.families:
            if name not in FAMILIES:
                raise RecipeError(
                    f"search.candidates names {name!r}{nearest(name, FAMILIES)}: {', '.join(FAMILIES)}"
                )
        if made.proxy is not None and made.proxy not in SOLVERS:
            raise RecipeError(
                f"search.proxy {made.proxy!r} is no solver{nearest(made.proxy, SOLVERS)}: {', '.join(SOLVERS)}"
            )
        _ = made.seconds
        return made

    @property
    def held_out(self) -> int:
        """Windows to keep out of the calibration: those to search on, and others to decide on.

        Divergences of two finalists on 4,096 tokens differ by chance by as much as most finalists do (0.03 nats for
        SmolLM2-135M at 70 %). Beside pruning them the windows that decide cost little.
        """
        return (1 + DECIDING) * self.windows

    @property
    def families(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.candidates.split(",") if name.strip()))

    @property
    def seconds(self) -> float | None:
        """The budget: `90s`, `10m`, `1.5h` or a number of seconds."""
        return seconds_in(self.budget, "search.budget")

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


def seconds_in(time: str | float | None, key: str) -> float | None:
    """`90s`, `10m`, `1.5h` or a number of seconds.

    Raises:
        RecipeError: it is no time.
    """
    if time is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", str(time))
    if not found:
        raise RecipeError(f"{key} is {time!r}; expected a time such as 90s, 10m or 1.5h")
    return float(found[1]) * _UNITS[found[2] or "s"]


def parted(keys: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the recipe, and those of the search without their `search.`."""
    own = {key.removeprefix("search."): value for key, value in keys.items() if key.startswith("search.")}
    return {key: value for key, value in keys.items() if not key.startswith("search.")}, own
