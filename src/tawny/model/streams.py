"""Hidden states between blocks: all samples of one depth, in chunks, in the dtype of the forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tawny.errors import NumericalError, TextError
from tawny.model import durable
from tawny.model.blocks import Call, Stack, chunks_of
from tawny.model.tensorfile import read_tensors, write_tensors

# Tokens a forward takes at once: enough rows for full-speed matrix products, few enough that the activations
# between them stay in the last-level cache of a small machine (measured: 4096 is 15 % slower than 2048).
CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class Samples:
    """Calibration or evaluation tokens.

    Attributes:
        tokens: `[samples, tokens]` int64.
        mask: `[samples, tokens]`, true for real tokens, or None when nothing is padding.
    """

    tokens: Tensor
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        shape = list(self.tokens.shape)
        if self.tokens.dim() != 2 or 0 in shape or self.tokens.is_floating_point():
            raise TextError(
                f"calibration has shape {shape} {self.tokens.dtype}; expected integer tokens [samples, tokens]"
            )
        if self.mask is not None and self.mask.shape != self.tokens.shape:
            raise TextError(
                f"attention mask has shape {list(self.mask.shape)}, tokens {shape}; expected the same"
            )

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def seqlen(self) -> int:
        return int(self.tokens.shape[1])

    def first(self, count: int) -> Samples:
        return Samples(self.tokens[:count], None if self.mask is None else self.mask[:count])


class Stream:
    """The samples on their way through the stack.

    Args:
        stack: the model.
        samples: what enters it.
        chunk_tokens: tokens a forward takes at once (at least one sample). It depends on the samples alone,
            never on free memory, so that sums are added up in the same order everywhere.
        depth: the block in front of which the samples stand.
        saved: the file `save` made there, when they have come that far before; else they enter at the beginning.

    Attributes:
        hidden: one tensor `[batch, tokens, hidden]` a chunk.
        depth: rises when all chunks have been replaced.
    """

    def __init__(
        self,
        stack: Stack,
        samples: Samples,
        chunk_tokens: int = CHUNK_TOKENS,
        *,
        depth: int = 0,
        saved: Path | None = None,
    ) -> None:
        self.stack = stack
        self.samples = samples
        self.slices = chunks_of(len(samples), max(1, chunk_tokens // samples.seqlen))
        self.depth = depth
        self.hidden: list[Tensor] = []
        if saved is None:
            self.hidden = [self.stack.enter(*self._inputs(part)) for part in self.slices]
        else:
            read = read_tensors(saved)
            self.hidden = [read.pop(str(chunk)).to(stack.device) for chunk in range(len(self.slices))]

    def __len__(self) -> int:
        return len(self.slices)

    def _inputs(self, part: slice) -> tuple[Tensor, Tensor | None]:
        mask = None if self.samples.mask is None else self.samples.mask[part]
        return self.samples.tokens[part], mask

    def call(self, index: int, chunk: int) -> Call:
        """What block `index` is called with for one chunk."""
        return self.stack.calls(*self._inputs(self.slices[chunk]))[index]

    def valid(self, chunk: int) -> Tensor | None:
        """`[batch, tokens]` bool of one chunk's real tokens, or None if all are."""
        return None if self.samples.mask is None else self.samples.mask[self.slices[chunk]].bool()

    def outputs(self, index: int) -> Iterator[tuple[int, Tensor]]:
        """Run every chunk through block `index` (which must be loaded)."""
        for chunk, hidden in enumerate(self.hidden):
            yield chunk, self.stack.forward(index, hidden, self.call(index, chunk))

    def advance(self, index: int, step: Callable[[], None] = lambda: None) -> None:
        """Replace the hidden states by block `index`'s outputs.

        Raises:
            NumericalError: the block gives NaN or infinity.
        """
        for chunk, made in self.outputs(index):
            self.replace(index, chunk, made)
            step()

    def replace(self, index: int, chunk: int, made: Tensor) -> None:
        if not bool(torch.isfinite(made.sum(dtype=torch.float32))) and not bool(torch.isfinite(made).all()):
            raise NumericalError(
                f"block {self.stack.name(index)} gives NaN or infinite activations in {self.stack.compute}; "
                "try -o compute=float32, or check the checkpoint"
            )
        self.hidden[chunk] = made
        if chunk == len(self.slices) - 1:
            self.depth = index + 1

    def save(self, path: Path) -> None:
        """A durable copy of the hidden states."""
        with durable.beside(path) as temporary:
            write_tensors(temporary, {str(chunk): hidden for chunk, hidden in enumerate(self.hidden)})
