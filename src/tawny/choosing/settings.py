"""How `tawny search` and `tawny fit` go about it: options beside the recipe, under `search.` and `fit.` (`-o search.trials=40`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from tawny.checked import checked
from tawny.errors import RecipeError, nearest
from tawny.patterns import Blocks, Rank
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe

# Whose strengths are tried beside uniform, which always is.
FAMILIES = ("curves", "owl", "dlp", "atp", "lsa", "alpha", "blend")
DECIDING = 4  # windows to decide on, for each to search on
_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}

Count = Annotated[int, Field(ge=1)]
_S = TypeVar("_S")


@dataclass(frozen=True)
class SearchSettings:
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
    budget: str | float | None = None

    @classmethod
    def make(cls, base: SearchSettings | None = None, /, **keys: Any) -> SearchSettings:
        """The only door; a key that is None is unset.

        Raises:
            RecipeError: an unknown key or a value out of range.
        """
        settings = _validated(cls, "search", base, keys)
        if settings.levels % 2 == 0:
            raise RecipeError(
                f"search.levels is {settings.levels}; expected an odd number: as many below the target as above it"
            )
        for name in settings.families:
            if name not in FAMILIES:
                raise RecipeError(
                    f"search.candidates names {name!r}{nearest(name, FAMILIES)}: {', '.join(FAMILIES)}"
                )
        _ = settings.seconds
        return settings

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
        """The budget: `90s`, `10m`, `1.5h` or a number of seconds.

        Raises:
            RecipeError: it is no time.
        """
        if self.budget is None:
            return None
        read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|min|h)?\s*", str(self.budget))
        if not read:
            raise RecipeError(f"search.budget is {self.budget!r}; expected a time such as 90s, 10m or 1.5h")
        return float(read[1]) * _UNITS[read[2] or "s"]


@dataclass(frozen=True)
class FitSettings:
    """What finalists are chosen and judged by.

    Attributes:
        windows: held-out windows to measure reactions on; kinds are measured, and the output is asked, on twice as many of the
            calibration.
        deciding: others, to compare finalists on.
        length: tokens of a window, at most those of a calibration sample. Short ones, because a model reacts most to its
            embedding and its first blocks where little text has come before.
        quick: finalists are rounded by best scales, and not solved: one forward each instead of a prune.
        to: what is written: a `packed` folder, one `gguf` file, or a `compressed-tensors` folder.
        kinds: types of the GGUF file, or kinds of compressed-tensors, with commas between; None for all.
        template: a whole GGUF file of the model, whose keys and other tensors are kept.
    """

    windows: Count = 8
    deciding: Annotated[int, Field(ge=2)] = 32
    length: Annotated[int, Field(ge=2)] = 256
    quick: bool = False
    to: Literal["packed", "gguf", "compressed-tensors"] = "packed"
    kinds: str | None = None
    template: str | None = None

    @classmethod
    def make(cls, base: FitSettings | None = None, /, **keys: Any) -> FitSettings:
        """As `SearchSettings.make`."""
        settings = _validated(cls, "fit", base, keys)
        if settings.to == "packed" and settings.kinds is not None:
            raise RecipeError(
                "--kinds restricts --to gguf or --to compressed-tensors: give one of them, or leave it out"
            )
        if settings.to != "gguf" and settings.template:
            raise RecipeError(f"--template belongs to --to gguf: leave it out with --to {settings.to}")
        return settings


def _own_keys(keys: Mapping[str, Any], verb: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of the recipe, and those of a verb without their `search.` or `fit.`."""
    begins = f"{verb}."
    own = {key.removeprefix(begins): value for key, value in keys.items() if key.startswith(begins)}
    return {key: value for key, value in keys.items() if not key.startswith(begins)}, own


def _validated(cls: type[_S], verb: str, base: Any, keys: Mapping[str, Any]) -> _S:
    given = {key: value for key, value in keys.items() if value is not None}
    return checked(cls, {**(asdict(base) if base else {}), **given}, f"{verb} key", verb)


def what_is_fitted(
    recipe: Recipe | None, settings: FitSettings | None, keys: Mapping[str, Any], **options: Any
) -> tuple[Recipe, FitSettings]:
    """The recipe and the settings of a fit; `keys` are of both, and an option that is None is unset."""
    of_recipe, own = _own_keys(keys, "fit")
    own |= {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    return _recipe_of_fit(recipe, of_recipe), FitSettings.make(settings, **own)


def _recipe_of_fit(recipe: Recipe | None, keys: Mapping[str, Any]) -> Recipe:
    """The recipe of all that is not chosen here."""
    merged = resolve_recipe(recipe, **{"sparsity": 0.0, "allocator": "uniform", **keys})
    chosen = {
        "sparsity": merged.sparsity,
        "values": merged.values.names or merged.values.head or merged.values.embedding,
        "dtype": merged.dtype,
        "pattern": merged.pattern != "unstructured",
        "allocator": merged.allocator.name != "uniform",
        "include": merged.include,
        "exclude": merged.exclude,
        "refit": merged.refit,
    }
    wrong = [key for key, value in chosen.items() if value]
    if wrong:
        raise RecipeError(
            f"a fit chooses zeros and bits of every linear itself: leave {' and '.join(wrong)} out"
        )
    if merged.make_solver().needs != "hessian":
        raise RecipeError(
            f"a fit weighs kinds by their Hessian error, and {merged.solver.name} has none: choose alps or sparsegpt"
        )
    return merged


def what_is_searched(
    recipe: Recipe | None, settings: SearchSettings | None, keys: Mapping[str, Any]
) -> tuple[Recipe, SearchSettings]:
    """The recipe of what is pruned in a search, and how it searches; `keys` are of both."""
    of_recipe, own = _own_keys(keys, "search")
    if of_recipe.get("allocator") is not None:
        raise RecipeError("a search finds the allocation itself: leave the allocator out")
    recipe = resolve_recipe(recipe, {"refine.epochs": 0}, **of_recipe, allocator="uniform")
    if isinstance(pattern := recipe.make_pattern(), Blocks | Rank):
        raise RecipeError(
            f"a search moves weights, whole members or experts from one linear to another, and {pattern} removes none: give this pattern "
            "to `tawny prune`, or search with another"
        )
    if recipe.values.mean is not None:
        raise RecipeError(
            "a search moves zeros, and values.mean spends the budget in bits: leave values.mean and values.of out, or use a fit"
        )
    return recipe, SearchSettings.make(settings, **own)
