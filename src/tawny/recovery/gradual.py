"""Prune in several steps with recovery between them: what a step cuts away, the next training makes up for.

Weights that are zero go first in every solver, so masks grow and never give a zero back. Tokens and minutes are shared
out over the steps, more to the later ones, which lose more: step i of n gets i / (1 + … + n).
"""

from __future__ import annotations

__all__ = ["recover_gradually", "shares"]

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tawny.errors import RecipeError
from tawny.model.durable import writing
from tawny.model.source import resolve
from tawny.pruning.run import prune
from tawny.recipe import Recipe, resolve_recipe
from tawny.recovery.processes import Processes
from tawny.recovery.run import RecoveryRecord, recover
from tawny.recovery.settings import Recovery
from tawny.recovery.writing import check_place
from tawny.watch import Watch, silent


def shares(count: int) -> list[float]:
    """Each step's part of the budget."""
    whole = count * (count + 1) / 2
    return [(index + 1) / whole for index in range(count)]


def recover_gradually(
    source: str | Path,
    teacher: str | Path,
    out: str | Path,
    sparsities: Sequence[float],
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    settings: Recovery | Mapping[str, Any] | None = None,
    watch: Watch = silent,
    overwrite: bool = False,
) -> RecoveryRecord:
    """Prune `source` to each of `sparsities` in turn and recover it after each.

    Args:
        source: the dense model, or one pruned less than the first sparsity.
        recipe: how to prune; its sparsity is replaced.
        settings: how to train; `tokens` and `minutes` are those of all steps together.

    Returns:
        The record of the last recovery; `stages` sums up all of them.

    Raises:
        RecipeError: the sparsities do not rise.
    """
    target = Path(out)
    if not sparsities or sorted(set(sparsities)) != list(sparsities):
        raise RecipeError(
            f"gradual sparsities {list(sparsities)} do not rise; expected such as 0.4,0.55,0.65,0.7"
        )
    chosen = Recovery.make(settings)
    folder = resolve(source, watch.say)
    base = recipe.to_mapping() if isinstance(recipe, Recipe) else recipe
    recipes = [resolve_recipe(base, {"sparsity": sparsity}) for sparsity in sparsities]
    work = target.with_name(target.name + ".stages")

    def begin() -> None:
        check_place(target, overwrite, folder)
        if overwrite:
            shutil.rmtree(work, ignore_errors=True)
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)

    stages: list[dict[str, Any]] = []
    with Processes(chosen.device) as processes:
        processes.once(begin)
        here = folder
        for number, share in enumerate(shares(len(sparsities))):
            pruned, recovered = work / f"{number}-pruned", work / f"{number}-recovered"
            watch.say(f"step {number + 1} of {len(sparsities)}: {sparsities[number]:.0%}")
            if processes.decide(not pruned.exists() and not recovered.exists()):
                prune(here, pruned, recipe=recipes[number], watch=watch)
            if processes.decide(not recovered.exists()):
                part = dataclasses.replace(
                    chosen,
                    tokens=max(1, round(chosen.tokens * share)),
                    minutes=None if chosen.minutes is None else chosen.minutes * share,
                )
                recover(pruned, teacher, recovered, settings=part, watch=watch)
            processes.once(partial(shutil.rmtree, pruned, ignore_errors=True))
            told = json.loads((recovered / "recover.json").read_text(encoding="utf-8"))
            record = RecoveryRecord(**told)
            kept = ("sparsity", "tokens", "steps", "start", "best", "seconds", "warnings")
            stages.append({key: told[key] for key in kept})
            here = recovered
        record.stages, record.source, record.out = stages, str(source), str(target)

        def end() -> None:
            with writing(here):
                (here / "recover.json").write_text(record.to_json(), encoding="utf-8")
                if target.exists():
                    shutil.rmtree(target)
                here.rename(target)
            shutil.rmtree(work, ignore_errors=True)

        processes.once(end)
    return record
