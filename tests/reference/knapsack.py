"""Every choice of levels there is."""

from __future__ import annotations

import itertools
import math


def best_choice(costs, sizes, budget):
    """The least cost that fits, or None."""
    fits = [
        math.fsum(costs[i][level] for i, level in enumerate(levels))
        for levels in itertools.product(*(range(len(item)) for item in costs))
        if sum(sizes[i][level] for i, level in enumerate(levels)) <= budget
    ]
    return min(fits, default=None)
