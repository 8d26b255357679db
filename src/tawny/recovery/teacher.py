"""The dense model as a teacher that is not in memory: its last hidden states on disk, its head beside the student's.

Logits are too many to keep (100 kB a token for 49,152 words) and hidden states are few (1.2 kB). They are made by walking
the teacher's blocks one at a time, as in pruning, for as many windows as the next steps read, so that a run that ends
early has not paid for the rest; and kept in bfloat16, so that a window costs its forward once, over epochs and resumed
runs. Those of samples that are read once, such as crops, stay in memory until they have been. What stays in memory is the
teacher's embedding, norm and head, shared with the student where they are equal and the teacher was read from a folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tawny.errors import ModelError
from tawny.evaluation.hidden_states import stream_through
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.source import resolve
from tawny.model.stack import Stack
from tawny.progress import Progress, Within
from tawny.recovery.data import Reading
from tawny.words import counted

# Windows made in one walk: each walk reads every block once, and holds this many tokens' hidden states.
WALK_TOKENS = 32_768


class Teacher:
    """Hidden states of a dense model for numbered samples.

    Args:
        stack: the dense model.
        reading: the samples; what is asked for is named by row.
        cache: file in the run's own folder to keep hidden states in; None keeps them in memory.
    """

    def __init__(self, stack: Stack, reading: Reading, cache: Path | None) -> None:
        self.stack, self.reading, self.cache = stack, reading, cache
        self.tokens_made = 0
        held_out = reading.held_out
        self._first = reading.training if reading.passes else 0  # row that is kept
        self._passing: dict[int, Tensor] = {}
        width = int(stack.enter(reading.take(held_out[:1]).inputs).shape[-1])
        self._shape = (reading.training + len(held_out) - self._first, reading.seqlen, width)
        self._done = np.zeros(self._shape[0], dtype=bool)
        self._states: Any
        if cache is None:
            self._states = np.zeros(self._shape, np.int16)
            return
        self._index = cache.with_suffix(".json")
        fresh = not self._known()
        with writing(cache):
            if fresh:
                self._index.unlink(missing_ok=True)
                with cache.open("wb") as file:
                    file.truncate(2 * math.prod(self._shape))
            self._states = np.memmap(cache, np.int16, "r", shape=self._shape)

    def _known(self) -> bool:
        """Whether the cache on disk is of these windows; takes over which of them it holds."""
        assert self.cache is not None
        try:
            index = json.loads(self._index.read_text(encoding="utf-8"))
            if self.cache.stat().st_size != 2 * math.prod(self._shape):
                return False
            self._done[index["done"]] = True
        except (OSError, ValueError, KeyError, IndexError):
            return False
        return True

    def share(self, student: Stack) -> None:
        """Use the student's tensors outside the blocks wherever they are equal, and drop the copies.

        A live teacher is its owner's, and shares nothing: what is done to the student later must not change it.
        """
        if self.stack.checkpoint is None:
            return
        theirs = dict(student.model.named_parameters())
        for name, parameter in self.stack.model.named_parameters():
            other = theirs.get(name)
            if other is None or self.stack.structure.hold(name) or parameter.dim() < 2:
                continue
            if parameter.is_meta or other.is_meta:  # read when it is needed
                continue
            if parameter.dtype == other.dtype and torch.equal(parameter, other):
                parameter.data = other.data

    @property
    def bytes_per_token(self) -> int:
        return 2 * self._shape[2]

    def missing(self, rows: Sequence[int]) -> list[int]:
        return [row for row in dict.fromkeys(rows) if not self._has(row)]

    def _has(self, row: int) -> bool:
        return row in self._passing if row < self._first else bool(self._done[row - self._first])

    @torch.no_grad()
    def make(self, rows: Sequence[int], progress: Progress) -> None:
        """Walk the blocks for those of `rows` that are not there yet. What was read once before them is dropped."""
        left = self.missing(rows)
        if left and left[0] < self._first:
            self._passing = {row: kept for row, kept in self._passing.items() if row >= left[0]}
        size = max(1, WALK_TOKENS // self._shape[1])
        for start in range(0, len(left), size):
            self._walk(left[start : start + size], progress)

    def _walk(self, rows: list[int], progress: Progress) -> None:
        name = f"teacher, {len(rows)} {counted(self.reading.about)[0]}"
        stream = stream_through(self.stack, self.reading.take(rows), Within(progress), name)
        for part, hidden in zip(stream.slices, stream.hidden, strict=True):
            for row, state_TH in zip(rows[part], hidden, strict=True):
                kept_TH = state_TH.to("cpu", torch.bfloat16).contiguous()
                if row < self._first:
                    self._passing[row] = kept_TH.clone()
                else:
                    self._put(row - self._first, kept_TH.view(torch.int16).numpy())
        kept = [row - self._first for row in rows if row >= self._first]
        self._done[kept] = True
        self.tokens_made += len(rows) * self._shape[1]
        if self.cache is not None and kept:
            with writing(self.cache):
                durable.sync(self.cache)
                done = np.flatnonzero(self._done).tolist()
                durable.write(self._index, json.dumps({"done": done}).encode())

    def _put(self, place: int, states_TH: Any) -> None:
        """Through the file and not its memory map: there a full disk kills the process without a word."""
        if self.cache is None:
            self._states[place] = states_TH
            return
        with writing(self.cache), self.cache.open("r+b") as file:
            file.seek(place * states_TH.nbytes)
            file.write(states_TH)

    def hidden(self, rows: Sequence[int]) -> Tensor:
        """`[rows, seqlen, hidden]` in the dtype of the teacher's forwards; `make` came before.

        The rows are all trained on, or all held out.
        """
        if self.missing(rows):
            raise ModelError(f"the teacher has not seen windows {self.missing(rows)[:3]}")
        if rows[0] < self._first:
            states = torch.stack([self._passing[row] for row in rows])
        else:
            states = torch.from_numpy(self._states[[row - self._first for row in rows]]).view(torch.bfloat16)
        return states.to(self.stack.device, self.stack.compute)


def check_teacher(student: Stack, teacher: Stack) -> None:
    """Raise a ModelError for a teacher of another vocabulary, depth or shape: the zeros were not cut out of it."""
    expected = "expected the dense model it was pruned from"
    mine, theirs = (s.config.get_text_config() for s in (student, teacher))
    for what, key in (("words", "vocab_size"), ("hidden size", "hidden_size")):
        ours, other = (getattr(config, key, None) for config in (mine, theirs))
        if ours != other:
            raise ModelError(f"the teacher has {what} {other}, the pruned model {ours}; {expected}")
    linears, others = (  # of experts the teacher may have more
        {x.name if x.expert is None else x.key: x.shape for i in range(len(s)) for x in s.linears(i)}
        for s in (student, teacher)
    )
    if linears != others:
        first = next(n for n in {**linears, **others} if linears.get(n) != others.get(n))
        raise ModelError(
            f"the teacher's linear {first!r} is {others.get(first, 'absent')}, the pruned model's "
            f"{linears.get(first, 'absent')}; {expected}"
        )


def check_tokenizers(student: Any, teacher: Any) -> None:
    """Raise a ModelError for a teacher that reads other tokens."""
    mine, theirs = student.get_vocab(), teacher.get_vocab()
    if mine != theirs:
        word = next(w for w in {**mine, **theirs} if mine.get(w) != theirs.get(w))
        raise ModelError(
            f"the teacher's tokenizer has {len(theirs):,} tokens, the pruned model's {len(mine):,}, and {word!r} is "
            f"{theirs.get(word, 'absent')} there, {mine.get(word, 'absent')} here; expected the same tokenizer"
        )


def is_own_teacher(folder: Path | None, teacher: str | Path | nn.Module | None) -> bool:
    if folder is None or teacher is None or isinstance(teacher, nn.Module):
        return False
    return folder.resolve() == resolve(teacher).resolve()


def check_not_own_teacher(own: bool) -> None:
    """Raise a ModelError for a pruned model as its own teacher, from which there is nothing to learn."""
    if own:
        raise ModelError(
            "the teacher is the model that is trained; expected the dense model it was pruned from"
        )
