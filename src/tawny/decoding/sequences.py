"""Many sequences on one model: they begin and end at any time, and take their steps together where the model allows it.

    sequences = Sequences(model, capacity=4096, count=8)
    one = sequences.begin(prompt)
    while (logits := sequences.read(one, 256)) is None: ...
    logits = sequences.step({one: token, other: token})[one]

- A model that keeps keys and values and nothing else has them in memory that is set aside once, a place for a sequence.
  If it makes a token in one C++ call (step.py), so it does for all sequences: weights are read once for all of them.
- What a sequence that ended has left in its place is the prefix cache. A prompt that begins like the text of any place,
  free or taken, copies what they have in common. The place that was left longest ago is taken first.
- Other models (sliding windows, state spaces, two sets of rotary angles) have a cache for each sequence and take turns.
  One that keeps its state on its own modules (RecurrentGemma) has room for one sequence only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tawny.decoding.decoder import Decoder, border_of
from tawny.decoding.step import Step
from tawny.errors import UserError
from tawny.machine import free_memory
from tawny.words import size

_PROBE = 16  # tokens of the text with which a model is tried


class Sequence:
    """One text: its prompt, and how much of that is read.

    cached: tokens of the prompt that an earlier text had in common with it, which need not be read again.
    """

    def __init__(self, ids: Tensor, decoder: Decoder, place: int, cached: int) -> None:
        self.ids, self.decoder, self.place, self.cached = ids, decoder, place, cached
        self.length = cached  # tokens in its cache


class _Place:
    """Memory of one sequence: the tokens whose keys and values it holds, and when it was last left."""

    def __init__(self, capacity: int) -> None:
        self.tokens, self.length = torch.empty(capacity, dtype=torch.long), 0
        self.taken: Sequence | None = None
        self.left = 0

    def add(self, tokens: Tensor | int, count: int) -> None:
        self.tokens[self.length : self.length + count] = tokens
        self.length += count

    def common(self, ids: Tensor) -> int:
        """How many tokens at the beginning of a prompt it holds."""
        count = min(len(ids), self.length)
        different = (self.tokens[:count] != ids[:count]).nonzero()
        return int(different[0]) if len(different) else count


class Sequences:
    """Up to `count` sequences of at most `capacity` tokens each. One thread may use it, under `torch.inference_mode()`.

    Attributes:
        count: 1, whatever was asked for, where the model itself keeps the state of a text.
        together: whether a step of several sequences is one call; else they take turns.
        keeps: whether prompts that begin alike share what was read.
        nbytes: memory for keys and values: set aside, or taken as texts grow where each has a cache of its own.

    Raises:
        UserError: keys and values do not fit the memory of this machine.
    """

    def __init__(self, model: Any, capacity: int, count: int) -> None:
        self.model, self.capacity = model, capacity
        self.count = count = 1 if count > 1 and _keeps_state(model) else count
        self.nbytes = 0
        self._pool: list[list[Tensor]] | None = self._reserved()
        self._places = [_Place(capacity) for _ in range(count)]
        self._clock = 0
        self._step: Step | None = None
        if self._pool is not None and capacity > 1 and self._proved():
            self._step = Step.build(model, [(keys, values) for keys, values in self._pool])
        self.together, self.keeps = self._step is not None, self._pool is not None

    def _reserved(self) -> list[list[Tensor]] | None:
        """Keys and values `[count, capacity, heads, dim]` of every layer, as large as one token's show."""
        probe = _probe(self.model)
        each = _nbytes(probe, self.capacity)
        self.nbytes, free = each * self.count, free_memory()
        if free is not None and each * self.count > free:
            fit = (
                f"{free // each} sequences"
                if free >= each
                else f"{free * self.capacity // each} tokens for one"
            )
            raise UserError(
                f"keys and values of {self.count} sequences of {self.capacity} tokens take {size(each * self.count)}, "
                f"and {size(free)} of memory are free; there is room for {fit}"
            )
        if probe.memory is None or border_of(self.model, self.capacity) is not None:
            return None
        shape = (self.count, self.capacity)
        return [[t.new_empty(*shape, *t.shape[2:]) for t in layer] for layer in probe.memory]

    def _proved(self) -> bool:
        """Whether a token may be made in one C++ call, up to the last position there is room for."""
        probe = Decoder(self.model, self.capacity)
        probe.take(self._memory(0), 0)
        words = self.model.get_input_embeddings().num_embeddings
        text = torch.linspace(0, words - 1, min(_PROBE, self.capacity)).long()
        probe.prefill(text[:-1])
        probe.step(int(text[-1]))
        return probe.path == "blocks"

    def _memory(self, place: int) -> list[list[Tensor]]:
        assert self._pool is not None
        return [[t[place : place + 1] for t in layer] for layer in self._pool]

    def begin(self, ids: Tensor) -> Sequence:
        """A new sequence with a prompt `[tokens]`, of which only `Sequence.cached` tokens are read yet.

        Raises:
            UserError: all places are taken, or the prompt is longer than `capacity`.
        """
        free = [number for number, place in enumerate(self._places) if place.taken is None]
        if not free:
            raise UserError(f"all {self.count} places are taken; end a sequence first")
        if not 0 < len(ids) <= self.capacity:
            raise UserError(f"the prompt has {len(ids)} tokens; expected 1 to {self.capacity}")
        number = min(free, key=lambda n: self._places[n].left)
        decoder, cached = Decoder(self.model, self.capacity, quick=None if self.keeps else False), 0
        if self._pool is not None:
            held = [place.common(ids[:-1]) for place in self._places]  # the last token is read for its logits
            best = max(range(self.count), key=lambda n: (held[n], n == number))
            cached = held[best]
            if best in free and 2 * cached >= self._places[best].length:
                number = best
            elif best != number:
                for layer in self._pool:
                    for memory in layer:
                        memory[number, :cached] = memory[best, :cached]
            decoder.take(self._memory(number), cached)
        place = self._places[number]
        sequence = place.taken = Sequence(ids, decoder, number, cached)
        place.length = 0
        place.add(ids[:cached], cached)
        return sequence

    def read(self, sequence: Sequence, most: int) -> Tensor | None:
        """Read at most `most` more tokens of the prompt; logits `[vocabulary]` once all of it is read.

        A model whose cache is not keys and values alone reads it at once, because not all of them can go on.
        """
        self._take_over(sequence)
        end = min(sequence.length + most, len(sequence.ids)) if self.keeps else len(sequence.ids)
        part = sequence.ids[sequence.length : end]
        if len(part) == 1 and 0 < sequence.length == len(sequence.ids) - 1 and self._step is not None:
            # All that is left of a prompt that comes again. A step is one call, where a forward runs the model's own Python.
            return self.step({sequence: int(part)})[sequence].clone()
        logits = sequence.decoder.prefill(part)
        sequence.length = end
        self._places[sequence.place].add(part, len(part))
        return logits if end == len(sequence.ids) else None

    def _take_over(self, sequence: Sequence) -> None:
        """Copy what another sequence has read of the same prompt since this one began."""
        if self._pool is None:
            return
        ids, length, place = sequence.ids, sequence.length, self._places[sequence.place]
        held = [each.common(ids[:-1]) for each in self._places]
        best = max(range(self.count), key=held.__getitem__)
        if (end := held[best]) > length:
            for layer in self._pool:
                for memory in layer:
                    memory[sequence.place, length:end] = memory[best, length:end]
            place.add(ids[length:end], end - length)
            sequence.decoder.take(self._memory(sequence.place), end)
            sequence.cached += end - length
            sequence.length = end

    def step(self, tokens: Mapping[Sequence, int]) -> dict[Sequence, Tensor]:
        """Logits `[vocabulary]` of each sequence after one more token of it; the next call may overwrite them.

        Raises:
            UserError: a sequence is as long as there is room for.
        """
        for sequence in tokens:
            if sequence.length == self.capacity:
                raise UserError(f"a sequence has {self.capacity} tokens, and there is room for no more")
        if self._step is None:
            stepped = {sequence: sequence.decoder.step(token) for sequence, token in tokens.items()}
        else:
            logits = self._step([(token, s.place, s.length) for s, token in tokens.items()])
            stepped = dict(zip(tokens, logits, strict=True))
        for sequence, token in tokens.items():
            sequence.length += 1
            self._places[sequence.place].add(token, 1)
        return stepped

    def end(self, sequence: Sequence) -> None:
        """Free its place; what it holds stays until another sequence needs it."""
        place = self._places[sequence.place]
        if place.taken is sequence:
            self._clock += 1
            place.taken, place.left = None, self._clock


def _keeps_state(model: Any) -> bool:
    """Whether a forward leaves what it read on the model's modules, where another text would overwrite it."""

    def left(token: int) -> dict[tuple[int, str], Tensor]:
        Decoder(model, 1, quick=False).prefill(torch.full((1,), token))
        return {
            (number, name): value.clone()
            for number, module in enumerate(model.modules())
            for name, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    one, other = left(1), left(2)
    return any(key not in other or not torch.equal(value, other[key]) for key, value in one.items())


def bytes_of_text(model: Any, tokens: int) -> int:
    """Of the keys and values of a text of so many tokens; the model may be without weights (on `meta`)."""
    with torch.inference_mode():
        return _nbytes(_probe(model), tokens)


def _probe(model: Any) -> Decoder:
    """One that has read a token."""
    probe = Decoder(model, 1, quick=False)
    probe.prefill(torch.ones(1, dtype=torch.long, device=model.device))
    return probe


def _nbytes(probe: Decoder, capacity: int) -> int:
    """Of the keys and values of a sequence, by those of a single token; a sliding window forgets some."""
    total = 0
    for layer in probe.cache.layers:
        held = [t for name in ("keys", "values") if (t := getattr(layer, name, None)) is not None]
        length = min(capacity, getattr(layer, "sliding_window", None) or capacity)
        total += length * sum(int(t.nbytes) for t in held)
    return total
