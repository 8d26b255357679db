"""Slow, obvious twins of the solvers of whole members: loops, float64, and a least-squares problem for each candidate."""

from __future__ import annotations

import torch
from torch import Tensor


def lowest(scores: list[float], removed: int) -> list[bool]:
    """Which members stay when the lowest scores leave, the first of equal ones before the others."""
    order = sorted(range(len(scores)), key=lambda g: scores[g])
    return [g not in order[:removed] for g in range(len(scores))]


def summed(
    weight: Tensor, columns: Tensor, rows: list[tuple[Tensor, Tensor, Tensor]], norms: Tensor
) -> list[float]:
    """Scores |W|·norm of all weights of each member; `rows` are (weight, index, norms) of producers."""
    scores = []
    for g in range(len(columns)):
        total = sum(
            abs(float(weight[o, j])) * float(norms[j]) for o in range(len(weight)) for j in columns[g]
        )
        for W, index, norm in rows:
            total += sum(abs(float(W[r, i])) * float(norm[i]) for r in index[g] for i in range(W.shape[1]))
        scores.append(total)
    return scores


def fluctuation(weight: Tensor, columns: Tensor, X: Tensor) -> list[float]:
    """FLAP's score from the inputs themselves."""
    variance = X.double().var(0, unbiased=False)
    return [
        float(sum(variance[j] * weight[:, j].double().square().sum() for j in members)) for members in columns
    ]


def least_squares(weight: Tensor, H: Tensor, kept: Tensor) -> tuple[Tensor, float]:
    """The best weight that reads only `kept` inputs, and its squared output error."""
    W, made = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    made[:, kept] = torch.linalg.solve(H[kept][:, kept], (W @ H)[:, kept].T).T
    gone = W - made
    return made, float((gone @ H @ gone.T).trace())


def greedy(weight: Tensor, H: Tensor, columns: Tensor, removed: int) -> tuple[list[bool], Tensor]:
    """Members leave one after another, each time the one without which the best weight is least wrong."""
    stays = list(range(len(columns)))
    made = weight.double()
    for _ in range(removed):
        tried = []
        for g in stays:
            kept = columns[[other for other in stays if other != g]].flatten().sort().values
            tried.append((least_squares(weight, H, kept)[1], g, kept))
        _, gone, kept = min(tried, key=lambda item: item[0])
        stays.remove(gone)
        made, _ = least_squares(weight, H, kept)
    return [g in stays for g in range(len(columns))], made
