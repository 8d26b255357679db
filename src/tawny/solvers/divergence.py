"""Measured divergence: the block leaves without which the model stays nearest to the dense one; and so on.

Each candidate is left out in earnest, and the next-token distributions are compared by KL(dense ‖ without it). Damage of several
blocks does not add up, so after each one that left those that came off best are measured anew. What one forward says of a
block (influence.py) knows neither what later blocks make of a change, nor that two neighbours can stand for each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tawny.solvers.base import BlockSolver


def kl(log_p_TV: Tensor, log_q_TV: Tensor) -> Tensor:
    """[T]: the Kullback–Leibler divergence Σ p·(log p − log q) of each token, in nats, from log-probabilities."""
    kl_T: Tensor = torch.linalg.vecdot(log_p_TV.exp(), log_p_TV - log_q_TV)
    return kl_T


@dataclass(frozen=True)
class Divergence(BlockSolver):
    """Blocks leave one after another, each time the one without which the model stays nearest to the dense one.

    KL(dense ‖ without it), measured on `tokens` of the calibration; after each, the `again` best are measured anew.
    """

    tokens: Annotated[int, Field(ge=1, lt=2**31, description="a positive number, such as 1024")] = 1024
    again: Annotated[int, Field(ge=1, lt=2**31, description="a positive number of blocks, such as 8")] = 8

    compares: ClassVar[Literal["block", "logits"]] = "logits"

    def apart(self, with_TX: Tensor, without_TX: Tensor) -> Tensor:
        return kl(with_TX.float().log_softmax(-1), without_TX.float().log_softmax(-1))
