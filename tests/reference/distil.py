"""Masked distillation as one would write it down: all logits at once, autograd, a mask multiplied in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def whole_loss(student_logits: Tensor, teacher_logits: Tensor | None, ids: Tensor, kl: float) -> Tensor:
    """Mean over predicted tokens of (1 − κ)·CE + κ·KL(teacher ‖ student)."""
    logits = student_logits[:, :-1].float().flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
    if teacher_logits is None:
        return loss
    target = teacher_logits[:, :-1].float().flatten(0, 1).log_softmax(-1)
    divergence = nn.functional.kl_div(logits.log_softmax(-1), target, log_target=True, reduction="batchmean")
    return (1 - kl) * loss + kl * divergence


def train(model: nn.Module, batches: list[Tensor], rates: list[float], clip: float) -> None:
    """Dense AdamW on masked gradients, the mask multiplied in after each step; norms and linears of blocks only."""
    named = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() == 1 or (".layers." in name and name.endswith("weight"))
    }
    model.requires_grad_(False)
    for parameter in named.values():
        parameter.requires_grad_(True)
    masks = {name: (p != 0).float() if p.dim() > 1 else torch.ones_like(p) for name, p in named.items()}
    optimiser = torch.optim.AdamW(list(named.values()), betas=(0.9, 0.95), weight_decay=0.0)
    for ids, rate in zip(batches, rates, strict=True):
        for group in optimiser.param_groups:
            group["lr"] = rate
        whole_loss(model(input_ids=ids).logits, None, ids, 0.0).backward()
        for name, parameter in named.items():
            parameter.grad *= masks[name]
        nn.utils.clip_grad_norm_(list(named.values()), clip)
        optimiser.step()
        optimiser.zero_grad()
        with torch.no_grad():
            for name, parameter in named.items():
                parameter *= masks[name]
