"""A weight of few bits that is trained: the straight-through gradient of its levels, and the gradient of its scales.

    W = s · l(V / s),   s = e / L, rounded

V are weights in float32, l the nearest level of the kind's grid, L its largest level. A scale is rounded to as many bits as
it starts with. In place of a scale its e is trained, where the grid ends: that is as large as a weight, so one learning rate
fits both. As in LSQ (Esser et al. 2020, 1902.08153, eq. 3), with W's gradient g and r = V / s:

    ∂/∂V = g          beyond the grid's ends only where a step leads back
    ∂/∂e = Σ g (l(r) − r) / L        beyond the ends Σ g l(r) / L

What `value` gives is what packing, or an export, stores and `packed.format.scales_of` finds again, so it changes no bit.
Shapes: O out, I in, S = ceil(I / group) scales a row, C the columns of one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tawny.kinds import Kind
from tawny.packed.format import cheaper_whole, scales_of
from tawny.solvers.grid import ScaledGrid


class OnGrid:
    """The scales of one weight.

    Args:
        W_OI: where it starts: solved on the grid, or anything else, which is then rounded.
        group: columns that share a scale; None is the kind's usual number.
    """

    def __init__(self, W_OI: Tensor, kind: Kind, group: int | None) -> None:
        self.kind, self.group = kind, kind.columns(W_OI.shape[1], group)
        self.whole = whole(W_OI, kind)
        scales_OS = scales_of(W_OI, kind, self.group, self.whole)
        self.grid = ScaledGrid(kind.grid, self.group)
        if not torch.equal(self.grid.held(scales_OS), scales_OS):
            self.grid = ScaledGrid(kind.grid, self.group, long=True)
        self.ends_OS = nn.Parameter(scales_OS * kind.largest)

    @torch.no_grad()
    def value(self, V_OI: Tensor) -> Tensor:
        """The weight of V; a place where nothing is kept has no meaning in it."""
        scale_OS1 = self._scale()
        level_OSC = self.kind.round(self._cut(V_OI), scale_OS1)
        return self._joined(level_OSC.mul_(scale_OS1), V_OI)

    @torch.no_grad()
    def gradients(self, V_OI: Tensor, gradient_OI: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of V and of the ends from that of the weight, which is 0 where nothing is kept."""
        scale_OS1, g_OSC = self._scale(), self._cut(gradient_OI)
        ratio_OSC = (self._cut(V_OI) / scale_OS1).nan_to_num(0.0)
        inside_OSC = ratio_OSC.clamp(self.kind.grid[0], self.kind.grid[-1])
        beyond_OSC = ratio_OSC - inside_OSC
        slope_OSC = self.kind.round(self._cut(V_OI), scale_OS1).sub_(inside_OSC.mul_(beyond_OSC == 0))
        ends_OS = slope_OSC.mul_(g_OSC).sum(2) / self.kind.largest
        outward_OSC = beyond_OSC.mul_(scale_OS1).mul_(g_OSC) < 0
        return self._joined(g_OSC.masked_fill(outward_OSC, 0), V_OI), ends_OS

    def _scale(self) -> Tensor:
        return self.grid.held(self.ends_OS.detach() / self.kind.largest).unsqueeze(2)

    def _cut(self, W_OI: Tensor) -> Tensor:
        width = W_OI.shape[1]
        return nn.functional.pad(W_OI, (0, -width % self.group)).reshape(len(W_OI), -1, self.group)

    def _joined(self, W_OSC: Tensor, like_OI: Tensor) -> Tensor:
        return W_OSC.flatten(1)[:, : like_OI.shape[1]]


def whole(W_OI: Tensor, kind: Kind) -> bool:
    """Whether a weight is packed without a mask: then 0 is a level like the others, or there is none."""
    return cheaper_whole(int(torch.count_nonzero(W_OI)) / W_OI.numel(), kind)
