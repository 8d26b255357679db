"""Whether the keys and values of all sequences fit into memory."""

from __future__ import annotations

__all__ = ["check_room"]

import contextlib
from typing import Any

import torch
from torch import Tensor

from tawny.decoding.cache import cache_in
from tawny.errors import UserError
from tawny.machine import free_memory
from tawny.words import size


def check_room(model: Any, capacity: int, count: int) -> int:
    """Bytes that `count` sequences of `capacity` tokens take.

    Raises:
        UserError: that is more than is free; the message says what would fit.
    """
    token, free = _bytes_of_a_token(model), free_memory()
    needed = token * capacity * count
    if free is not None and needed > free:
        shorter = free // (token * count)
        fewer = free // (token * capacity)
        ways = [f"--context {shorter}"] * (shorter > 0) + [f"--max-sequences {fewer}"] * (fewer > 0)
        raise UserError(
            f"keys and values of {count} sequences of {capacity} tokens need {size(needed)} and {size(free)} are free; "
            f"give {' or '.join(ways) or 'the machine more memory'}"
        )
    return needed


def _bytes_of_a_token(model: Any) -> int:
    """What one more token adds to the model's cache; 0 where it has none that grows."""

    def held(length: int) -> int:
        ids = torch.ones(1, length, dtype=torch.long, device=next(model.parameters()).device)
        cache = cache_in(model(input_ids=ids, use_cache=True))
        return sum(t.nbytes for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor))

    with (
        torch.inference_mode(),
        contextlib.suppress(Exception),
    ):  # a model that keeps none, or takes no such call
        return max(0, held(3) - held(2))
    return 0
