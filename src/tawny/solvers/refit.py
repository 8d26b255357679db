"""Refit: given a mask, the best values of the weights that survive it.

    min over Ŵ supported on the mask of  ‖X(W − Ŵ)ᵀ‖² + λ‖W − Ŵ‖² = tr((W − Ŵ)(H + λI)(W − Ŵ)ᵀ),   λ = damp·mean(diag H)

Any mask can be refitted, whoever chose it (ALPS, Meng 2024, 2406.07831 ends with this step).
Every row is a least-squares problem of its own, with its own support, so an exact solution costs a Cholesky
factorisation per row. Conjugate gradients need only products with H, shared by all rows: here each row runs
its own CG (own step lengths, where the paper takes one for the matrix), preconditioned by diag(H), in chunks
of rows that bound the scratch memory.

Where the model's output feels errors by a whole factor G, the objective is tr(G(W − Ŵ)(H + λI)(W − Ŵ)ᵀ). That ties the rows of
a diagonal block of G together: it is one problem of its own, with one step length, and is solved for rows that are scaled to
a diagonal of ones (output.py).

Promises: what the mask removes is zero; a weight that was zero in W stays zero, so refitting never makes a
sparse weight denser; more steps never raise the objective beyond rounding; the arguments are not changed.

Shapes: O = out, I = in, R = rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tawny.precision import native_dtype
from tawny.solvers.base import energy, require_finite
from tawny.solvers.output import Damped

_CHUNK = 1 << 22  # weights whose six scratch copies live at once: 100 MB,
_ROWS = 1024  # or so many rows where products are bfloat16: each of these arranges the whole H again


def refit(
    W_OI: Tensor,
    mask_OI: Tensor,
    H_II: Tensor,
    *,
    steps: int = 10,
    start: Tensor | None = None,
    damp: float = 0.01,
    tolerance: float = 1e-6,
    rounded: bool = False,
    output: Damped | None = None,
) -> tuple[Tensor, float]:
    """The survivors of `mask_OI`, moved to where the pruned linear's output is nearest to the dense one's.

    Args:
        W_OI: the dense weight, float32.
        mask_OI: True where a weight survives.
        H_II: `XᵀX` of the linear's inputs, float32, undamped.
        steps: conjugate gradient steps; each costs one product of a weight with H. 10 get most of what there is.
        start: where to begin, such as the solver's own result; the masked W when left out.
        damp: λ as a share of the mean of diag(H); keeps few or collinear inputs from being fitted too literally.
        tolerance: a row stops when its preconditioned residual has shrunk to this share of the first.
        rounded: let the products be bfloat16 where the hardware is faster with it, but for that of the first residual. For
            few steps from a good start: what rounding does to the residual adds up, and bounds how far it can shrink.
        output: G; less than the whole changes nothing here, where no row can give to another.

    Returns:
        A new weight `[out, in]` float32, and ‖X(W − Ŵ)ᵀ‖², which the descent comes to know on its way.
    """
    require_finite(H_II, "input's Hessian")
    diagonal_I = H_II.diagonal().to(torch.float32)
    ridge = damp * float(diagonal_I.mean())
    damped_I = diagonal_I + ridge
    inverse_I = torch.where(damped_I > 0, 1 / damped_I, 0.0)
    curvature_II = H_II
    if rounded and H_II.device.type == "cpu":
        curvature_II = H_II.to(native_dtype())
    result_OI = torch.empty_like(W_OI, dtype=torch.float32)
    rows = max(_ROWS if curvature_II.dtype is torch.bfloat16 else 1, _CHUNK // max(W_OI.shape[1], 1))
    lost = 0.0
    if output is not None and output.whole:
        for part, G_RR in zip(output.places, output.blocks(), strict=True):
            W_RI, root_R1 = W_OI[part].to(torch.float32), output.root_O[part, None]
            free_RI = mask_OI[part] & (W_RI != 0)
            X_RI = torch.where(free_RI, W_RI if start is None else start[part].to(torch.float32), 0.0)
            X_RI *= root_R1
            scaled_RI = W_RI * root_R1
            _descend(X_RI, scaled_RI, free_RI, H_II, curvature_II, ridge, inverse_I, steps, tolerance, G_RR)
            result_OI[part] = X_RI.div_(root_R1)
            lost += energy(W_RI - X_RI, H_II)
        require_finite(result_OI, "refitted weight")
        return result_OI, lost
    for top in range(0, W_OI.shape[0], rows):
        part = slice(top, top + rows)
        W_RI = W_OI[part].to(torch.float32)
        free_RI = mask_OI[part] & (W_RI != 0)
        X_RI = torch.where(free_RI, W_RI if start is None else start[part].to(torch.float32), 0.0)
        lost += _descend(X_RI, W_RI, free_RI, H_II, curvature_II, ridge, inverse_I, steps, tolerance)
        result_OI[part] = X_RI
    require_finite(result_OI, "refitted weight")
    return result_OI, lost


def _descend(
    X_RI: Tensor,
    W_RI: Tensor,
    free_RI: Tensor,
    H_II: Tensor,
    curvature_II: Tensor,
    ridge: float,
    inverse_I: Tensor,
    steps: int,
    tolerance: float,
    G_RR: Tensor | None = None,
) -> float:
    """Conjugate gradients on all rows at once, `X_RI` updated in place; tr(G(W − X)H(W − X)ᵀ) at the end, without G if there is none.

    `curvature_II` is H, in the dtype that directions are multiplied in. G has a diagonal of ones.
    """
    free_RI = free_RI.to(W_RI.dtype)  # a product of floats is vectorised, one with a mask is not

    def times_H(D_RI: Tensor) -> Tensor:
        if curvature_II.dtype == D_RI.dtype:
            product_RI = torch.addmm(D_RI, D_RI, curvature_II, beta=ridge)
        else:
            product_RI = torch.add(D_RI.to(curvature_II.dtype) @ curvature_II, D_RI, alpha=ridge)
        if curved_RR is not None:
            product_RI = torch.mm(curved_RR, product_RI.to(curved_RR.dtype)).to(D_RI.dtype)
        return product_RI.mul_(free_RI)

    def dot(A_RI: Tensor, B_RI: Tensor) -> Tensor:
        dots_R1: Tensor = torch.linalg.vecdot(A_RI, B_RI)[:, None]
        return dots_R1 if G_RR is None else dots_R1.sum(0, keepdim=True)

    curved_RR = None if G_RR is None else G_RR.to(curvature_II.dtype)
    gone_RI = W_RI - X_RI
    residual_RI = torch.addmm(gone_RI, gone_RI, H_II, beta=ridge)
    if G_RR is not None:
        residual_RI = G_RR @ residual_RI
    objective_R = dot(gone_RI, residual_RI).double()
    del gone_RI
    residual_RI.mul_(free_RI)  # minus half the gradient, on the free entries
    step_RI = residual_RI * inverse_I
    size_R = dot(residual_RI, step_RI)
    enough_R = size_R * tolerance**2
    for _ in range(steps):
        if bool((size_R <= enough_R).all()):
            break
        curved_RI = times_H(step_RI)
        curvature_R = dot(step_RI, curved_RI)
        # A row that has arrived, or whose direction H cannot see, stands still while the others go on.
        length_R = torch.where((curvature_R > 0) & (size_R > enough_R), size_R / curvature_R, 0.0)
        X_RI.addcmul_(step_RI, length_R)
        objective_R -= length_R * size_R
        residual_RI.addcmul_(curved_RI, length_R, value=-1)
        scaled_RI = torch.mul(residual_RI, inverse_I, out=curved_RI)
        before_R, size_R = size_R, dot(residual_RI, scaled_RI)
        step_RI.mul_(torch.where(before_R > 0, size_R / before_R, 0.0)).add_(scaled_RI)
    gone_RI = torch.sub(W_RI, X_RI, out=residual_RI)
    return float((objective_R - ridge * dot(gone_RI, gone_RI)).sum())
