"""The finalists of a fit: pruned and packed like any other model, and compared with the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.choosing.scores import lead
from tawny.choosing.table import Finalist
from tawny.errors import NumericalError
from tawny.evaluation.agreement import agreement
from tawny.kinds import solved_kind
from tawny.patterns import removed_count
from tawny.pruning.session import (
    Session,
)
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.report.pages import write_beside
from tawny.words import size

Make = Callable[..., int]  # what makes the model of a `recipe` in a folder, and says the bytes of its files


@dataclass(frozen=True)
class Judged:
    """A finalist that was made.

    Attributes:
        folder: the model that was compared: packed, or what the GGUF file beside it was made from.
        row: of the table of finalists: size, divergence from the dense model, and what of it was expected.
    """

    finalist: Finalist
    folder: Path
    row: dict[str, Any]

    def order(self, allowed: float) -> tuple[bool, float, bool]:
        """By which the best comes first: those of the size that is allowed, the nearest, of equals uniform."""
        return self.row["bytes"] > allowed, self.row["kl"], self.finalist.uniform is None


def judge_all(
    session: Session, base: Recipe, finalists: Sequence[Finalist], deciding: Tensor, make: Make
) -> tuple[list[Judged], list[str]]:
    """Each finalist made and compared once; a line on each that broke down and takes no part.

    Args:
        base: recipe of all that is not chosen.
    """
    place, run = session.place, session.run
    assert place is not None
    judged, broken = [], []
    for number, finalist in enumerate(finalists, 1):
        folder = place.steps / "finalists" / str(number)
        with run.clock(f"finalist {number}"):
            try:
                folder.parent.mkdir(exist_ok=True)
                if not folder.exists():
                    run.progress.say(f"making {finalist.name} ({size(finalist.bytes)})")
                taken = make(folder, recipe=_recipe_of(session, base, finalist, folder))
                judging = partial(judge, session, folder, finalist, deciding, taken)
                row = run.journal.once(f"finalist {number}", judging)
            except NumericalError as error:
                broken.append(f"{finalist.name} breaks down and takes no part: {error}")
            else:
                judged.append(Judged(finalist, folder, row))
        session.run.note_cost()
    return judged, broken


def _recipe_of(session: Session, base: Recipe, finalist: Finalist, folder: Path) -> Recipe:
    """The recipe of a finalist; what its linears get goes into a file beside its folder."""
    ends = {"head": finalist.head, "embedding": finalist.embedding}
    if finalist.uniform is not None:
        return resolve_recipe(base, values={"kind": finalist.uniform, "group_size": finalist.group, **ends})
    numel = {x.name: x.numel for x in session.job.linears}
    removed = sum(removed_count(numel[name], level.sparsity) for name, level in finalist.levels.items())
    kinds = sorted(
        {x.kind for x in finalist.levels.values() if solved_kind(x.kind).scaled},
        key=lambda name: -solved_kind(name).bits,
    )
    lines = [
        f"# {finalist.name}. Its mean sparsity is {removed / sum(numel.values()):.6f}.",
        "# Use it: tawny prune MODEL -c RECIPE --out DIR, with the recipe.yaml beside it.",
        "allocation:",
        *(f"  {name}: {level.sparsity!r}" for name, level in finalist.levels.items()),
        "values:",
        *(f"  {name}: {level.kind}" for name, level in finalist.levels.items()),
    ]
    # Whole: the recipe holds it, and a fit goes on under any spelling of its folder.
    path = folder.resolve().with_suffix(".yaml")
    write_beside(path, "\n".join(lines) + "\n")
    return resolve_recipe(
        base, allocator=str(path), sparsity=removed / sum(numel.values()), values={"of": kinds, **ends}
    )


def judge(session: Session, folder: Path, finalist: Finalist, deciding: Tensor, taken: int) -> dict[str, Any]:
    """A row of the table of finalists."""
    source = session.job.folder
    assert source is not None
    recipe = session.job.recipe
    agreed = agreement(
        folder, source, deciding, compute=recipe.compute, device=recipe.device, progress=session.run.progress
    )
    return {
        "name": finalist.name,
        "uniform": finalist.uniform is not None,
        "bytes": taken,
        "planned": finalist.bytes,
        "bits": 8 * taken / session.job.parameters,
        "head": finalist.head,
        "embedding": finalist.embedding,
        "expected": finalist.expected,
        "kl": agreed.kl,
        "kl_stderr": agreed.kl_stderr,
        "kl_by_window": list(agreed.kl_by_window),
        "top1": agreed.top1,
        "perplexity": agreed.perplexity.perplexity,
        "dense_perplexity": agreed.dense.perplexity,
    }


def apart(better: Judged, other: Judged) -> tuple[float, float]:
    """How far one is ahead of another in nats a token, and the standard error of that, over the same windows."""
    ahead = torch.tensor(other.row["kl_by_window"]) - torch.tensor(better.row["kl_by_window"])
    return float(ahead.mean()), float(ahead.std()) / math.sqrt(len(ahead)) if len(ahead) > 1 else 0.0


def lead_over_uniform(best: Judged, judged: Sequence[Judged]) -> tuple[float, float]:
    """Of the best over the best uniform one, as a share of its divergence, with the standard error."""
    uniform = next((each.row for each in judged if each.row["uniform"]), None)
    if uniform is None or best.row["uniform"] or not uniform["kl"]:
        return 0.0, 0.0
    return lead(best.row["kl_by_window"], uniform["kl_by_window"])
