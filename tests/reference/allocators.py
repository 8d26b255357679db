"""Slow twins of the allocators: each from its paper's formula, without rounding to whole weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tawny.allocation import LinearInfo, Profile


def model(
    blocks: int = 3,
    widths: Sequence[tuple[int, int]] = ((8, 8), (16, 8), (8, 16)),
    measures: Sequence[dict] = (),
) -> Profile:
    """A model of equal blocks whose linears are called `block.linear`."""
    linears = tuple(
        LinearInfo(f"{block}.{i}", shape, block, str(i))
        for block in range(blocks)
        for i, shape in enumerate(widths)
    )
    return Profile(linears, tuple(measures))


def mean_sparsity(allocation: Mapping[str, float], profile: Profile) -> float:
    sizes = profile.sizes
    return sum(allocation[name] * sizes[name] for name in sizes) / sum(sizes.values())


def removed_in_all(allocation: Mapping[str, float], profile: Profile) -> int:
    return sum(round(allocation[name] * size) for name, size in profile.sizes.items())


def er(profile: Profile, target: float) -> dict[str, float]:
    """Find the factor by bisection instead of fixing the dense ones one after the other."""
    sizes = np.array(list(profile.sizes.values()), dtype=float)
    shares = np.array([sum(linear.shape) / linear.numel for linear in profile.linears])
    low, high = 0.0, 1e9
    for _ in range(500):
        factor = (low + high) / 2
        kept = (np.minimum(1, factor * shares) * sizes).sum()
        low, high = (factor, high) if kept < (1 - target) * sizes.sum() else (low, factor)
    return dict(zip(profile.sizes, 1 - np.minimum(1, high * shares), strict=True))


def one_threshold(scores: Mapping[str, np.ndarray], target: float) -> dict[str, float]:
    """Sort all scores of the model in one list."""
    everything = np.sort(np.concatenate([values.ravel() for values in scores.values()]))
    threshold = everything[round(target * len(everything)) - 1]
    return {name: float((values <= threshold).mean()) for name, values in scores.items()}


def banded(importance: Sequence[float], weights: Sequence[float], width: float, target: float) -> list[float]:
    """Density `width·(I − min)/(max − min)`, shifted so that the weighted mean density is 1 − target; nothing clamps."""
    I = np.asarray(importance, dtype=float)
    density = width * (I - I.min()) / (I.max() - I.min())
    density += 1 - target - np.average(density, weights=weights)
    return list(1 - density)
