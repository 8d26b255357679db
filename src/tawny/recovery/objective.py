"""Next-token loss and exact KL to a teacher over the whole vocabulary, without ever holding all logits.

For a chunk of tokens the student's and the teacher's logits are made from hidden states, and the gradient of

    (1 − κ) · CE(student, next token) + κ · KL(teacher ‖ student)

with respect to the student's logits is written down in closed form, `p_S − κ·p_T − (1 − κ)·onehot`, and sent back to the
hidden states at once. Then the chunk's logits are gone. Nothing is run twice and memory does not depend on the batch.

Both probabilities are needed anyway; both losses follow from them and from the logits without another exponential, because
the largest probability of a token is `exp(max − log Σ exp)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# float32 logits of one chunk, and its fewest tokens: each chunk reads the head's weights three times, and with 47 tokens of a
# vocabulary of 262,144 its products run at two thirds of their speed (benchmarks/results/recovery_step.json).
_LOGIT_BYTES, _LEAST_TOKENS = 50_000_000, 256
# float32 logits whose elementwise work stays in a core's cache, and whose memory malloc hands out again and again instead of
# returning it to the system.
_CACHED_BYTES = 2_000_000

# (tokens [1, n], hidden [1, n, H]) → logits [1, n, V]
Tail = Callable[[Tensor, Tensor], Tensor]
# (a model's inputs by name, hidden [B, T, H]) → features [B, T, H]
Features = Callable[[Mapping[str, Tensor], Tensor], Tensor]


@dataclass
class Losses:
    """Sums over predicted tokens, in nats; `agree` counts equal first choices, when only measuring."""

    tokens: int = 0
    next_token: float = 0.0
    kl: float = 0.0
    agree: int = 0

    def add(self, other: Losses) -> None:
        self.tokens += other.tokens
        self.next_token += other.next_token
        self.kl += other.kl
        self.agree += other.agree


def chunk_tokens(vocabulary: int, wanted: int | None = None) -> int:
    return wanted or max(_LEAST_TOKENS, _LOGIT_BYTES // (4 * vocabulary))


def distil(
    student: Tail,
    teacher: Tail | None,
    ids_BT: Tensor,
    hidden_BTH: Tensor,
    teacher_BTH: Tensor | None,
    *,
    kl: float | Tensor,
    chunk: int,
    scale: float | None = None,
) -> tuple[Losses, Tensor | None]:
    """Losses of a batch, and their gradient with respect to the student's hidden states.

    Args:
        student, teacher: the model's norm and head. Gradients of the student's own parameters are accumulated.
        hidden_BTH, teacher_BTH: outputs of the last blocks.
        kl: κ, of all windows or of each `[B]`.
        chunk: tokens at once.
        scale: multiplies the gradient of the summed loss; None measures only.
    """
    width = hidden_BTH.shape[-1]
    inputs_1T = ids_BT[:, :-1].reshape(1, -1)
    targets_T = ids_BT[:, 1:].reshape(-1).to(hidden_BTH.device)
    hidden_1TH = hidden_BTH.detach()[:, :-1].reshape(1, -1, width)
    teacher_1TH = None if teacher_BTH is None else teacher_BTH[:, :-1].reshape(1, -1, teacher_BTH.shape[-1])
    gradient_1TH = None if scale is None else torch.empty_like(hidden_1TH)
    total = Losses(len(targets_T))
    kl_B = torch.as_tensor(kl, dtype=torch.float32, device=hidden_BTH.device).expand(len(ids_BT))
    kl_T1 = kl_B.repeat_interleave(ids_BT.shape[1] - 1)[:, None]
    for start in range(0, len(targets_T), chunk):
        part = slice(start, start + chunk)
        with torch.set_grad_enabled(scale is not None):
            leaf_1NH = hidden_1TH[:, part].clone().requires_grad_(scale is not None)
            logits_NV = student(inputs_1T[:, part], leaf_1NH)[0]
        with torch.no_grad():
            teacher_NV = None
            if teacher is not None and teacher_1TH is not None:
                teacher_NV = teacher(inputs_1T[:, part], teacher_1TH[:, part])[0]
            slope_NV = None
            if scale is not None:  # row by row it takes the place of the teacher's logits
                fits = teacher_NV is not None and teacher_NV.dtype == logits_NV.dtype
                slope_NV = teacher_NV if fits else torch.empty_like(logits_NV)
            rows = max(1, _CACHED_BYTES // (4 * logits_NV.shape[1]))
            for top in range(0, len(logits_NV), rows):
                some = slice(top, top + rows)
                total.add(
                    _chunk(
                        logits_NV.detach()[some],
                        None if teacher_NV is None else teacher_NV[some],
                        targets_T[part][some, None],
                        None if slope_NV is None else slope_NV[some],
                        kl_R1=kl_T1[part][some],
                        scale=scale,
                    )
                )
        if slope_NV is None or gradient_1TH is None:
            continue
        torch.autograd.backward([logits_NV], [slope_NV])
        if leaf_1NH.grad is not None:
            gradient_1TH[:, part] = leaf_1NH.grad
    if gradient_1TH is None:
        return total, None
    whole_BTH = torch.zeros_like(hidden_BTH)
    whole_BTH[:, :-1] = gradient_1TH.view(len(ids_BT), -1, width)
    return total, whole_BTH


def match(
    student: Features,
    teacher: Features,
    inputs: Mapping[str, Tensor],
    hidden_BTH: Tensor,
    teacher_BTH: Tensor,
    *,
    scale: float | None,
    mask_BT: Tensor | None = None,
) -> tuple[Losses, Tensor | None]:
    """For models that predict no token: how far the student's features f are from the teacher's g, and the gradient.

    The loss of a token, in the place of its next-token loss, is ‖f − g‖² / ‖g‖²: the share of its energy that is lost.

    Args:
        student, teacher: what follows the last block. Gradients of the student's own parameters are accumulated.
        scale: multiplies the gradient of the summed loss; None measures only.
        mask_BT: true for real tokens; None where nothing is padding.
    """
    with torch.no_grad():
        g_BTH = teacher(inputs, teacher_BTH).float()
    with torch.set_grad_enabled(scale is not None):
        leaf_BTH = hidden_BTH.detach().clone().requires_grad_(scale is not None)
        f_BTH = student(inputs, leaf_BTH).float()
        energy_BT = g_BTH.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        lost_BT = (f_BTH - g_BTH).square().sum(-1) / energy_BT
        real_BT = None if mask_BT is None else mask_BT.to(lost_BT.device, torch.bool)
        lost = (lost_BT if real_BT is None else lost_BT[real_BT]).sum()
    count = energy_BT.numel() if real_BT is None else int(real_BT.sum())
    losses = Losses(tokens=count, next_token=float(lost.detach()))
    if scale is None:
        return losses, None
    (lost * scale).backward()  # type: ignore[no-untyped-call]
    return losses, leaf_BTH.grad


def _chunk(
    logits_RV: Tensor,
    teacher_RV: Tensor | None,
    targets_R1: Tensor,
    slope_RV: Tensor | None,
    *,
    kl_R1: Tensor,
    scale: float | None,
) -> Losses:
    """Losses of some tokens, and their gradient with respect to the logits written into `slope_RV`."""
    losses = Losses()
    p_RV, log_sum_R = _probabilities(logits_RV)
    said_R1 = logits_RV.gather(1, targets_R1).float()
    losses.next_token = float((log_sum_R - said_R1.squeeze(1)).sum(dtype=torch.float64))
    p_teacher_RV = None
    if teacher_RV is not None:
        if scale is None:  # only measurements show it
            losses.agree = int((teacher_RV.argmax(-1) == logits_RV.argmax(-1)).sum())
        p_teacher_RV, log_sum_teacher_R = _probabilities(teacher_RV)
        # Σ p_T (log p_T − log p_S)
        apart = (teacher_RV.float() - logits_RV).mul_(p_teacher_RV).sum(-1)
        losses.kl = float((apart - log_sum_teacher_R + log_sum_R).sum(dtype=torch.float64))
    if slope_RV is None or scale is None:
        return losses
    said_weight_R1 = torch.ones_like(kl_R1)
    if p_teacher_RV is not None:
        p_RV.sub_(p_teacher_RV.mul_(kl_R1))
        said_weight_R1 = 1.0 - kl_R1
    p_RV.scatter_add_(1, targets_R1, -said_weight_R1)
    slope_RV.copy_(p_RV.mul_(scale))
    return losses


def _probabilities(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities `[tokens, vocabulary]` in float32, and log Σ exp of the logits `[tokens]`."""
    p_RV = torch.softmax(logits_RV, -1, dtype=torch.float32)
    return p_RV, logits_RV.amax(-1).float() - p_RV.amax(-1).log()
