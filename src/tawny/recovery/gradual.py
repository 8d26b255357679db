"""Prune in several steps with recovery between them: what a step cuts away, the next training makes up for.

Weights that are zero go first in every solver, so masks grow and never give a zero back. Tokens and minutes are shared
out over the steps, more to the later ones, which lose more: step i of n gets i / (1 + … + n).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tawny.calibration.mixture import check_texts, texts_identity
from tawny.errors import NumericalError, RecipeError
from tawny.model.identity import source_identity
from tawny.model.source import resolve
from tawny.model.trust import opens_models
from tawny.process_group import refuse_several
from tawny.progress import Progress, silent
from tawny.pruning.run import prune
from tawny.recipe.files import read_mapping
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.recovery.dense import RecoveryRequest
from tawny.recovery.packed import check_factors
from tawny.recovery.record import RecoveryRecord, draw
from tawny.recovery.run import carry_out
from tawny.recovery.settings import Recovery
from tawny.recovery.writing import retell
from tawny.run.place import Workplace, models_read, place_of


@opens_models
def recover_gradually(
    source: str | Path,
    teacher: str | Path,
    out: str | Path,
    sparsities: Sequence[float],
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    settings: Recovery | Mapping[str, Any] | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> RecoveryRecord:
    """Prune `source` to each of `sparsities` in turn and recover it after each.

    Args:
        source: the dense model, or one pruned less than the first sparsity.
        recipe: how to prune; its sparsity is replaced. Left out, pruning calibrates on the text that is trained on. The
            text `self` is the teacher's, in every step. If it names no device, that of the training is taken.
        settings: how to train; `tokens` and `minutes` are those of all steps together.
        overwrite: replace an existing `out` once the new one is complete, and discard an unfinished run, unless it is
            this same one, which goes on.
        trust_remote_code: let code that lies in a model's folder run.

    Returns:
        The record of the last recovery; `stages` sums up all of them.

    Raises:
        RecipeError: the sparsities do not rise, or torchrun started several processes.
        NumericalError: the loss of a step became NaN; its best model so far stays in `OUT.partial`.
        OutputError: `OUT.partial` holds the steps of another run, or `out` cannot be written.
    """
    refuse_several("recovery")
    place = Workplace(place_of(out))
    if not sparsities or sorted(set(sparsities)) != list(sparsities):
        raise RecipeError(
            f"gradual sparsities {list(sparsities)} do not rise; expected such as 0.4,0.55,0.65,0.7"
        )
    chosen = Recovery.make(settings)
    check_texts(chosen.text)
    folder = resolve(source, progress.say)
    recipes = _recipes(recipe, chosen, sparsities)
    check_factors(chosen, recipes[0].values.names, "what each step prunes")
    identity = {
        "sparsities": list(sparsities),
        "recipe": recipes[0].to_mapping() | {"sparsity": None},
        "settings": chosen.to_mapping(),
        "model": source_identity(folder),
        "teacher": source_identity(teacher),
        "text": texts_identity(chosen.text),
    }

    whole = len(recipes) * (len(recipes) + 1) / 2
    stages: list[dict[str, Any]] = []
    with place:
        place.claim(overwrite=overwrite, reads=models_read(model=source, teacher=teacher))
        place.require(verb="recover --through", **identity)
        place.begin()
        here = folder
        for number, recipe in enumerate(recipes):
            share = (number + 1) / whole
            pruned, recovered = (place.steps / f"{number}-{name}" for name in ("pruned", "recovered"))
            progress.say(f"step {number + 1} of {len(recipes)}: {recipe.sparsity:.0%}")
            part = dataclasses.replace(
                chosen,
                tokens=max(1, round(chosen.tokens * share)),
                minutes=None if chosen.minutes is None else chosen.minutes * share,
            )
            if not pruned.exists() and not recovered.exists():
                prune(here, pruned, recipe=recipe, progress=progress, author=teacher)
            if not recovered.exists():
                carry_out(RecoveryRequest(pruned, teacher, recovered, part, progress))
            shutil.rmtree(pruned, ignore_errors=True)
            record = RecoveryRecord.read(recovered / "recover.json")
            if record.failure is not None:  # told again when it is repeated, and no step follows
                raise NumericalError(f"step {number + 1} of {len(recipes)}, in {recovered}: {record.failure}")
            kept = ("sparsity", "tokens", "steps", "start", "best", "seconds", "warnings")
            # The last one's record is that of all, once it was told.
            stages.append(record.stages[-1] if record.stages else {key: getattr(record, key) for key in kept})
            here = recovered
        record.stages, record.source, record.out = stages, str(source), str(place.out)
        record.settings |= {"tokens": chosen.tokens, "minutes": chosen.minutes}
        record.tokens = sum(stage["tokens"] for stage in stages)
        record.seconds = _sums([stage["seconds"] for stage in stages])
        retell(here, record, source=str(source), base=folder)
        draw(record, here, progress)
        place.deliver(here)
    return record


def _sums(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for each in seconds for key in each)
    return {key: sum(each.get(key, 0.0) for each in seconds) for key in keys}


def _recipes(
    recipe: Recipe | Mapping[str, Any] | str | Path | None, chosen: Recovery, sparsities: Sequence[float]
) -> list[Recipe]:
    """How each step prunes: as `recipe` says, else on the text and the device of the training."""
    if recipe is None:
        recipe = {"calibration": {"text": chosen.text, "bos": chosen.bos, "strict": chosen.strict}}
    if isinstance(recipe, Recipe):  # spells out its defaults, and so does not say whether a device was named
        base = {key: value for key, value in recipe.to_mapping().items() if (key, value) != ("device", "cpu")}
    else:
        base = dict(recipe if isinstance(recipe, Mapping) else read_mapping(recipe))
    base.setdefault("device", chosen.device)
    return [resolve_recipe(base, {"sparsity": sparsity}) for sparsity in sparsities]
