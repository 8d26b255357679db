"""What calibration yields for one linear: column norms or a Hessian, added up chunk by chunk.

Written `X` for the inputs of a linear, `[tokens, in]`: `squared_norms = Σ_t x_tj²` is what Wanda's score needs
(2306.11695, eq. 1), `sums = Σ_t x_tj` gives FLAP the means and fluctuations of inputs (2312.11983), and `hessian = XᵀX` what the layerwise least-squares solvers need (2301.00774, section 3).

Norms are added up in float64, where sums of float32 numbers hardly ever round: so it does not matter in which order
chunks come, or on how many processes. It would matter: a weight that rounding moves across Wanda's threshold changes
the inputs of every later block, and after ten blocks one weight in a hundred is another one. So are Hessians of up to
`EXACT_WIDTH` inputs; wider ones stay in float32, where twice the memory would not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tawny.calibration.gram import add_squares, mirrored
from tawny.calibration.output import OutputFactor

Needs = Literal["none", "norms", "moments", "hessian"]
_RISING: tuple[Needs, ...] = ("none", "norms", "moments", "hessian")


def most(wanted: Iterable[Needs]) -> Needs:
    """What serves all of them: each kind of statistics holds the ones before it."""
    return max(wanted, key=_RISING.index, default="none")


EXACT_WIDTH = 8192


@dataclass
class Statistics:
    """Of the inputs of ONE linear.

    Attributes:
        tokens: how many tokens were seen.
        squared_norms: `[in]` float64, `Σ_t x_tj²`.
        sums: `[in]` float64, `Σ_t x_tj`, or None when only norms were asked for.
        hessian: `[in, in]` float32, `XᵀX`, or None when less was asked for. Until `round` is called on what
            `Accumulator.finish(exact=True)` made, float64 where it was added up in that.
        output: what the model's output feels at this linear's outputs, where an allocator asks for it.
    """

    tokens: int
    squared_norms: Tensor
    hessian: Tensor | None = None
    sums: Tensor | None = None
    output: OutputFactor | None = None

    def round(self) -> Statistics:
        """Itself, with the Hessian rounded to float32."""
        if self.hessian is not None:
            self.hessian = self.hessian.float()
            self.squared_norms = self.hessian.diagonal().double()
        return self


def hessian_bytes(width: int) -> int:
    """Memory of one Hessian while it is added up."""
    return (8 if width <= EXACT_WIDTH else 4) * width * width


class Accumulator:
    """Adds up the statistics of one input over many chunks of tokens."""

    def __init__(self, width: int, needs: Needs, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self._norms_I = torch.zeros(width, device=device, dtype=torch.float64)
        moments = needs in ("moments", "hessian")
        self._sums_I = torch.zeros(width, device=device, dtype=torch.float64) if moments else None
        exact = torch.float64 if width <= EXACT_WIDTH else torch.float32
        self._hessian_II = (
            torch.zeros(width, width, device=device, dtype=exact) if needs == "hessian" else None
        )

    def add(self, x_TI: Tensor) -> None:
        """Tokens `[tokens, in]` of any float dtype; squares and products of a chunk are taken and summed in float32."""
        x = x_TI.to(torch.float32)
        self.tokens += x.shape[0]
        if self._sums_I is not None:
            self._sums_I += x.sum(0)
        if self._hessian_II is None:
            self._norms_I += x.square().sum(0)
            return
        add_squares(self._hessian_II, x, x_TI.dtype == torch.bfloat16)

    def finish(self, exact: bool = False) -> Statistics:
        """What was seen; nothing can be added any more.

        Args:
            exact: leave a Hessian in the dtype it was added up in, because others are added to it before `round`.
        """
        if self._hessian_II is None:
            return Statistics(self.tokens, self._norms_I, sums=self._sums_I)
        H_II = self._hessian_II
        self._hessian_II = None
        if not exact:
            H_II = H_II.float()
        mirrored(H_II)
        return Statistics(self.tokens, H_II.diagonal().double(), H_II, self._sums_I)
