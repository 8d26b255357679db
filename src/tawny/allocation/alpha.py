"""AlphaPruning (Lu 2024, NeurIPS, 2410.10912): heavy-tailed spectra are well trained and keep more. No data needed.

Per linear, the eigenvalues `λ_1 ≤ … ≤ λ_n` of `WᵀW` are fitted by a power law `p(λ) ∝ λ^−α` above some
`λ_min`, with Hill's estimate `α = 1 + k/Σ_{i>n−k} ln(λ_i/λ_{n−k})`. Where the tail begins:

- `fit="mid"`: at the median, `k = n/2`.
- `fit="peak"` (the published results): at the eigenvalue around the peak of the histogram of `log₁₀ λ` (100
  bins), from 0.95 to 1.5 times its edge, with the smallest Kolmogorov–Smirnov distance between tail and power
  law. The released code compares the lower end with a logarithm by mistake and so admits almost everything
  below: `compat="official"`.

α is averaged over the linears of a block and mapped to `[1−ε, 1+ε]·S`: the larger α, the lighter the
tail, the more goes. The ratios are then rescaled to the budget as there; what would exceed 1 is made up by
the others.

Eigenvalues come from `eigvalsh` of the smaller Gram matrix in float64: far cheaper than singular values, and
the squaring costs nothing there (relative error 1e-16·λ_max, the noise below it is dropped as zero). A
spectrum without a tail (all eigenvalues equal, a zero matrix) has α = ∞, recorded as 100.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, LinearInfo, Linears, Profile
from tawny.errors import NumericalError

Fit = Literal["mid", "peak"]
NO_TAIL = 100.0


def spectrum(W_OI: Tensor) -> Tensor:
    """Ascending positive eigenvalues of `WᵀW` (float64): the squared singular values, without rounding's zeros."""
    W = W_OI.to(torch.float64)
    small = W if W.shape[0] <= W.shape[1] else W.T
    eigenvalues: Tensor = torch.linalg.eigvalsh(small @ small.T)
    floor = float(eigenvalues[-1]) * eigenvalues.numel() * torch.finfo(torch.float64).eps
    return eigenvalues[eigenvalues > max(floor, 0.0)]


def hill_alpha(eigenvalues: Tensor, fit: Fit = "peak", official: bool = False) -> float:
    """The exponent of the power law above the start that `fit` chooses."""
    n = eigenvalues.numel()
    if n < 2:
        return NO_TAIL
    logs = eigenvalues.log()
    # Σ_{i≥s} ln(λ_i/λ_s) for every start s at once; with k = n − s values in the tail
    tails = logs.flip(0).cumsum(0).flip(0)
    sizes = torch.arange(n, 0, -1, dtype=logs.dtype, device=logs.device)
    sums = tails - sizes * logs
    alphas = torch.where(sums > 1e-9 * sizes, 1 + sizes / sums, NO_TAIL).clamp(max=NO_TAIL)
    if fit == "mid":
        return float(alphas[n // 2])
    best, best_distance = NO_TAIL, math.inf
    for start in _starts_around_peak(eigenvalues, official):
        power_law = 1 - (eigenvalues[start:] / eigenvalues[start]) ** (1 - alphas[start])
        empirical = torch.arange(n - start, dtype=logs.dtype, device=logs.device) / (n - start)
        distance = float((power_law - empirical).abs().max())
        if distance < best_distance:
            best, best_distance = float(alphas[start]), distance
    return best


def _starts_around_peak(eigenvalues: Tensor, official: bool) -> list[int]:
    logs = eigenvalues.log10()
    low, high, bins = float(logs[0]), float(logs[-1]), 100
    if high <= low:
        return [0]
    counts = torch.histc(logs.cpu(), bins, min=low, max=high)
    peak: float = 10 ** (low + (high - low) * int(counts.argmax()) / bins)
    least = math.log10(0.95 * peak) if official else 0.95 * peak
    inside = (eigenvalues[:-1] >= least) & (eigenvalues[:-1] <= 1.5 * peak)
    starts: list[int] = inside.nonzero().flatten().tolist()
    return starts or [min(int(torch.searchsorted(logs, math.log10(peak))), eigenvalues.numel() - 2)]


@dataclass(frozen=True)
class Alpha(Allocator):
    """Linears with heavy-tailed spectra keep more: sparsity from (1−epsilon)·S to (1+epsilon)·S. Data-free.

    Lu 2024 (2410.10912): sparsity rises with the exponent of the power law fitted to the squared singular values,
    averaged over a block (or per linear).

    Raises:
        NumericalError: a weight is not finite.
    """

    fit: Fit = "peak"
    epsilon: Annotated[float, Field(ge=0, le=1, description="the half width of a band, in [0, 1]")] = 0.3
    granularity: Literal["block", "linear"] = "block"
    compat: Literal["official"] | None = None
    measures_weights: ClassVar[bool] = True

    def work(self, linears: Sequence[LinearInfo]) -> float:
        """Float32 operations that take as long as the spectra of these: `WWᵀ` in float64 and its eigenvalues."""
        shapes = [sorted(linear.shape) for linear in linears]
        return float(sum(4 * short**2 * long + 8 * short**3 for short, long in shapes))

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """A weight in float64, its smaller Gram matrix and the solver of its eigenvalues; measured."""
        return max((8 * out * width + 37 * min(out, width) ** 2 for out, width in shapes), default=0)

    def measure(self, linears: Linears) -> dict[str, Any]:
        alphas = {}
        for name, (W_OI, _) in linears.items():
            if not bool(torch.isfinite(W_OI).all()):
                raise NumericalError(f"{name} {tuple(W_OI.shape)} has weights that are not finite")
            alphas[name] = hill_alpha(spectrum(W_OI), self.fit, self.compat == "official")
        return {"alpha": alphas}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        sizes = profile.sizes
        alphas: dict[str, float] = {}
        # A linear of zeros has no exponent. One of 100 would leave a sliver of the band to all that have some.
        most = max((a for m in profile.measures for a in m["alpha"].values() if a < NO_TAIL), default=NO_TAIL)
        for block, measured in enumerate(profile.measures):
            of_block = {
                info.name: min(most, float(measured["alpha"][info.name]))
                for info in profile.linears_of(block)
            }
            if self.granularity == "block" and of_block:
                of_block = dict.fromkeys(of_block, sum(of_block.values()) / len(of_block))
            alphas |= of_block
        low, high = min(alphas.values()), max(alphas.values())
        span = high - low
        if span <= 1e-12 * high:
            return exact(dict.fromkeys(sizes, target), sizes, target)
        ratios = {
            name: 1 - self.epsilon + 2 * self.epsilon * (value - low) / span for name, value in alphas.items()
        }
        weighted = sum(ratios[name] * size for name, size in sizes.items())
        scale = target * sum(sizes.values()) / weighted if weighted else 0.0
        return exact({name: scale * ratio for name, ratio in ratios.items()}, sizes, target)
