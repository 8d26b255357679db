"""`tawny fit`: the best packed model of a size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tawny
from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, Aim, Memory, Model, StartOver, folder_named, shared
from tawny.cli.recipe_options import CHOSEN_BY_FIT, Given, recipe_verb
from tawny.report.frames import Result, Shown, facts, parts
from tawny.report.view import finalists, fit_facts
from tawny.words import duration, percent, size


@recipe_verb(
    "tawny fit smollm2 --bits 4.5 --out fitted --calibration wiki --samples 16 --seqlen 1024",
    "tawny fit ./model --size 700MB --out fitted --memory 6GB",
    "tawny fit ./model --size 700MB --to gguf --out small.gguf -m sparsegpt",
    without=CHOSEN_BY_FIT,
)
def fit(
    model: Model,
    console: Console,
    *,
    given: Given,
    aim: Aim,
    out: Annotated[
        Path,
        shared("--out PATH", "Folder to write, or with --to gguf the file.", OUTPUT, parser=folder_named),
    ],
    memory: Memory = None,
    overwrite: StartOver = False,
) -> None:
    """Make the best model of a size or speed: bits, and zeros where they pay, are chosen for each linear of MODEL.

    What it is judged by is set by -o fit.KEY=VALUE: windows, deciding, length.
    """
    recipe, own = given.of_fit(console.note)
    with console.progress() as progress:
        fitted = tawny.fit(
            model,
            out,
            recipe=recipe,
            overwrite=overwrite,
            memory=memory,
            progress=progress,
            **aim.keys(own),
        )
    console.result(fitted.to_dict(), fit_tables)


def fit_tables(fitted: Result) -> list[Shown]:
    """The finalists, the sums, and what was chosen."""
    used, speed = size(fitted["bytes"]), fitted["speed"]
    if fitted["budget"]:
        used += f" of {size(fitted['budget'])} ({percent(fitted['bytes'] / fitted['budget'], 1)})"
    rows = [("size", used)]
    if speed:
        low, high = speed["quartiles"]
        reached = f"{speed['measured']:.1f} tokens a second (quartiles {low:.1f} to {high:.1f})"
        rows.append(("speed", f"{reached}, asked for {speed['asked']:g}"))
    written = f"{fitted['out']}; fit.png shows bits and zeros, fit.json all that was measured"
    if fitted["settings"]["to"] == "gguf":
        written = f"{fitted['out']}; its card ends in .md, and all that was measured in .json"
    rows += [
        *(row for row in fit_facts(fitted) if row[0] not in ("asked for", "chosen")),
        ("time", f"{duration(fitted['seconds']['total'])}{parts(fitted['seconds'], 'total', duration)}"),
        ("peak memory", size(fitted["peak_memory"])),
        ("written", written),
    ]
    return [
        finalists(fitted),
        facts(rows + [("warning", warning) for warning in fitted["warnings"]]),
        fitted["says"],
    ]
