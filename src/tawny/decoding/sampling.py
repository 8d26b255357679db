"""Which token comes next: the likeliest, or one that is drawn from the likeliest.

The same settings and seed draw the same tokens from the same logits. Probabilities are taken in float64.
"""

from __future__ import annotations

__all__ = ["Sampler"]

import math

import torch
from torch import Tensor

from tawny.errors import NumericalError, RecipeError


class Sampler:
    """The choice of one sequence's tokens; arguments are those of `tawny.stream`.

    Raises:
        RecipeError: a number outside its range.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not (math.isfinite(temperature) and temperature >= 0):
            raise RecipeError(f"temperature {temperature} is not possible; give 0 or more")
        if not 0 < top_p <= 1:
            raise RecipeError(f"top_p {top_p} is not possible; give more than 0 and at most 1")
        self.temperature, self.top_p = temperature, top_p
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> int:
        """The token after these logits `[vocabulary]`.

        Raises:
            NumericalError: the logits hold NaN or infinity.
        """
        highest = float(logits.max())
        if not math.isfinite(highest):
            raise NumericalError(
                f"the model's logits hold {highest}; check its weights, or open it in another dtype"
            )
        if self.temperature == 0:
            return int(logits.argmax())
        # Below zero, so that a tiny temperature sends all but the likeliest to -infinity.
        below = logits.double().cpu() - highest
        shares = torch.softmax(below / self.temperature, -1)
        if self.top_p == 1:
            return int(torch.multinomial(shares, 1, generator=self.generator))
        sorted_, order = shares.sort(descending=True)
        # The token that crosses the sum still counts, so that at least one is left.
        sorted_[sorted_.cumsum(0) - sorted_ >= self.top_p] = 0
        return int(order[torch.multinomial(sorted_, 1, generator=self.generator)])
