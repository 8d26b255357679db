"""Masks chosen the obvious way: sort everything, walk the list, stop at the count."""

from __future__ import annotations

import torch
from torch import Tensor


def remove_lowest(scores: list[float], count: int) -> list[bool]:
    """True = kept. Equal scores go in the order in which they stand."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    gone = set(order[:count])
    return [i not in gone for i in range(len(scores))]


def keep_rows(scores_OI: Tensor, counts: list[int]) -> Tensor:
    rows = zip(scores_OI.tolist(), counts, strict=True)
    return torch.tensor([remove_lowest(row, count) for row, count in rows]).reshape(scores_OI.shape)


def keep_matrix(scores_OI: Tensor, removed: int) -> Tensor:
    return torch.tensor(remove_lowest(scores_OI.flatten().tolist(), removed)).reshape(scores_OI.shape)


def keep_nm(scores_OI: Tensor, n: int, m: int) -> Tensor:
    groups = [remove_lowest(group, m - n) for group in scores_OI.reshape(-1, m).tolist()]
    return torch.tensor(groups).reshape(scores_OI.shape)
