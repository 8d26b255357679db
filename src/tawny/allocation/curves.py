"""`curves`: every linear loses weights until the next one would cost the model's output as much as anywhere else.

To second order, a weight that goes costs the model's output

    ½ · G_ii · H_jj · w_ij²   nats      (calibration/output.py, without the terms off the diagonals)

with G the Fisher's factor at the linear's outputs and H = XᵀX at its inputs. What a linear loses with its cheapest weights is a
convex curve over its sparsity, in nats whatever the linear. Their sum over the model is least, for a number of weights in all,
where all curves have one slope (Lagrange), which a bisection finds. So linears are compared by what is measured, and each gets
a sparsity of its own, where scores without a unit can only be compared between blocks. The second order is right for small losses, so linears go only
`strength` of the way from the target to there.

A solver makes up for part of a loss, but in all linears much alike: with curves of SparseGPT itself, which cost a solve of every
linear at every level, the allocation is nearly the same (docs/log/curves.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from tawny.allocation.budget import bisect, exact
from tawny.allocation.profile import Allocation, Allocator, Linears, Profile, largest
from tawny.allocation.scores import bin_edges, histogram, score_sets, wanda_scores
from tawny.calibration.output import Factor
from tawny.calibration.statistics import Needs, Statistics

LEVELS = (0.01, *(k / 20 for k in range(1, 20)))


def prices(root_OI: Tensor) -> list[float]:
    """Squares of the scores that stand at each of `LEVELS` in their order, to within 1/64: what the next weight costs."""
    counts = histogram(root_OI).cpu()
    ranks = torch.tensor(LEVELS, dtype=torch.float64) * float(counts.sum())
    places = torch.searchsorted(counts.cumsum(0).double(), ranks)
    return [float(edge) ** 2 for edge in bin_edges(places)]


@dataclass(frozen=True)
class Curves(Allocator):
    """Linears share the budget by what the model's output feels of their losses: one slope of loss over sparsity for all.

    A weight costs ½·G_ii·H_jj·w_ij² nats, G being the Fisher's factor at the linear's outputs. Every linear has a number of its own,
    `strength` of the way from the target to that of one slope: 0 is uniform.

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given, or not what the output feels.
    """

    strength: Annotated[
        float, Field(ge=0, le=1, allow_inf_nan=False, description="a number in [0, 1], such as 0.75")
    ] = 0.75

    needs: ClassVar[Needs] = "norms"
    output: ClassVar[Factor] = "rows"
    measures_weights: ClassVar[bool] = True

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """A weight and its scores in float32, and 64-bit bins to count them by."""
        return 20 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        tokens = max((seen.tokens for _, seen in linears.values() if seen is not None), default=1)
        half = 0.5 / max(tokens, 1)
        costs = {name: prices(scores_OI) for name, scores_OI in score_sets(linears, _felt_scores)}
        return {"prices": {name: [half * price for price in some] for name, some in costs.items()}}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        sizes, curves = profile.sizes, {}
        for name, some in ((n, p) for block in profile.measures for n, p in block["prices"].items()):
            if name in sizes and some[-1] > 0:  # one that nothing is felt of says nothing
                curves[name] = np.log(np.maximum(some, some[-1] * 1e-12))
        if not curves:
            return exact(dict.fromkeys(sizes, target), sizes, target)

        def at(price: float) -> dict[str, float]:
            return {
                name: float(np.interp(price, curves[name], LEVELS)) if name in curves else target
                for name in sizes
            }

        def above(price: float) -> float:
            return math.fsum(share * sizes[name] for name, share in at(price).items()) - target * total

        total = sum(sizes.values())
        ends = [float(edge) for curve in curves.values() for edge in (curve[0], curve[-1])]
        wish = at(bisect(above, min(ends), max(ends)))
        raw = {name: target + self.strength * (share - target) for name, share in wish.items()}
        return exact(raw, sizes, target, high=max(LEVELS[-1], target))


def _felt_scores(W_OI: Tensor, statistics: Statistics | None) -> Tensor:
    """√(G_ii H_jj)·|w_ij|: twice the square is what the weight costs."""
    if statistics is None or statistics.output is None:
        raise ValueError("curves need what the output feels of a linear, and were not given it")
    root_O = statistics.output.diagonal.clamp(min=0).sqrt()
    return wanda_scores(W_OI, statistics).mul_(root_O[:, None])
