"""OWL: blocks that hold more outliers lose fewer weights.

Yin et al., "Outlier weighed layerwise sparsity (OWL)", ICML 2024, 2310.05175. With A = |W|·‖X‖₂ over all
linears of block l together, in the dense model, the outlier share (layerwise outlier distribution, LOD) is

    D_l = 100 · #{A > M·mean(A)} / n_l                                            in %,
    density_l = 2λ·(D_l − min D)/(max D − min D) + shift,   sparsity_l = 1 − density_l,

one ratio a block: the authors confirm that finer ones hurt, and `granularity` is there to see it. The shift is what makes the parameter-weighted
mean the target, whatever clamping is needed (`budget.exact`). Equal D, or λ = 0, is uniform.

`compat="official"` gives the numbers of the authors' code: float32 scores laid end to end, the mean over
blocks unweighted, no repair where a ratio leaves [0, 1] (one that is not positive becomes 0.01 there).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from tawny.allocation import budget
from tawny.allocation.profile import Allocation, Allocator, Linears, Profile, largest
from tawny.allocation.scores import band, column_sums, count_above
from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import NumericalError, RecipeError, check_option

Granularity = Literal["block", "module", "linear"]
Unit = TypeVar("Unit", int, tuple[int, str])


@dataclass(frozen=True)
class Owl(Allocator):
    """More outliers in a block, less pruning; one ratio a block from the dense model's profile.

    D_l = % of |W|·‖X‖ above M times its mean; density spread over 2λ. Yin et al. 2024 (2310.05175).
    For studies: `reverse` turns it round (more outliers, more pruning); `granularity` counts outliers, each above M times
    its own mean, of every module (attention, FFN) or linear instead, and gives each a ratio of its own.

    Raises:
        RecipeError: an option is out of range.
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given.
    """

    M: Annotated[float, Field(gt=0, allow_inf_nan=False, description="a positive number, such as 5")] = 5.0
    lambda_: Annotated[float, Field(ge=0, le=1, description="a number in [0, 1], such as 0.08")] = 0.08
    reverse: bool = False
    granularity: Granularity = "block"
    compat: Literal["official"] | None = None

    needs: ClassVar[Needs] = "norms"
    measures_weights: ClassVar[bool] = True

    @property
    def outlier_M(self) -> float:
        return self.M

    def __post_init__(self) -> None:
        legal = self.compat != "official" or self.granularity == "block"
        known = "block, the only one that the official code knows: leave compat out"
        check_option(legal, "allocator.granularity", self.granularity, known)

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """A weight in float32 and parts of its scores; the official mean is over all scores of a block at once."""
        whole = 8 * sum(map(math.prod, shapes)) if self.compat == "official" else 0
        return whole + 16 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        measures = measure_outliers(linears, (self.M,), official=self.compat == "official")
        if self.granularity != "block":
            parts: dict[str, dict[str, tuple[Tensor, Statistics | None]]] = {}
            for name, inputs in linears.items():
                parts.setdefault(_part(name, self.granularity), {})[name] = inputs
            measures["parts"] = {
                part: measure_outliers(some, (self.M,))["outlier_share"] for part, some in parts.items()
            }
        return measures

    def allocate(self, profile: Profile, target: float) -> Allocation:
        if self.granularity != "block":
            unit = {x.name: (x.block, _part(x.name, self.granularity)) for x in profile.linears}
            shares = {
                (block, part): self._share({"outlier_share": profile.measures[block]["parts"][part]}, block)
                for block, part in unit.values()
            }
            dense = self._densities(shares)
            finer = {x.name: -dense[unit[x.name]] for x in profile.linears}
            return budget.exact(finer, profile.sizes, target)
        share = {
            block: self._share(profile.measures[block], block)
            for block in range(len(profile.measures))
            if profile.parameters(block)
        }
        if self.compat == "official":
            ratio = self._official(share, target)
            return {linear.name: ratio[linear.block] for linear in profile.linears}
        density = self._densities(share)
        raw = {linear.name: -density[linear.block] for linear in profile.linears}
        return budget.exact(raw, profile.sizes, target)

    def _share(self, measure: Mapping[str, Any], block: int) -> float:
        """D_l of one block, or −D_l when reversed."""
        shares = measure.get("outlier_share", {})
        if _key(self.M) not in shares:
            raise RecipeError(
                f"the profile of block {block} has M = {', '.join(shares)}; expected {_key(self.M)}"
            )
        value = float(shares[_key(self.M)])
        if not math.isfinite(value):
            raise NumericalError(
                f"the outlier share of block {block} is {value}; expected a number in [0, 100]"
            )
        return -value if self.reverse else value

    def _densities(self, share: Mapping[Unit, float]) -> dict[Unit, float]:
        """2λ·(D − min)/(max − min) of each unit, before the shift."""
        return dict(zip(share, band(list(share.values()), 2 * self.lambda_), strict=True))

    def _official(self, share: Mapping[int, float], target: float) -> dict[int, float]:
        # numpy's own mean, and its order of operations, so that not even the last bit differs.
        D = torch.tensor(list(share.values()), dtype=torch.float64).numpy()
        if D.max() - D.min() < torch.finfo(torch.float64).tiny:  # the authors' code divides by zero here
            return dict.fromkeys(share, target)
        ratio = (D - D.min()) * (1 / (D.max() - D.min()) * self.lambda_ * 2)
        ratio = ratio - ratio.mean() + (1 - target)
        sparsity = [float(1 - value) for value in ratio]
        return {block: 0.01 if s <= 0 else min(s, 1.0) for block, s in zip(share, sparsity, strict=True)}


def measure_outliers(linears: Linears, Ms: Iterable[float], official: bool = False) -> dict[str, Any]:
    """Outlier share of one block for several M, in %, and the mean and maximum of its scores.

    Scores are reported a token (divided by √tokens), so that they do not grow with the calibration set; the
    shares do not depend on that constant.
    """
    Ms = tuple(Ms)
    # Weights are asked for one at a time, twice, so that a caller need not hold all of a block's in float32.
    norms: dict[str, Tensor] = {}
    parameters, tokens, total = 0, 1, 0.0
    for name, (W_OI, statistics) in linears.items():
        norms[name] = _norms(name, W_OI, statistics)
        parameters += W_OI.numel()
        tokens = max(tokens, statistics.tokens if statistics is not None else 1)
        total += float(column_sums(W_OI) @ norms[name])
    all_parameters = max(parameters, 1)  # a block that holds none has no outliers
    mean = total / all_parameters
    if official and parameters:
        every = [(W_OI.abs() * norms[name]).flatten() for name, (W_OI, _) in linears.items()]
        mean = float(torch.cat(every).mean())
    above, highest = [0] * len(Ms), 0.0
    for name, (W_OI, _) in linears.items():
        counts, top = count_above(W_OI, norms[name], [torch.tensor(mean) * M for M in Ms])
        if not math.isfinite(top):
            raise NumericalError(f"{name} {list(W_OI.shape)}: a weight or an input is NaN or infinite")
        highest = max(highest, top)
        above = [sum(pair) for pair in zip(above, counts, strict=True)]
    per_token = math.sqrt(max(tokens, 1))
    shares = [float(count) / all_parameters * 100 for count in above]
    return {
        "outlier_share": {_key(M): share for M, share in zip(Ms, shares, strict=True)},
        "mean_score": mean / per_token,
        "max_score": highest / per_token,
        "parameters": parameters,
    }


def _norms(name: str, W_OI: Tensor, statistics: Statistics | None) -> Tensor:
    if statistics is None:
        raise ValueError(f"{name} {list(W_OI.shape)}: OWL needs column norms, but no statistics were given")
    return statistics.squared_norms.float().sqrt()


def _part(name: str, granularity: Granularity) -> str:
    """What a linear is counted with: itself, or all of the module that holds it."""
    return name if granularity == "linear" else name.rpartition(".")[0]


def _key(M: float) -> str:
    return f"{M:g}"
