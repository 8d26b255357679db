"""What a recipe asks of a model's memory, in numbers: a plan and a run are placed by the same."""

from __future__ import annotations

__all__ = ["demand_of", "needs_of"]

from collections.abc import Sequence
from typing import Any

from tawny.allocation.profile import LinearInfo, measuring_bytes
from tawny.calibration.statistics import Needs
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.pruning.memory_plan import Demand, workspace
from tawny.pruning.profiling import profile_count
from tawny.recipe.schema import Recipe
from tawny.search.cost import cost_of_search, measuring, needs_of_search, stand_in


def needs_of(recipe: Recipe, solver: Any) -> Needs:
    """What calibration has to yield for the solves of a recipe."""
    needs: Needs = "hessian" if recipe.refit else solver.needs
    return needs


def demand_of(
    recipe: Recipe,
    stack: Stack,
    by_block: Sequence[Sequence[Linear]],
    solver: Any,
    allocator: Any,
    characters: int,
    samples: tuple[int, int] | None = None,
    *,
    given: Samples | None = None,
) -> Demand:
    """What a run asks of memory; `samples` (count, tokens) where they are not the recipe's, `given` where no text is."""
    needs = needs_of(recipe, solver)
    refining = recipe.refine.epochs > 0
    wanted = needs != "none" or allocator.needs != "none" or refining
    count, seqlen = samples or (recipe.calibration.samples, recipe.calibration.seqlen)
    profiled = profile_count(recipe, count, seqlen) if wanted and count else 0
    searching: dict[str, Any] = {}
    measurer: Any = allocator
    if getattr(allocator, "searches", False):
        measurer = measuring(allocator)
        infos = [LinearInfo(x.name, x.shape, i) for i, linears in enumerate(by_block) for x in linears]
        cost = cost_of_search(recipe, infos, stack.compute, stack.hidden_bytes, given=given)
        by = stand_in(allocator, recipe.solver.name, solver)[1]
        searching = {
            "searched": min(cost["samples"], count),
            "search_needs": needs_of_search(recipe),
            "level_needs": needs_of(recipe, by),
            "level_workspace": workspace(by, needs_of(recipe, by)),
            "held_out": cost["held_out"],
            "candidates": cost["candidates"],
            "finals": cost["finalists"] > 0,
        }
    return Demand(
        stack=stack,
        by_block=by_block,
        needs=needs,
        allocator_needs=allocator.needs,
        measures=allocator.measures_weights,
        samples=count if wanted else 0,
        seqlen=seqlen if wanted else 0,
        profiled=profiled,
        characters=characters if wanted else 0,
        in_data_order=recipe.order == "data",
        refining=refining,
        workspace=workspace(solver, needs),
        measuring=lambda shapes: measuring_bytes(measurer, shapes),
        **searching,
    )
