"""What a fit measured, kept beside its model: another size of the same model is chosen from the same measures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tawny.choosing.level import Measures
from tawny.errors import RecipeError
from tawny.model import durable
from tawny.run.journal import Journal
from tawny.run.place import unfinished

REACTIONS = "reactions"  # what the journal calls it
MEASURED = "measured.json"


@dataclass(frozen=True)
class Measured:
    """What a fit measured of a model, to choose from.

    Attributes:
        measures: of each linear.
        reactions: of each linear, what it adds to the output's divergence when it is rounded to the probe; nats a token.
        head, embedding: by kind, what rounding it adds; no embedding where it shares its weight with the head.
    """

    measures: dict[str, Measures]
    reactions: dict[str, float]
    head: dict[str, float]
    embedding: dict[str, float]

    @classmethod
    def kept_in(cls, journal: Mapping[str, Any]) -> Measured:
        """What a journal or a file holds."""
        kept = journal[REACTIONS]
        measures = {name: Measures(**each) for name, each in kept["measures"].items()}
        head, embedding = (
            {kind: value for kind, value in kept[end].items() if value is not None}
            for end in ("head", "embedding")
        )
        return cls(measures, kept["reactions"], head, embedding)


def keep_measured(folder: Path, measured: Mapping[str, Any]) -> None:
    """Write what was measured, and `of` what."""
    text = json.dumps(dict(measured), ensure_ascii=False, allow_nan=False)
    durable.write(folder / MEASURED, (text + "\n").encode())


def read_measured(folder: Path) -> dict[str, Any]:
    """What a fit measured that has this folder, or was stopped or refused on its way to it.

    Raises:
        RecipeError: there is no such thing.
    """
    if not folder.exists() and not unfinished(folder).exists():
        raise RecipeError(
            f"measured {str(folder)!r} is not there; give the folder or the GGUF file of an earlier fit"
        )
    path = folder / MEASURED if folder.is_dir() else folder.with_name(f"{folder.name}.json")
    try:
        kept = json.loads(
            (path if path.exists() else unfinished(folder) / "steps" / MEASURED).read_text(encoding="utf-8")
        )
        return {"of": dict(kept["of"]), REACTIONS: dict(kept[REACTIONS])}
    except (OSError, ValueError, KeyError, TypeError):
        raise RecipeError(
            f"measured {str(folder)!r} was not made by `tawny fit`; give one that was: a folder holds a {MEASURED}, and beside a GGUF file there is its .json"
        ) from None


def _apart(of: Mapping[str, Any]) -> dict[str, Any]:
    """What measures are of, each key of the recipe by itself, and without the solver: nothing is solved for them."""
    of = dict(of)
    recipe = of.pop("recipe", None) or {}
    return of | {f"the recipe's {key}": value for key, value in recipe.items() if key != "solver"}


def take_measured(journal: Journal, earlier: Mapping[str, Any], of: Mapping[str, Any]) -> None:
    """Measure nothing again.

    Raises:
        RecipeError: it was measured of something else.
    """
    plain, own = (_apart(json.loads(json.dumps(each))) for each in (of, earlier["of"]))
    differing = [key for key, value in plain.items() if own.get(key) != value]
    if differing:
        raise RecipeError(
            f"what was measured belongs to another fit, which differs in {' and '.join(differing)}: use that one's model, "
            "recipe and calibration, or leave measured out"
        )
    journal.once(REACTIONS, lambda: earlier[REACTIONS])
