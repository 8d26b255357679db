"""Block influence: a block leaves that hardly turns the hidden states which pass through it.

Men et al., "ShortGPT: Layers in large language models are more redundant than you expect", 2024, 2403.03853. With the hidden
states X_i in front of block i, its influence is BI_i = 1 − E_t[X_iᵗ·X_{i+1}ᵗ / (‖X_iᵗ‖ ‖X_{i+1}ᵗ‖)] (eq. 1); the blocks of the lowest
leave together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tawny.solvers.base import BlockSolver


@dataclass(frozen=True)
class Influence(BlockSolver):
    """Blocks leave that hardly turn the hidden states.

    1 − mean cosine of a block's inputs and outputs, Men et al. 2024 (2403.03853).
    """

    tokens: Annotated[int, Field(ge=1, lt=2**31, description="a positive number, such as 8192")] = 8192

    compares: ClassVar[Literal["block", "logits"]] = "block"

    def apart(self, with_TX: Tensor, without_TX: Tensor) -> Tensor:
        return 1 - torch.nn.functional.cosine_similarity(with_TX.float(), without_TX.float(), dim=-1)
