"""Slow, obvious twins of the solvers of whole blocks: the model without some blocks, built and run as a whole."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def without(model: Any, gone: set[int]) -> Any:
    """A copy whose list of blocks lacks some."""
    made = copy.deepcopy(model)
    made.model.layers = nn.ModuleList(b for i, b in enumerate(made.model.layers) if i not in gone)
    made.config.num_hidden_layers -= len(gone)
    return made


def divergence(model: Any, gone: set[int], ids: Tensor) -> float:
    """KL(dense ‖ without the blocks), a token."""
    p = model(ids, use_cache=False).logits.double().log_softmax(-1)
    q = without(model, gone)(ids, use_cache=False).logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def nearest(model: Any, count: int, ids: Tensor) -> list[int]:
    """The blocks that leave one after another, each time the one without which the model is nearest to the dense one."""
    gone: list[int] = []
    with torch.no_grad():
        while len(gone) < count:
            left = [i for i in range(model.config.num_hidden_layers) if i not in gone]
            gone.append(min(left, key=lambda i: divergence(model, {*gone, i}, ids)))
    return gone


def influences(model: Any, ids: Tensor) -> list[float]:
    """1 − mean cosine of what enters each block and what leaves it."""
    with torch.no_grad():
        states: list[Tensor] = []
        for block in model.model.layers:
            block.register_forward_hook(lambda module, args, made: states.extend((args[0], made)))
        model(ids, use_cache=False)
    pairs = zip(states[::2], states[1::2], strict=True)
    return [1 - float(nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
