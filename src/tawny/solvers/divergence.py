"""Measured divergence: the block leaves without which the model stays nearest to the dense one; and so on.

Each candidate is left out in earnest, and the next-token distributions are compared by KL(dense ‖ without it). Damage of several
blocks does not add up, so after each one that left those that came off best are measured anew. What one forward says of a
block (influence.py) knows neither what later blocks make of a change, nor that two neighbours can stand for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from tawny.errors import check_option
from tawny.solvers.blocks import BlockSolver

__all__ = ["Divergence"]


@dataclass(frozen=True)
class Divergence(BlockSolver):
    """Blocks leave one after another, each time the one without which the model stays nearest to the dense one.

    KL(dense ‖ without it), measured on `tokens` of the calibration; after each, the `again` best are measured anew.
    """

    tokens: int = 1024
    again: int = 8

    compares: ClassVar[Literal["block", "logits"]] = "logits"

    def __post_init__(self) -> None:
        check_option(
            1 <= self.tokens < 2**31, "solver.tokens", self.tokens, "a positive number, such as 1024"
        )
        check_option(
            1 <= self.again < 2**31, "solver.again", self.again, "a positive number of blocks, such as 8"
        )

    def apart(self, with_TX: Tensor, without_TX: Tensor) -> Tensor:
        p, q = with_TX.float().log_softmax(-1), without_TX.float().log_softmax(-1)
        kl_T: Tensor = torch.linalg.vecdot(p.exp(), p - q)
        return kl_T
