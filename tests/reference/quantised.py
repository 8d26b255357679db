"""Quantised weights as their formats are published, number by number: what the readers are held to where no library is at hand."""

from __future__ import annotations

import torch
from torch import Tensor

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that lies in bits 0, 4, 8, … of a word
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def by_block(values: Tensor, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Every value times the scale of its block."""
    made = values.double()
    for i, row in enumerate(scale.tolist()):
        for j, number in enumerate(row):
            made[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] *= number
    return made.float()


def nearest_fp4(values: Tensor) -> Tensor:
    """The four bits (as numbers 0 … 15) of the nearest E2M1."""
    code = torch.tensor([*FP4, *(-value for value in FP4)])
    return (values.unsqueeze(-1) - code).abs().argmin(-1)


def fp4_value(bits: Tensor) -> Tensor:
    return torch.tensor([*FP4, *(-value for value in FP4)])[bits]


def low_first(bits: Tensor) -> Tensor:
    """Two numbers of four bits to a byte along the last axis, the first in the lower half."""
    return (bits[..., 0::2] + 16 * bits[..., 1::2]).to(torch.uint8)


def into_words(numbers: Tensor, bits: int) -> Tensor:
    """Rows of numbers as one stream of bits, lowest first, cut into words of 32 bits."""
    rows = []
    for row in numbers.tolist():
        stream = sum(number << bits * place for place, number in enumerate(row))
        count = -(-len(row) * bits // 32)
        words = [(stream >> 32 * place) & 0xFFFFFFFF for place in range(count)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


def gptq(q_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor, group_I: Tensor, bits: int) -> dict[str, Tensor]:
    """What AutoGPTQ stores for (q - zero) · scale, version 1: zeros less one."""
    less_one = (zeros_OG - 1) % 2**bits
    return {
        "qweight": into_words(q_OI, bits).T.contiguous(),
        "qzeros": into_words(less_one.T, bits),
        "scales": scales_OG.T.contiguous(),
        "g_idx": group_I.int(),
    }


def awq(q_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor) -> dict[str, Tensor]:
    """What AutoAWQ stores for its GEMM kernel: eight columns a word, in its own order."""

    def columns(numbers: Tensor) -> Tensor:
        return into_words(numbers.unflatten(1, (-1, 8))[..., AWQ_COLUMNS].flatten(1), 4)

    return {
        "qweight": columns(q_OI.T),
        "qzeros": columns(zeros_OG.T),
        "scales": scales_OG.T.contiguous(),
    }


def grouped(q_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor, group_I: Tensor) -> Tensor:
    """(q - zero) · scale, column by column."""
    columns = [
        (q_OI[:, j] - zeros_OG[:, group]).double() * scales_OG[:, group].double()
        for j, group in enumerate(group_I.tolist())
    ]
    return torch.stack(columns, 1).float()
