"""Keys and values of one text in memory that is set aside beforehand, instead of copied whole for each token."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor


@functools.cache
def reserved_layer() -> type:
    """The class of a cache layer that writes into reserved memory; made late, because importing transformers is slow."""
    from transformers.cache_utils import DynamicLayer

    class Reserved(DynamicLayer):  # type: ignore[misc]
        """Keys and values `[1, heads, capacity, dim]`, stored token after token, of which `length` are filled."""

        def __init__(self, capacity: int) -> None:
            super().__init__()
            self.capacity, self.length = max(1, capacity), 0
            self.memory: list[Tensor] | None = None

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if self.memory is None:
                self.dtype, self.device = keys.dtype, keys.device
                self.memory = [
                    t.new_empty(t.shape[0], self.capacity, t.shape[1], t.shape[3]) for t in (keys, values)
                ]
                self.is_initialized = True
            end = self.length + keys.shape[-2]
            if end > self.capacity:
                self.grow(end)
            for memory, new in zip(self.memory, (keys, values), strict=True):
                memory[:, self.length : end] = new.transpose(1, 2)
            self.rewind(end)
            return self.keys, self.values

        def take(self, memory: list[Tensor], length: int) -> None:
            """Use keys and values `[1, capacity, heads, dim]` that are set aside already, of which `length` are filled."""
            self.memory, self.capacity = memory, memory[0].shape[1]
            self.dtype, self.device, self.is_initialized = memory[0].dtype, memory[0].device, True
            self.rewind(length)

        def grow(self, least: int) -> None:
            """At least twice as much memory, so that a text of any length is copied twice at most."""
            self.capacity = max(least, 2 * self.capacity)
            if self.memory is not None:
                grown = [t.new_empty(t.shape[0], self.capacity, *t.shape[2:]) for t in self.memory]
                for new, old in zip(grown, self.memory, strict=True):
                    new[:, : self.length] = old[:, : self.length]
                self.memory = grown
                self.rewind(self.length)

        def get_seq_length(self) -> int:
            return self.length

        def rewind(self, length: int) -> None:
            self.length = length
            if self.memory is not None:
                self.keys, self.values = (memory[:, :length].transpose(1, 2) for memory in self.memory)

    return Reserved


def cache_in(made: Any) -> Any:
    """The cache in a forward's output, under its name in transformers of today or of yesterday; None if there is none."""
    held = vars(made)  # asking for the old name would bring a warning
    return held.get("cache", held.get("past_key_values"))


def holds_something(cache: Any) -> bool:
    """Whether a model has put anything into the cache it was given."""
    for layer in cache.layers:
        states = (getattr(layer, f"is_{kind}_states_initialized", {}) for kind in ("conv", "recurrent"))
        if getattr(layer, "is_initialized", False) or any(any(filled.values()) for filled in states):
            return True
    return False
