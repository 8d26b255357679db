"""The slow twin of `solvers/grid.py`: one value at a time, in float64, with the last group as narrow as it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nearest(value: float, levels: tuple[int, ...]) -> int:
    """Of two levels as near, the upper one."""
    return min(reversed(levels), key=lambda level: abs(level - value))


def held(scale: float, bits: int = 5) -> float:
    """So many significant bits, ties to the even one."""
    fraction, exponent = math.frexp(scale)
    return math.ldexp(round(fraction * 2**bits), exponent - bits)


def group_scale(values: list[float], weights: list[float], levels: tuple[int, ...], bits: int = 5) -> float:
    """The best of the rounded least-squares scales that sixteen first guesses lead to."""
    counted = [(x, w) for x, w in zip(values, weights, strict=True) if w > 0]
    if not any(x for x, _ in counted):
        return 0.0
    largest = max((x for x, _ in counted), key=abs)
    best, smallest = 0.0, sum(w * x * x for x, w in counted)
    for end in {levels[-1], levels[0]} if levels[0] != -levels[-1] else {levels[-1]}:
        for i in range(8):
            first = largest * (0.55 + 0.5 * i / 7) / end if end else 0.0
            chosen = [nearest(x / first, levels) for x, _ in counted] if first else [0]
            square = sum(w * q * q for (_, w), q in zip(counted, chosen, strict=False))
            if square > 0:
                scale = held(sum(w * x * q for (x, w), q in zip(counted, chosen, strict=True)) / square, bits)
                lost = sum(w * (x - scale * q) ** 2 for (x, w), q in zip(counted, chosen, strict=True))
                if lost < smallest:
                    best, smallest = scale, lost
    return best


def scales(W: Tensor, weights: Tensor, levels: tuple[int, ...], group: int, bits: int = 5) -> Tensor:
    """[O, S]; `weights` [O, I] are what errors count, 0 where a weight is removed."""
    width = W.shape[1]
    return torch.tensor(
        [
            [
                group_scale(w[a : a + group].tolist(), v[a : a + group].tolist(), levels, bits)
                for a in range(0, width, group)
            ]
            for w, v in zip(W.double(), weights.double(), strict=True)
        ]
    )


def rounded(W: Tensor, scales_OS: Tensor, keep: Tensor, levels: tuple[int, ...], group: int) -> Tensor:
    made = torch.zeros_like(W)
    for row in range(W.shape[0]):
        for column in range(W.shape[1]):
            scale = float(scales_OS[row, column // group])
            if keep[row, column] and scale:
                made[row, column] = scale * nearest(float(W[row, column]) / scale, levels)
    return made
