"""What a solver of whole blocks is: how far a block that leaves takes the model from where it was.

A block that leaves passes on what it receives: it is an identity. Which of them leave is decided one after another in
pruning/blocks.py; a solver only compares two tensors, with and without a block.

Shapes: T = tokens, X = hidden or vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

from torch import Tensor

from tawny.calibration.statistics import Needs
from tawny.solvers.base import Work

__all__ = ["BlockSolver"]


class BlockSolver(Protocol):
    """The interface; a new solver is one file and one entry of BLOCK_SOLVERS.

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

    def work(self, out: int, width: int) -> Work:
        """Zeros cost nothing."""
        return Work(tall=0.0, square=0.0)

    def rounding(self, out: int, width: int) -> Work:
        """No survivor is rounded."""
        return Work(tall=0.0, square=0.0)

    def workspace(self, out: int, width: int) -> int:
        """Bytes to remove a linear, beside its stored copy."""
        return 8 * out * width

    def apart(self, with_TX: Tensor, without_TX: Tensor) -> Tensor:
        """[T] float32: how much each token loses where the block leaves."""
        ...
