"""The slow twin of `solvers/ria.py`: the score of one weight after the other."""

from __future__ import annotations

import math

from torch import Tensor


def ria_scores(W_OI: Tensor, squared_norms: Tensor, a: float = 0.5) -> list[list[float]]:
    W = [[abs(float(value)) for value in row] for row in W_OI]
    columns = [sum(row[j] for row in W) for j in range(len(W[0]))]
    return [
        [
            (value / columns[j] + value / sum(row)) * math.sqrt(float(squared_norms[j])) ** a
            if value
            else 0.0
            for j, value in enumerate(row)
        ]
        for row in W
    ]
