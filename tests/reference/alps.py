"""The slow twin of `solvers/alps.py`: the paper's iteration as it is written, in float64, by dense solves.

Unstructured over the matrix only. B, D and V are kept apart, the inverse is never formed, selection is a sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.reference.grid import held, rounded, scales


def admm_mask(
    W_OI: Tensor,
    H_II: Tensor,
    removed: int,
    damp: float = 0.01,
    rho: float = 0.1,
    most: int = 300,
    G_OO: Tensor | None = None,
) -> Tensor:
    H = H_II.double()
    H = H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    scale = H.diagonal().sqrt()
    H = H / scale[:, None] / scale[None, :]
    W = (W_OI.double() * scale).T.contiguous()  # [in, out], as in the paper
    G = torch.eye(len(W_OI), dtype=torch.float64)
    if G_OO is not None:  # of its damping
        root = G_OO.double().diagonal().sqrt()
        G = G_OO.double() / root[:, None] / root
        W = W * root
    both = torch.kron(H, G) if G_OO is not None else H
    eye = torch.eye(len(both), dtype=torch.float64)

    def project(A: Tensor) -> Tensor:
        kept = A.abs().flatten().argsort(descending=True, stable=True)[: A.numel() - removed]
        D = torch.zeros_like(A).flatten()
        D[kept] = A.flatten()[kept]
        return D.view(A.shape)

    survivors = W.numel() - removed
    first = project(W)
    D, V, support, grown = first, torch.zeros_like(W), first != 0, False
    for iteration in range(1, most + 1):
        right = H @ W @ G - V + rho * D
        B = torch.linalg.solve(both + rho * eye, right.reshape(len(both), -1)).view_as(W)
        D = project(B + V / rho)
        V = V + rho * (B - D)
        if iteration % 3:
            continue
        moved = int(((D != 0) != support).sum()) / survivors
        support = D != 0
        if not grown and moved <= 0.005:
            if rho / 5 < 1e-4:
                break
            rho /= 5
            if moved:
                D, V, support = first, torch.zeros_like(W), first != 0
            continue
        if moved == 0 or (iteration >= 30 and moved < 3e-4):
            break
        grown = True
        rho *= 1.3 if moved > 0.1 else 1.2 if moved > 0.005 else 1.1
    return support.T


def admm_rounded(
    W_OI: Tensor,
    start: Tensor,
    keep: Tensor,
    H_II: Tensor,
    levels: tuple[int, ...],
    group: int,
    G_OO: Tensor | None = None,
) -> Tensor:
    """The iteration on a mask that stays, D being the nearest point of the grid; each row's best of the last iterates.

    With G, of its damping, the best of the last iterates by tr(G Δ H Δᵀ).
    """
    H = H_II.double()
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    scale = damped.diagonal().sqrt()
    normal = damped / scale[:, None] / scale
    weights, G = scale.square() * keep, torch.eye(len(W_OI), dtype=torch.float64)
    if G_OO is not None:
        root = G_OO.diagonal().sqrt()
        G, scale = G_OO / root[:, None] / root, scale * root[:, None]
    both = torch.kron(G, normal) if G_OO is not None else normal
    W = W_OI.double() * scale
    by = scales(start, weights, levels, group).double()
    D = rounded(start.double(), by, keep, levels, group) * scale
    V, rho = torch.zeros_like(W), 0.2
    best, lost = D / scale, torch.full((len(W),), torch.inf, dtype=torch.float64)
    for step in range(1, 37):
        right = (G @ W @ normal - V + rho * D).reshape(-1, len(both)).T
        B = torch.linalg.solve(both + rho * torch.eye(len(both)), right).T.reshape(W.shape)
        T = B + V / rho
        wide = by.repeat_interleave(group, 1)[:, : W.shape[1]]
        q = rounded(T / scale, by, keep, levels, group) / torch.where(wide == 0, 1.0, wide)
        for s in range(by.shape[1]):
            here = slice(s * group, (s + 1) * group)
            along, square = ((weights * q * x)[:, here].sum(1) for x in (T / scale, q))
            found = torch.where(square > 0, along / square, 0.0)
            by[:, s] = torch.tensor([held(scale) for scale in found.tolist()])
        D = q * by.repeat_interleave(group, 1)[:, : W.shape[1]] * scale
        V = rho * (T - D)
        if step in (24, 30, 36):
            gone = W_OI.double() - D / scale
            now = ((gone @ H) * gone).sum(1)
            if G_OO is not None:
                now = (G_OO @ gone @ H * gone).sum().expand(len(now))
            best, lost = torch.where((now < lost)[:, None], D / scale, best), torch.minimum(lost, now)
        if step % 6 == 0:
            rho *= 1.35
    return best
