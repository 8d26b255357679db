"""Many sequences on one model: they begin and end at any time, and take their steps together where the model allows it.

sequences = Sequences(model, capacity=4096, count=8)
one = sequences.begin(prompt)
while (logits := sequences.read(one, 256)) is None: ...
logits = sequences.step({one: token, other: token})[one]
"""

from __future__ import annotations

__all__ = ["Sequence", "Sequences"]

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tawny.decoding.decoder import Decoder
from tawny.errors import UserError


class Sequence:
    """One text: its prompt, and how much of that is read.

    cached: tokens of the prompt that earlier texts had in common with it, which need not be read again.
    """

    def __init__(self, ids: Tensor, decoder: Decoder, cached: int = 0) -> None:
        self.ids, self.decoder, self.cached = ids, decoder, cached
        self.length = cached  # tokens in its cache


class Sequences:
    """Up to `count` sequences of at most `capacity` tokens each. One thread may use it, under `torch.inference_mode()`.

    together: whether a step of several sequences is one call; else they take turns.
    nbytes: memory that is set aside for their keys and values.
    """

    def __init__(self, model: Any, capacity: int, count: int) -> None:
        self.model, self.capacity, self.count = model, capacity, count
        self.together, self.nbytes = False, 0
        self._active: set[Sequence] = set()

    def begin(self, ids: Tensor) -> Sequence:
        """A new sequence with a prompt `[tokens]`, of which nothing is read yet.

        Raises:
            UserError: all places are taken, or the prompt is longer than `capacity`.
        """
        if len(self._active) == self.count:
            raise UserError(f"all {self.count} places are taken; end a sequence first")
        if not 0 < len(ids) <= self.capacity:
            raise UserError(f"the prompt has {len(ids)} tokens; expected 1 to {self.capacity}")
        sequence = Sequence(ids, Decoder(self.model, self.capacity))
        self._active.add(sequence)
        return sequence

    def read(self, sequence: Sequence, most: int) -> Tensor | None:
        """Read at most `most` more tokens of the prompt; logits `[vocabulary]` once all of it is read."""
        part = sequence.ids[sequence.length : sequence.length + most]
        logits = sequence.decoder.prefill(part)
        sequence.length += len(part)
        return logits if sequence.length == len(sequence.ids) else None

    def step(self, tokens: Mapping[Sequence, int]) -> dict[Sequence, Tensor]:
        """Logits `[vocabulary]` of each sequence after one more token of it; the next call may overwrite them."""
        made = {sequence: sequence.decoder.step(token) for sequence, token in tokens.items()}
        for sequence in tokens:
            sequence.length += 1
        return made

    def end(self, sequence: Sequence) -> None:
        """Free its place."""
        self._active.discard(sequence)
