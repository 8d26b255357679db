"""Slow and obvious: mixtures without some experts, by minus infinity before the highest are picked, and their scores by loops."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from unittest import mock

import torch
from torch import nn


def _gate(model, block):
    mlp = next(m for m in model.model.layers[block].children() if hasattr(m, "experts"))
    return mlp, mlp.gate if hasattr(mlp, "gate") else mlp.router


@torch.no_grad()
def logits_without(model, gone, ids):
    """Logits of a whole transformers model whose routers give these experts, by block, no chance."""
    linear = nn.functional.linear
    numbers = {id(_gate(model, block)[1].weight): (block, _gate(model, block)[1]) for block in gone}

    def masked(x, W, bias=None):
        product = linear(x, W, bias)
        found = [
            b for b, gate in numbers.values() if W.shape == gate.weight.shape and torch.equal(W, gate.weight)
        ]
        if found:
            product[..., gone[found[0]]] = -torch.inf
        return product

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(nn.functional, "linear", masked))
        for block in gone:
            bias = getattr(_gate(model, block)[1], "e_score_correction_bias", None)
            if bias is not None:
                before = bias.clone()
                bias[gone[block]] = -torch.inf
                stack.callback(bias.copy_, before)
        return model(ids).logits


@torch.no_grad()
def scores_by_hand(model, block, ids, solver):
    """REAP's score of every expert of a block, or how often it is chosen, token by token."""
    mlp, gate = _gate(model, block)
    entering = []
    hook = mlp.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    model(ids)
    hook.remove()
    tokens = entering[0].reshape(-1, entering[0].shape[-1])
    _, gates, picked = gate(tokens)
    added = [[] for _ in range(len(gate.weight))]
    for row, place in itertools.product(range(len(tokens)), range(picked.shape[1])):
        expert = int(picked[row, place])
        one = torch.tensor([[expert]])
        output = mlp.experts(tokens[row : row + 1], one, gates.new_ones(1, 1))
        added[expert].append(float(gates[row, place] * output.norm()))
    if solver == "frequency":
        return torch.tensor([float(len(values)) for values in added])
    return torch.tensor([sum(values) / max(1, len(values)) for values in added])


def left_one_by_one(x, felt, route, removed, groups):
    """Greedy removal with every choice tried on all tokens anew: when each expert left, and what was felt after each."""
    count = felt.shape[1]
    size, gone, losses = count // groups, [], []

    def output(missing):
        picked, gates = route(x, torch.tensor(missing, dtype=torch.int64))
        return (felt.gather(1, picked) * gates.double()).sum(1)

    dense = output([])
    for _ in range(removed):
        tried = {}
        for expert in range(count):
            mates = [other for other in gone if other // size == expert // size]
            if expert not in gone and len(mates) < removed // groups:
                tried[expert] = 0.5 * float((output([*gone, expert]) - dense).square().mean())
        best = min(tried, key=lambda expert: (tried[expert], expert))
        gone.append(best)
        losses.append(tried[best])
    return [float(gone.index(e)) if e in gone else float(removed) for e in range(count)], losses
