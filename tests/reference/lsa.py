"""The slow twin of `allocation/lsa.py`: every removal by trying each candidate and measuring the whole error."""

from __future__ import annotations

import torch
from torch import Tensor


def half_removal_error_by_trial(W_OI: Tensor, H_II: Tensor, group: int) -> float:
    H = H_II.double()
    total = 0.0
    for w in W_OI.double():
        gone = torch.zeros(len(w), dtype=torch.bool)

        def error(gone: Tensor, w: Tensor = w) -> float:
            lost = w * gone
            return float(lost @ H @ lost)

        for start in range(0, len(w), group):
            columns = range(start, min(start + group, len(w)))
            for _ in range(len(columns) // 2):
                trials = []
                for j in columns:
                    if not gone[j]:
                        trial = gone.clone()
                        trial[j] = True
                        trials.append((error(trial), j))
                gone[min(trials)[1]] = True
        total += error(gone)
    return total
