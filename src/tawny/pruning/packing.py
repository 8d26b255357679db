"""Prune, then pack: two steps in one place, so that a run stopped in either is continued by the same command."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tawny.calibration.mixture import texts_identity
from tawny.kinds import kind_of
from tawny.model.identity import source_identity
from tawny.model.source import resolve
from tawny.packed.convert import pack
from tawny.process_group import ProcessGroup
from tawny.progress import Progress, silent
from tawny.pruning.run import prune
from tawny.recipe.schema import Recipe
from tawny.record import Record
from tawny.report.publish import publish
from tawny.run.place import Workplace, models_read, place_of


def prune_and_pack(
    source: str | Path,
    out: str | Path,
    values: str | None = None,
    *,
    recipe: Recipe,
    progress: Progress = silent,
    overwrite: bool = False,
    export: Callable[[Path, Path], Any] | None = None,
    **keys: Any,
) -> Record:
    """`prune`, and `pack` what it wrote into `out`; the dense checkpoint is not kept. Unpacking gives it back.

    Args:
        values: kind of the survivors; None is what the recipe solves for.
        export: writes a dense folder as another, in place of packing it.
        keys: of `prune`.

    Raises:
        UserError: something asked for cannot be done.
        NumericalError: a weight cannot be pruned or packed; names the linear.
    """
    named = recipe.values
    for name in filter(None, (*named.names, named.head, named.embedding) if export is None else ()):
        kind_of(name)  # refuses what no packed folder holds
    folder = resolve(source, progress.say)
    place = Workplace(place_of(out))
    dense, packed = place.steps / "dense", place.steps / "packed"

    def begin() -> None:
        place.claim(overwrite=overwrite, reads=models_read(model=source))
        place.require(
            verb="prune --pack",
            values=values,
            recipe=recipe.to_mapping(),
            model=source_identity(folder),
            text=texts_identity(recipe.calibration.text),
        )
        place.begin()

    def end() -> None:
        write = partial(pack, values=values, progress=progress) if export is None else export
        place.folder("packed", lambda made: write(dense, made))
        record = Record.read(packed / "run.json")
        record.out = str(place.out)
        publish(record, packed)
        place.deliver(packed)

    with ProcessGroup(recipe.device) as processes, place:
        processes.once(begin)
        if processes.same(not dense.exists() and not packed.exists()):
            prune(source, dense, recipe=recipe, progress=progress, overwrite=overwrite, **keys)
        processes.once(end)
    return Record.read(place.out / "run.json")
