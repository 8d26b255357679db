"""What a fit goes by beside its size: settings, the recipe of what it does not choose, memory, and a look at the source."""

from __future__ import annotations

__all__ = ["FitSettings", "demand_of_fit", "few_bits", "parted", "probes_bytes"]

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field

from tawny.checked import checked
from tawny.choosing.demand import SearchDemand
from tawny.choosing.measuring import TOGETHER
from tawny.choosing.settings import seconds_in
from tawny.choosing.solving import level_dtype
from tawny.errors import RecipeError
from tawny.pruning.memory_plan import LOGIT_BYTES, Demand, Load
from tawny.pruning.prepare import Job, demand_of
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe

_FEW_BITS = 20  # different values of 32 neighbours; weights that were never rounded have nearly 32

# Bytes for each weight of a head or an embedding while it is packed, with what comes back of it.
_PACKED_END = 16

Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class FitSettings:
    """What finalists are chosen and judged by.

    Attributes:
        windows: held-out windows to measure reactions on.
        deciding: others, to compare finalists on.
        length: tokens of a window, at most those of a calibration sample. Short ones, because a model reacts most to its
            embedding and its first blocks where little text has come before.
        budget: time such as 20m in which the choice is refined by measured divergence; then another run need not give the
            same bytes. With it, more `windows` pay.
    """

    windows: Count = 8
    deciding: Annotated[int, Field(ge=2)] = 32
    length: Annotated[int, Field(ge=2)] = 256
    budget: str | float | None = None

    @property
    def seconds(self) -> float | None:
        return seconds_in(self.budget, "fit.budget")


def parted(
    recipe: Recipe | None, settings: FitSettings | None, keys: Mapping[str, Any]
) -> tuple[Recipe, FitSettings]:
    """The recipe of all that is not chosen here, and what finalists are judged by."""
    own = {key.removeprefix("fit."): value for key, value in keys.items() if key.startswith("fit.")}
    settings = checked(FitSettings, {**(asdict(settings) if settings else {}), **own}, "fit key", "fit")
    _ = settings.seconds
    return _base(recipe, {key: value for key, value in keys.items() if not key.startswith("fit.")}), settings


def _base(recipe: Recipe | None, keys: Mapping[str, Any]) -> Recipe:
    """The recipe of all that is not chosen here."""
    made = resolve_recipe(recipe, **{"sparsity": 0.0, "allocator": "uniform", **keys})
    chosen = {
        "sparsity": made.sparsity,
        "values": made.values.names or made.values.head or made.values.embedding,
        "dtype": made.dtype,
        "pattern": made.pattern != "unstructured",
    }
    chosen |= {
        "allocator": made.allocator.name != "uniform",
        "include": made.include,
        "exclude": made.exclude,
    }
    chosen |= {"refit": made.refit}
    wrong = [key for key, value in chosen.items() if value]
    if wrong:
        raise RecipeError(
            f"a fit chooses zeros and bits of every linear itself: leave {' and '.join(wrong)} out"
        )
    if made.make_solver().needs != "hessian":
        raise RecipeError(
            f"a fit weighs kinds by their Hessian error, and {made.solver.name} has none: choose alps or sparsegpt"
        )
    return made


@dataclass(frozen=True)
class FitDemand:
    """A fit as far as memory is concerned.

    Attributes:
        measuring: the walks that measure, and those that refine.
        finalist: the prune of a finalist, beside the model that measured, which stays open.
        judged: bytes of the hidden states that a finalist is judged by.
    """

    measuring: SearchDemand
    finalist: Demand
    judged: int

    def held(self) -> int | None:
        return self.measuring.held()

    def phases(self, *, spill: bool, held: bool) -> dict[str, dict[str, int]]:
        phases = self.measuring.phases(spill=spill, held=held)
        if "text" not in phases:
            return phases
        stack = self.finalist.stack
        base = {key: value for key, value in phases["text"].items() if key != "text"}
        ends = base["embeddings"] + stack.late_bytes
        largest = max(base["embeddings"], stack.late_bytes) // stack.compute.itemsize
        packing = {**base, "head": stack.late_bytes, "packing": _PACKED_END * largest}
        phases["packing head and embedding"] = packing
        for name, parts in self.finalist.phases(spill=spill, held=held).items():
            phases[f"finalists, {name}"] = {**parts, "the model that measured": ends}
        # The dense model, and a finalist whose head and embedding are decoded for the walk.
        judging = {"the two models": 2 * ends, "hidden_states": 2 * self.judged, "logits": 4 * LOGIT_BYTES}
        phases["judging"] = {
            **base,
            "head": stack.late_bytes,
            "block": self.finalist.block_bytes(),
            **judging,
        }
        return phases


def demand_of_fit(settings: FitSettings, job: Job, load: Load) -> FitDemand:
    finalist = demand_of(job, load)
    walk = replace(finalist, refining=False)
    window = min(settings.length, load.seqlen) * job.stack.hidden_bytes
    hidden = settings.windows * window
    measuring = SearchDemand(walk, None, job.needs, hidden, (2 * TOGETHER + 1) * hidden)
    return FitDemand(measuring, finalist, settings.deciding * window)


def few_bits(job: Job) -> str:
    """A warning, or "": the source is itself a model of few bits that was made dense."""
    first = next(index for index, linears in enumerate(job.by_block) if linears)
    with job.stack.block(first):
        W_OI = job.stack.look(job.by_block[first][0])[:64]
        columns = W_OI.shape[1] // 32 * 32
        values = W_OI[:, :columns].reshape(-1, 32)
        survivors = [part for part in (part[part != 0] for part in values) if len(part)]
        different = [32 * len(torch.unique(part)) / len(part) for part in survivors] or [32]
    if sum(different) / len(different) > _FEW_BITS:
        return ""
    return f"the weights of {job.source} were rounded to few bits before: compare with keeping the file that they came from"


def probes_bytes(job: Job) -> int:
    """Of one rounding of every linear."""
    return sum(x.numel for x in job.linears) * level_dtype(job.stack).itemsize
