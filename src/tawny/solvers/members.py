"""What a solver of whole members is: a pure function from one coupling and its inputs' statistics to who goes.

A coupling (model/couplings.py) is some rows of its producers and some columns of its consumer a member. A solver chooses the
members that leave, and gives the consumer its new weight; the rows of the producers then go for nothing. What left on average
may be given back through the consumer's bias.

Shapes: G = members, R = rows of a member in one producer, C = columns of a member in the consumer, O = out, I = in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tawny.calibration.output import Factor, OutputFactor
from tawny.calibration.statistics import Needs
from tawny.errors import NumericalError
from tawny.solvers.base import Seen, Work


@dataclass(frozen=True)
class Producer:
    """A linear whose rows `[G, R]` go with a member."""

    weight: Tensor  # [out, in] float32
    seen: Seen
    rows: Tensor  # [G, R] int64


@dataclass(frozen=True)
class Coupled:
    """One coupling as numbers."""

    weight: Tensor  # [out, in] float32, of the consumer
    seen: Seen  # of the consumer's inputs
    columns: Tensor  # [G, C] int64
    producers: Sequence[Producer]
    biased: bool = False  # whether the consumer has a bias
    output: OutputFactor | None = None  # what the model's output feels of errors of the consumer


@dataclass
class Chosen:
    """Which members stay, and what becomes of the consumer."""

    keep: Tensor  # [G] bool
    weight: Tensor  # [out, in] float32; zero in the columns of members that left
    shift: Tensor | None = None  # [out] float32, what to add to the consumer's bias, if there is one
    notes: dict[str, float | int | str] = field(default_factory=dict)


class MemberSolver(Protocol):
    """The interface; a new solver is one file and one entry of MEMBER_SOLVERS. `work` and `workspace` here are guesses.

    Attributes:
        needs: what calibration has to yield of the consumer's inputs.
        looks_at_rows: the same of the producers' inputs is needed, too.
        output: the most that it can use of what the model's output feels of the consumer's errors.
        default_output: what of it is used unless told.
    """

    needs: ClassVar[Needs]
    looks_at_rows: ClassVar[bool]
    output: ClassVar[Factor] = "none"
    default_output: ClassVar[Factor] = "none"

    @property
    def wants_bias(self) -> bool:
        """Whether a consumer without a bias is given one, where the model's configuration can say so."""
        return False

    def work(self, out: int, width: int, output: Factor = "none") -> Work:
        """What choosing for a consumer `[out, width]` costs: a factor and an inverse of the consumer's Hessian, and its new weight."""
        return Work(tall=2.0, square=3.0)

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        """Bytes for a consumer `[out, width]` beside its stored copy and its Hessian."""
        return 20 * out * width + (12 * width * width if self.needs == "hessian" else 0)

    def choose(self, coupled: Coupled, removed: int) -> Chosen:
        """Let `removed` of the members go, 0 ≤ removed < members."""
        ...


def column_sums_of(scores_OI: Tensor, columns_GC: Tensor) -> Tensor:
    """[G] float64: the scores of a consumer's weights, summed over each member's columns."""
    sums: Tensor = scores_OI.double().sum(0)[columns_GC].sum(1)
    return sums


def chosen(coupled: Coupled, scores_G: Tensor, removed: int) -> Chosen:
    """The members of the lowest scores leave, the first of equal ones; the consumer keeps its other weights as they are."""
    if not bool(torch.isfinite(scores_G).all()):
        raise NumericalError("the score of a member is NaN or infinite")
    keep_G = torch.ones(len(scores_G), dtype=torch.bool, device=scores_G.device)
    keep_G[scores_G.argsort(stable=True)[:removed]] = False
    gone_I = coupled.columns[~keep_G].flatten()
    return Chosen(keep_G, coupled.weight.index_fill(1, gone_I, 0.0))


def input_moments(seen: Seen) -> tuple[Tensor, Tensor]:
    """[in] mean and [in] variance of the inputs, float64."""
    if seen is None or seen.sums is None:
        raise ValueError("this solver needs the means of inputs, but no statistics with them were given")
    tokens = max(seen.tokens, 1)
    mean_I = seen.sums / tokens
    return mean_I, (seen.squared_norms / tokens - mean_I.square()).clamp_(min=0)
