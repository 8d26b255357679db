"""What a search will take, known before it starts: what its walk collects, windows, memory, disk and tokens."""

from __future__ import annotations

__all__ = [
    "candidates_at_once",
    "cost_of_search",
    "held_back",
    "measuring",
    "needs_of_search",
    "searched_windows",
    "stand_in",
    "store_bytes",
]

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tawny.allocation.alpha import Alpha
from tawny.allocation.auto import Auto
from tawny.allocation.blend import Blend
from tawny.allocation.dlp import Dlp
from tawny.allocation.lsa import Lsa
from tawny.allocation.profile import LinearInfo
from tawny.calibration.statistics import Needs, most
from tawny.model.streams import Samples
from tawny.pruning.profiling import Together
from tawny.recipe.schema import Recipe
from tawny.search.grid import BLENDS, OWL_MS
from tawny.search.space import Space, make_space
from tawny.solvers import SOLVERS, Solver

_HIDDEN_BYTES = 1_000_000_000  # of hidden states of candidates that go through the model together
_BLENDED = dict.fromkeys(name for of in BLENDS for name in of.split(","))
_MEASURED: dict[str, Callable[[], Any]] = {
    "dlp": Dlp,
    "lsa": Lsa,
    "alpha": Alpha,
    "blend": lambda: Blend(",".join(_BLENDED)),
}


def stand_in(auto: Auto, name: str, solver: Solver) -> tuple[str, Solver]:
    """What makes the solutions that a search puts together: `proxy`, or what the solver names as fast and alike."""
    other = auto.proxy or getattr(solver, "stand_in", None)
    return (name, solver) if other in (None, name) else (other, SOLVERS[other]())


def needs_of_search(recipe: Recipe) -> Needs:
    """What the walk of a search collects: for the solutions, the refit of each, and the candidates."""
    auto: Auto = recipe.make_allocator()
    solver = stand_in(auto, recipe.solver.name, recipe.make_solver())[1]
    refit: Needs = "hessian" if recipe.refit else "none"
    return most([solver.needs, measuring(auto).needs, refit])


def measuring(auto: Auto) -> Together:
    """What the candidates of a search read from a block."""
    return Together({name: _MEASURED[name]() for name in auto.families if name in _MEASURED}, OWL_MS)


def searched_windows(auto: Auto, held_out: int) -> int:
    """How many of the held-out windows are searched on; a short text leaves no more than half."""
    return min(auto.windows, held_out - held_out // 2)


def held_back(auto: Auto, samples: Samples) -> tuple[int, int]:
    """How many windows of how many tokens are kept back of samples that were given; those with a mask are not cut."""
    length = samples.seqlen if samples.mask is not None else min(auto.length, samples.seqlen)
    return min(auto.held_out, len(samples) // 4) or 1, length


def store_bytes(space: Space, dtype: torch.dtype) -> int:
    """Bytes that the solutions of all levels take; a level that removes nothing takes none."""
    return sum(
        x.numel * dtype.itemsize
        for i, x in enumerate(space.linears)
        for level in space.levels
        if space.sparsity(i, level) > 0
    )


def candidates_at_once(size: int) -> int:
    """How many candidates with hidden states of so many bytes go through a block together: each before and behind it."""
    return max(1, _HIDDEN_BYTES // (2 * size))


def _hidden_of(candidates: int, size: int) -> int:
    """Bytes of hidden states while so many candidates are compared, `size` each: theirs, and the embedded tokens."""
    return (2 * min(candidates, candidates_at_once(size)) + 1) * size


def cost_of_search(
    recipe: Recipe,
    linears: Sequence[LinearInfo],
    dtype: torch.dtype,
    hidden_bytes: int,
    *,
    given: Samples | None = None,
) -> dict[str, int]:
    """What a search takes: `disk`, `candidates` and `held_out` (hidden states in memory) in bytes, `levels`, calibration
    `samples`, `tokens` through the whole model, and `finalists` that are pruned in earnest.

    Args:
        dtype: of the solutions that are kept.
        hidden_bytes: of one token.
        given: samples in the place of the recipe's text.
    """
    auto: Auto = recipe.make_allocator()
    space = make_space(tuple(linears), recipe.make_pattern(), recipe.sparsity, auto.levels, auto.step)
    seqlen = recipe.calibration.seqlen if given is None else given.seqlen
    held_out, length = auto.held_out, min(auto.length, seqlen)
    if given is not None:
        held_out, length = held_back(auto, given)
    all_windows = searched_windows(auto, held_out)
    few = max(1, all_windows // 4)
    generations = math.ceil(auto.trials / 3 / auto.offspring)
    tried = auto.trials * few + generations * (
        max(1, auto.offspring // 4) * max(1, all_windows // 2) + max(1, auto.offspring // 8) * all_windows
    )
    proven = auto.finalists and auto.finalists + 1  # with uniform
    ranking = all_windows if proven else held_out - all_windows
    rounds = [
        (auto.offspring + len(auto.families), few),
        (max(4, auto.trials // 4), max(1, all_windows // 2)),
        (max(5, auto.offspring // 8), all_windows),
        (5, ranking),
    ]
    deciding = (held_out - all_windows) * (proven or 5) + (5 * all_windows if proven else 0)
    return {
        "disk": store_bytes(space, dtype),
        "levels": len(space.levels),
        "tokens": (tried + 5 * all_windows + deciding + held_out) * length,
        "samples": max(1, math.ceil(auto.tokens / seqlen)),
        "candidates": max(_hidden_of(n, windows * length * hidden_bytes) for n, windows in rounds),
        "held_out": held_out * length * hidden_bytes,
        "finalists": proven,
    }
