"""What a solver is: a pure function from a weight and its input's statistics to a pruned weight.

A solver is a frozen dataclass whose fields are its options. It never changes its arguments, gives the same
result for the same input, and raises NumericalError where a number is not finite (the caller adds the
linear's name).

Linears that share an input share its statistics: `prepare` does the part of the work that depends on nothing
else, once, and `solve` accepts the result for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from tawny.calibration.output import Factor, OutputFactor
from tawny.calibration.statistics import Needs, Statistics
from tawny.errors import NumericalError
from tawny.patterns import NM, Pattern, Scope, keep_mask, removed_count
from tawny.solvers.grid import Grid, kept_on_grid
from tawny.solvers.output import row_roots

Damp = Annotated[float, Field(ge=0, le=1e6, description="a number in [0, 1e6], such as 0.01")]
Columns = Annotated[
    int, Field(ge=1, lt=2**31, description="a positive number of columns below 2**31, such as 128")
]
Seen = Statistics | None  # what calibration saw of a linear's inputs, for the solvers that need it
_PANEL = 1024  # columns of H that an energy multiplies at once
_DAMP = 0.01  # share of the mean that every input counts: those that never fired need a scale, too
_PART = 1 << 18  # weights that fit a core's cache


@dataclass
class Solution:
    """A pruned weight: zero where `mask` is False."""

    weight: Tensor  # [out, in] float32
    mask: Tensor  # [out, in] bool, True = kept
    notes: dict[str, float | int | str] = field(default_factory=dict)
    lost: float | None = None  # ‖X(W − Ŵ)ᵀ‖², where the solver comes to know it on its way
    state: Tensor | None = None  # of its grid, where the weight lies on one


@dataclass(frozen=True)
class Work:
    """What a solve costs, for plans.

    Attributes:
        tall: products of the weight with a Hessian, `[out, in] · [in, in]`, in float32; or what takes as long.
        square: products of two Hessians, in float32; or what takes as long, such as factors and inverses.
        rounded, rounded_square: products that are bfloat16 where the hardware multiplies it.
        passes: of elementwise work over the weight.
    """

    tall: float
    square: float
    rounded: float = 0.0
    rounded_square: float = 0.0
    passes: float = 0.0


class Solver(Protocol):
    """The interface; a new solver is one file and one entry of SOLVERS. `work` and `workspace` here are guesses.

    Attributes:
        needs: what calibration has to yield.
        default_scope: over what the budget of an unstructured pattern is kept, as the solver's paper has it.
        stand_in: name of a quicker solver whose solutions are alike, where many are only compared; "" for none.
        output: the most that it can use of what the model's output feels of a linear's errors.
        default_output: what of it is used unless told.
    """

    needs: ClassVar[Needs]
    default_scope: ClassVar[Scope]
    stand_in: ClassVar[str] = ""
    output: ClassVar[Factor] = "none"
    default_output: ClassVar[Factor] = "none"

    def work(self, out: int, width: int, output: Factor = "none") -> Work:
        """What a solve of a weight `[out, width]` costs: a column loop, and the factor and inverse of the Hessian."""
        return Work(tall=3.0, square=3.0)

    def rounding(self, out: int, width: int, output: Factor = "none") -> Work:
        """What a grid adds to a solve: the search for scales, measured."""
        return Work(tall=0.0, square=0.0, passes=700.0)

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        """Bytes for a weight `[out, width]` beside its stored copy and its Hessian."""
        return 32 * out * width + (8 * width * width if self.needs == "hessian" else 0)

    def check_grid(self, pattern: Pattern, grid: Grid, width: int) -> None:
        """Raise a RecipeError where a weight of this width cannot have the pattern on the grid."""
        return

    def prepare(self, statistics: Seen) -> Any:
        """Work that linears with the same input share; None where there is none."""
        return None

    def solve(
        self,
        W_OI: Tensor,
        statistics: Seen,
        pattern: Pattern,
        sparsity: float,
        prepared: Any = None,
        grid: Grid | None = None,
        output: OutputFactor | None = None,
    ) -> Solution:
        """Prune one weight to `sparsity` (n:m: to what the pattern says), its survivors on `grid` where one is given.

        Args:
            W_OI: `[out, in]` float32.
            prepared: what `prepare` made of these statistics, if it was asked already.
            output: what the model's output feels of errors, as much of it as is to be used; None: all alike.

        Raises:
            NumericalError: a weight, what was seen of the inputs, or what the output feels, is not finite.
        """
        require_finite(W_OI, "weight")
        shared = self.prepare(statistics) if prepared is None else prepared
        solution = self.solved(W_OI, shared, pattern, sparsity, grid, output)
        return solution if grid is None or solution.state is not None else on_grid(solution, grid, statistics)

    def solved(
        self,
        W_OI: Tensor,
        shared: Any,
        pattern: Pattern,
        sparsity: float,
        grid: Grid | None,
        output: OutputFactor | None,
    ) -> Solution:
        """`solve` for a finite weight and what `prepare` made. A solver that knows no grid is rounded afterwards."""
        ...


class MaskSolver(Solver, Protocol):
    """A solver that chooses weights and leaves the others as they are; a new one needs `prepare` and `keep`."""

    output: ClassVar[Factor] = "rows"

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        return 20 * out * width  # measured, what judges the result included

    def solved(
        self,
        W_OI: Tensor,
        shared: Any,
        pattern: Pattern,
        sparsity: float,
        grid: Grid | None,
        output: OutputFactor | None,
    ) -> Solution:
        root_O = row_roots(output, pattern, self.default_scope)
        keep_OI = self.keep(W_OI, shared, pattern, sparsity, root_O)
        return Solution(masked(W_OI, keep_OI), keep_OI)

    def keep(
        self, W_OI: Tensor, shared: Any, pattern: Pattern, sparsity: float, root_O: Tensor | None
    ) -> Tensor:
        """[out, in] bool: the weights that stay, scores of rows weighed by `root_O` where it is given."""
        ...


class WholeSolver(Protocol):
    """What removes parts of a model as a whole: no weight is solved for, so neither work nor the output counts."""

    output: ClassVar[Factor] = "none"
    default_output: ClassVar[Factor] = "none"

    def work(self, out: int, width: int, output: Factor = "none") -> Work:
        """Zeros and cuts cost nothing."""
        return Work(tall=0.0, square=0.0)

    def rounding(self, out: int, width: int, output: Factor = "none") -> Work:
        """No survivor is rounded."""
        return Work(tall=0.0, square=0.0)


class BlockSolver(WholeSolver, Protocol):
    """What says how far a block that leaves takes the model from where it was; a new one is a file and an entry of BLOCK_SOLVERS.

    A block that leaves passes on what it receives. Which of them leave is decided one after another in pruning/blocks.py; a
    solver only compares two tensors `[T, X]`, with and without a block: T tokens, X hidden or vocabulary.

    Attributes:
        needs: nothing of the inputs of single linears.
        compares: outputs of the `block` with its inputs, or the dense model's `logits` with those it has without the block.
    """

    needs: ClassVar[Needs] = "none"
    compares: ClassVar[Literal["block", "logits"]]

    @property
    def tokens(self) -> int:
        """Of the calibration, how many are looked at."""
        ...

    @property
    def again(self) -> int:
        """How many blocks, those that came off best, are compared anew after each one that left; 0: all are taken by one look."""
        return 0

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        """Bytes to remove a linear, beside its stored copy."""
        return 8 * out * width

    def apart(self, with_TX: Tensor, without_TX: Tensor) -> Tensor:
        """[T] float32: how much each token loses where the block leaves."""
        ...


def require_finite(values: Tensor, what: str) -> None:
    """Raise NumericalError when `values` hold a NaN or an infinity."""
    # A finite sum proves every term finite and costs one read; only a suspicious one is looked at closely.
    if not torch.isfinite(values.sum()) and not torch.isfinite(values).all():
        bad = int((~torch.isfinite(values)).sum())
        raise NumericalError(f"{bad} of {values.numel()} numbers of the {what} are NaN or infinite")


def sizes(W_OI: Tensor, root_O: Tensor | None) -> Tensor:
    """|W|, each row weighed by its root, if there are any."""
    return W_OI.abs() if root_O is None else W_OI.abs().mul_(root_O[:, None])


def masked(W_OI: Tensor, keep_OI: Tensor) -> Tensor:
    """The weight where kept, else +0. A product is vectorised where a masked fill is not; +0 mends its −0."""
    return torch.mul(W_OI, keep_OI).add_(0.0)


def input_norms(statistics: Seen) -> Tensor:
    """[in]: ‖X_j‖₂ of every input, checked."""
    if statistics is None:
        raise ValueError("this solver needs column norms, but no statistics were given")
    require_finite(statistics.squared_norms, "input's squared norms")
    if (statistics.squared_norms < 0).any():
        raise NumericalError("a squared norm of the input is negative")
    return statistics.squared_norms.float().sqrt()


def input_hessian(statistics: Seen) -> Tensor:
    """[in, in]: XᵀX of the inputs, checked."""
    if statistics is None or statistics.hessian is None:
        raise ValueError("this solver needs a Hessian, but no statistics with one were given")
    require_finite(statistics.hessian, "input's Hessian")
    return statistics.hessian


def keep_highest(scores_OI: Tensor, pattern: Pattern, sparsity: float, scope: Scope) -> Tensor:
    """[out, in] bool: the mask that `sparsity` leaves of the scores, over `scope` where the pattern does not say."""
    if not isinstance(pattern, NM):
        pattern = pattern.with_default(scope)
    return keep_mask(scores_OI, pattern, removed_count(scores_OI.numel(), sparsity))


def energy(D_OI: Tensor, H_II: Tensor, dtype: torch.dtype = torch.float32) -> float:
    """tr(D H Dᵀ) = ‖X Dᵀ‖²: what the weight change D does to the linear's output.

    H is symmetric, so half the product is enough, a panel of columns at a time. With another dtype the terms off the
    diagonal of H are multiplied in it: right to about three digits where a D that the dtype holds exactly is not made
    to cancel under H. A weight is such a D, and what a solver leaves of the error is not.
    """
    width = D_OI.shape[1]
    step = _PANEL if width >= 2 * _PANEL else width
    factor_OI = D_OI.to(dtype)
    exact = dtype == H_II.dtype
    total = 0.0 if exact else float(D_OI.square().sum(0, dtype=torch.float64) @ H_II.diagonal().double())
    for start in range(0, width, step):
        stop = min(start + step, width)
        H_IJ = H_II[:stop, start:stop].to(dtype)
        if not exact:
            H_IJ[start:].fill_diagonal_(0.0)
        made_OJ = factor_OI[:, start:stop] @ H_IJ[start:]
        if start:
            made_OJ = torch.addmm(made_OJ, factor_OI[:, :start], H_IJ[:start], alpha=2)
        rows_O = torch.linalg.vecdot(made_OJ.to(D_OI.dtype), D_OI[:, start:stop])
        total += float(rows_O.sum(dtype=torch.float64))
    return total


def _holds(dtype: torch.dtype, W_OI: Tensor) -> bool:
    """Whether W comes back from another dtype as it was; a part at a time, so that it is looked at in cache."""
    return all(
        torch.equal(part.to(dtype).to(part.dtype), part)
        for part in torch.split(W_OI, max(1, _PART // max(1, W_OI.shape[1])))
    )


def reconstruction_error(
    W_OI: Tensor,
    pruned_OI: Tensor,
    H_II: Tensor,
    *,
    lost: float | None = None,
    whole: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> float:
    """tr((W − W')H(W − W')ᵀ) / tr(WHWᵀ): the share of the output's energy that pruning destroyed.

    Args:
        W_OI, pruned_OI: dense and pruned weight, float32.
        H_II: `XᵀX` of the linear's inputs, float32.
        lost, whole: the two traces, if they are known already.
        dtype: what products are taken in where that changes no more than the third digit (see `energy`).
    """
    if lost is None:
        lost = energy(W_OI - pruned_OI, H_II)
    if whole is None:
        whole = energy(W_OI, H_II, dtype if _holds(dtype, W_OI) else torch.float32)
    if whole <= 0:
        return 0.0 if lost <= 0 else float("inf")
    return max(lost, 0.0) / whole


def on_grid(solution: Solution, grid: Grid, statistics: Seen) -> Solution:
    """A solution rounded by the best scales; inputs count by their squared norms where they were seen."""
    W_OI, keep_OI = solution.weight, kept_on_grid(solution.weight, solution.mask, grid)
    weights_I = None
    if statistics is not None and bool(statistics.squared_norms.any()):
        norms_I = statistics.squared_norms.float()
        weights_I = norms_I + _DAMP * norms_I.mean()
    scales_OS = grid.fit(W_OI, weights_I, keep_OI)
    return Solution(grid.project(W_OI, scales_OS, keep_OI), keep_OI, solution.notes, None, scales_OS)
