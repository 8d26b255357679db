"""OWL with Wanda as the paper's code computes it, restated the slow way: whole model, hooks by hand, one sample at a time.

Everything is float32 and in memory. Used as an oracle for the streamed engine with `compat="official"`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def _shown(model: Any, inputs: Any) -> None:
    """Run the model on one sample after another: tokens, or pixels by the name that its forward gives them."""
    if isinstance(inputs, torch.Tensor):
        for row in inputs:
            model(input_ids=row[None], use_cache=False)
        return
    ((name, rows),) = inputs.items()
    for row in rows:
        model(**{name: row[None]})


def _squared_norms(model: Any, block: nn.Module, ids: Any) -> dict[str, torch.Tensor]:
    """Running mean over samples of each input column's squared norm, in the model's own whole forward."""
    sums: dict[str, torch.Tensor] = {}
    seen: dict[str, int] = {}

    def hook(name: str):
        def add(module, args, output):
            x = args[0].reshape(-1, args[0].shape[-1]).float()
            count = seen.get(name, 0)
            old = sums.get(name, torch.zeros(x.shape[1]))
            sums[name] = old * (count / (count + 1)) + torch.norm(x, p=2, dim=0) ** 2 / (count + 1)
            seen[name] = count + 1

        return add

    handles = [module.register_forward_hook(hook(name)) for name, module in linears(block).items()]
    with torch.no_grad():
        _shown(model, ids)
    for handle in handles:
        handle.remove()
    return sums


def outlier_shares(model: Any, blocks: Any, ids: Any, M: float) -> list[float]:
    shares = []
    for block in blocks:
        norms = _squared_norms(model, block, ids)
        scores = torch.cat(
            [(m.weight.data.abs() * norms[name].sqrt()).flatten() for name, m in linears(block).items()]
        )
        shares.append(float((scores > scores.mean() * M).sum()) / scores.numel() * 100)
    return shares


def owl_ratios(shares: list[float], lam: float, sparsity: float) -> list[float]:
    """Density spread to [0, 2λ], shifted so that the plain mean over blocks is 1 − sparsity; the ratio is what goes."""
    low, high = min(shares), max(shares)
    density = [(d - low) / (high - low) * lam * 2 for d in shares]
    shift = (1 - sparsity) - sum(density) / len(density)
    return [1 - (d + shift) for d in density]


def prune_wanda(model: Any, blocks: Any, ids: Any, ratios: list[float]) -> None:
    """In place: each block on the activations of the pruned prefix; int(in·ratio) a row, stable sort."""
    for block, ratio in zip(blocks, ratios, strict=True):
        norms = _squared_norms(model, block, ids)
        for name, module in linears(block).items():
            score = module.weight.data.abs() * norms[name].sqrt()[None]
            order = torch.sort(score, dim=-1, stable=True)[1]
            gone = order[:, : int(score.shape[1] * ratio)]
            module.weight.data.scatter_(1, gone, 0.0)
