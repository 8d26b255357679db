"""The slow twin of `allocation/alpha.py`: singular values, and Hill's estimate by a loop."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor


def eigenvalues(W_OI: Tensor) -> list[float]:
    return sorted(float(s) ** 2 for s in np.linalg.svd(W_OI.double().numpy(), compute_uv=False))


def hill(values: list[float], start: int) -> float:
    tail = values[start:]
    return 1 + len(tail) / sum(math.log(v / tail[0]) for v in tail)


def alpha_mid(values: list[float]) -> float:
    return hill(values, len(values) // 2)


def alpha_peak(values: list[float]) -> float:
    logs = [math.log10(v) for v in values]
    counts, edges = np.histogram(logs, bins=100)
    peak = 10 ** edges[int(counts.argmax())]
    best = (math.inf, math.nan)
    for start, value in enumerate(values[:-1]):
        if 0.95 * peak <= value <= 1.5 * peak:
            alpha, tail = hill(values, start), values[start:]
            model = [1 - (v / value) ** (1 - alpha) for v in tail]
            distance = max(abs(m - i / len(tail)) for i, m in enumerate(model))
            best = min(best, (distance, alpha))
    return best[1]
