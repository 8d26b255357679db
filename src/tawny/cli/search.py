"""`tawny search`: the allocation that keeps a model nearest to the dense one, found by trying."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tawny
from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, RECIPE, Memory, Model, StartOver, option, path_named, shared
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.report.frames import Result, Shown, facts, parts, table
from tawny.words import duration, percent, size

_SHOWN = 5  # of everything that was tried


@dataclass(frozen=True)
class Trying:
    """How much a search is to try; None is unset."""

    trials: Annotated[
        int | None, shared("--trials N", "Allocations to try in all. Default: 160.", RECIPE)
    ] = None
    budget: Annotated[
        str | None, shared("--budget TIME", "Stop trying after this time, such as 20m or 2h.", RECIPE)
    ] = None

    def wanted(self, given: Given) -> dict[str, Any]:
        """The recipe and the settings of a search."""
        from tawny.choosing.settings import SearchSettings

        given.refuse(["allocator"], "a search chooses")
        rest, own = given.parted("search.")
        return {"recipe": rest.recipe(), "settings": SearchSettings.make(**vars(self) | own)}


@recipe_verb(
    "tawny search smollm2 --out allocation.yaml -s 0.6 --calibration wiki --samples 32 --seqlen 1024",
    "tawny search ./model --out allocation.yaml -s 0.7 -m sparsegpt --budget 20m -o search.candidates=owl,atp",
    "tawny prune ./model --out pruned -s 0.7 -m sparsegpt -a allocation.yaml",
    without=("allocator",),
)
def search(
    model: Model,
    console: Console,
    *,
    given: Given,
    trying: Trying,
    out: Path = option(
        "--out FILE",
        "Allocation to write, such as allocation.yaml; a picture goes beside it.",
        OUTPUT,
        default=...,
        parser=path_named,
    ),
    memory: Memory = None,
    overwrite: StartOver = False,
) -> None:
    """Try allocations on MODEL and write the best one, for `tawny prune -a FILE`. Uniform wins ties.

    More of the search is set by -o search.KEY=VALUE: offspring, levels, candidates, finalists, windows, length, repeat,
    tokens.
    """
    wanted = trying.wanted(given)
    with console.progress() as progress:
        searched = tawny.search(model, out, **wanted, memory=memory, overwrite=overwrite, progress=progress)
    console.result(searched.to_dict(), search_tables)


def search_tables(found: Result) -> list[Shown]:
    """The last few that were tried, the sums, and who won."""
    frame = table(
        "tried", "divergence", "pruned in earnest", title="nearest to the dense model, nats a token"
    )
    decided = [trial for trial in found["trials"] if trial["verdict"] is not None]

    def measured(trial: Result) -> float:
        return float(trial["verdict"] if trial["proof"] is None else trial["proof"])

    broken = [trial for trial in decided if trial["broke_down"]]
    sound = sorted((trial for trial in decided if not trial["broke_down"]), key=measured)
    for trial in [*sound[:_SHOWN], *broken]:
        proof = "–" if trial["proof"] is None else f"{trial['proof']:.4f}"
        proof = "broke down" if trial["broke_down"] else proof
        frame.add(trial["name"], f"{trial['verdict']:.4f}", proof)
    rows = [
        ("tried", f"{len(found['trials'])} allocations, solved by {found['solver']}"),
        *levels_and_windows(found),
        ("time", f"{duration(found['seconds']['total'])}{parts(found['seconds'], 'total', duration)}"),
        ("peak memory", size(found["peak_memory"])),
    ]
    if found["out"]:
        rows.append(("written", f"{found['out']}; its picture and all that was tried are beside it"))
    return [frame, facts(rows + [("warning", warning) for warning in found["warnings"][:5]]), found["says"]]


def levels_and_windows(found: Result) -> list[tuple[str, str]]:
    """What a search compares, and on what."""
    held_out, levels = found["held_out"], found["levels"]
    windows = f"{held_out['windows']} windows of {held_out['tokens']} tokens"
    return [
        ("levels", f"{levels['count']} from {percent(levels['from'])} to {percent(levels['to'])}"),
        ("held out", f"{windows}, {held_out['deciding']} more to decide"),
    ]
