"""What goes through a model: `Samples`, its inputs, and `Stream`, their hidden states between blocks.

Samples are what a model's forward takes by name: token ids and a mask, pictures, sound. calibration/ makes them, and
model/stack.py hands them to the model's own forward. Everything after sees hidden states only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tawny.errors import NumericalError, TextError
from tawny.model import durable
from tawny.model.replay import Call
from tawny.model.stack import Stack, check_tensors, chunks_of
from tawny.model.structure import MASK, TOKENS
from tawny.model.tensorfile import TensorWriter, entries, read_tensor, read_tensors, write_tensors

# Tokens a forward takes at once: enough rows for full-speed matrix products, few enough that the activations
# between them stay in the last-level cache of a small machine (measured: 4096 is 15 % slower than 2048).
CHUNK_TOKENS = 2048
_GOLDEN = (5**0.5 - 1) / 2


def samples_a_chunk(seqlen: int, chunk_tokens: int = CHUNK_TOKENS) -> int:
    """How many samples of `seqlen` tokens a forward takes at once."""
    return max(1, chunk_tokens // seqlen)


def repeated_tokens(length: int, share: float, *, begun: bool = False, ended: bool = False) -> int:
    """How many tokens at the end of a sample repeat what stood before in it (`Samples.repeating`)."""
    return min(int(length * share), (length - begun - ended) // 2)


def way_out(dtype: torch.dtype, live: bool = False) -> str:
    """What to do about numbers that are not finite; `compute` is an option of some verbs, a key of others, and an argument.

    Args:
        live: the model keeps its own dtype, whatever `compute` says.
    """
    wider = "convert the live model first (model.float()), or " if live else "try compute=float32, or "
    wider = "" if dtype.itemsize >= torch.float32.itemsize else wider
    return (
        f"in {str(dtype).removeprefix('torch.')}; {wider}check {'its weights' if live else 'the checkpoint'}"
    )


def holds_integers(tokens: Tensor) -> bool:
    kind = tokens.dtype
    return not (kind.is_floating_point or kind.is_complex or kind == torch.bool)


class Samples:
    """Calibration or evaluation inputs of a model.

    Args:
        given: `[samples, tokens]` of any integers; or several tensors by the names that the model's forward gives them,
            all with samples along the first dimension.
        mask: `[samples, tokens]`, true for real tokens, or None when nothing is padding.
        seqlen: hidden states a sample makes, where it is not made of tokens.

    Attributes:
        inputs: by name; tokens are int64.
    """

    def __init__(
        self, given: Tensor | Mapping[str, Tensor], mask: Tensor | None = None, seqlen: int | None = None
    ) -> None:
        named = dict(given) if isinstance(given, Mapping) else {TOKENS: given}
        named |= {} if mask is None else {MASK: mask}
        if TOKENS in named:
            _check_tokens(named[TOKENS], named.get(MASK))
        check_tensors(named)
        if TOKENS in named:
            named[TOKENS] = named[TOKENS].to(torch.int64)
            seqlen = int(named[TOKENS].shape[1])
        if seqlen is None or len({len(value) for value in named.values()}) != 1:
            raise TextError(
                f"samples of {', '.join(named)} are not as many of each; expected tensors with samples along the first dimension"
            )
        self.inputs: Mapping[str, Tensor] = named
        self.seqlen = seqlen

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def tokens(self) -> Tensor:
        """`[samples, tokens]` int64.

        Raises:
            TextError: the samples are something else.
        """
        if TOKENS not in self.inputs:
            raise TextError(
                f"samples are {next(iter(self.inputs))} here, and this works on tokens only: give a model that reads text"
            )
        return self.inputs[TOKENS]

    @property
    def mask(self) -> Tensor | None:
        """`[samples, tokens]`, true for real tokens; None when nothing is padding, or hidden states are not of tokens."""
        return self.inputs.get(MASK) if TOKENS in self.inputs else None

    def take(self, rows: slice | Sequence[int]) -> Samples:
        """Some of the samples."""
        return Samples({name: value[rows] for name, value in self.inputs.items()}, seqlen=self.seqlen)

    def repeating(self, share: float, *, begun: bool = False, ended: bool = False) -> Samples:
        """Samples that end with a passage they held before, each from another place; `share` of each is that long.

        In text of short documents hardly anything comes twice. Such text neither shows which models still copy nor trains
        them to. A sample of which a part is masked stays as it is.

        Args:
            begun: each sample begins with BOS, which is not part of any passage.
            ended: each sample ends with a token such as [SEP], which stays the last.
        """
        if not share:
            return self
        tokens_ST = self.tokens.clone()
        length = self.seqlen - ended
        size = repeated_tokens(self.seqlen, share, begun=begun, ended=ended)
        places = length - begun - 2 * size + 1
        for sample in range(len(self)):
            if self.mask is None or bool(self.mask[sample].all()):
                # Multiples of the golden ratio, modulo 1, spread any number of places evenly.
                start = begun + int((sample + 1) * _GOLDEN % 1 * places)
                tokens_ST[sample, length - size : length] = self.tokens[sample, start : start + size]
        return Samples({**self.inputs, TOKENS: tokens_ST})

    def first(self, count: int) -> Samples:
        return self.take(slice(count))


def _check_tokens(tokens: object, mask: object) -> None:
    for value, name in ((tokens, "calibration"), (mask, "attention mask")):
        if value is not None and not isinstance(value, Tensor):
            raise TextError(
                f"{name} is a {type(value).__name__}; expected a torch tensor [samples, tokens], or the name or path of a text"
            )
    assert isinstance(tokens, Tensor)
    shape = list(tokens.shape)
    if tokens.dim() != 2 or 0 in shape or not holds_integers(tokens):
        raise TextError(
            f"calibration has shape {shape} {tokens.dtype}; expected integer tokens [samples, tokens]"
        )
    if isinstance(mask, Tensor) and mask.shape != tokens.shape:
        raise TextError(f"attention mask has shape {list(mask.shape)}, tokens {shape}; expected the same")


class OnDisk(Sequence[Tensor]):
    """Hidden states in one file for each depth: what is read is of one depth, what is assigned becomes the next.

    Args:
        base: path of the files, without depth.
        rows: samples of each chunk.
        depth: of what is read; assigning all chunks in order raises it, except the first time where nothing was saved.
        saved: the file of that depth, if there is one.
    """

    def __init__(
        self, base: Path, rows: Sequence[int], device: torch.device, depth: int, saved: Path | None
    ) -> None:
        self._base = base
        self._rows = rows
        self._device = device
        self.path = saved
        self._depth = depth
        self._writer: TensorWriter | None = None
        self._next: Path | None = None
        self._places = entries(saved) if saved is not None else {}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, chunk: int) -> Tensor:  # type: ignore[override]  # no slices
        if not 0 <= chunk < len(self._rows) or self.path is None:
            raise IndexError(chunk)
        with self.path.open("rb") as file:
            return read_tensor(file, self._places[str(chunk)]).to(self._device)

    def __setitem__(self, chunk: int, value: Tensor) -> None:
        if self._writer is None:
            if self.path is not None:
                self._depth += 1
            self._next = self._base.with_name(f"{self._base.name}.{self._depth:05d}.tmp")
            shapes = [(rows, *value.shape[1:]) for rows in self._rows]
            specs = {str(c): (value.dtype, shape) for c, shape in enumerate(shapes)}
            self._writer = TensorWriter(self._next, specs)
        with durable.writing(self._base):
            self._writer.write(str(chunk), value)
            if chunk == len(self._rows) - 1:
                self._flip()

    def _flip(self) -> None:
        assert self._writer is not None
        self._writer.close()
        if self.path is not None and self.path.suffix == ".tmp":  # the journal removes one that was kept
            self.path.unlink(missing_ok=True)
        self.path, self._places, self._writer = self._next, self._writer.places, None

    def save(self, path: Path) -> None:
        assert self.path is not None
        if self.path != path:
            durable.replace(self.path, path)
            self.path = path


class Stream:
    """The samples on their way through the stack.

    Args:
        stack: the model.
        samples: what enters it.
        chunk_tokens: tokens a forward takes at once (at least one sample). It depends on the samples alone,
            never on free memory, so that sums are added up in the same order everywhere.
        depth: the block in front of which the samples stand.
        saved: the file `save` made there, when they have come that far before; else they enter at the beginning.
        spill: where to keep the hidden states instead of in memory: a path that files get their names from.

    Raises:
        NumericalError: an embedding is NaN or infinite; names it.

    Attributes:
        hidden: one tensor `[batch, tokens, hidden]` a chunk; read anew each time where they are on disk.
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
        spill: Path | None = None,
    ) -> None:
        self.stack = stack
        self.samples = samples
        self.slices = chunks_of(len(samples), samples_a_chunk(samples.seqlen, chunk_tokens))
        self.depth = depth
        self.hidden: list[Tensor] | OnDisk
        entering = (self._entered(stack.enter(samples.take(part).inputs)) for part in self.slices)
        if spill is not None:
            rows = [part.stop - part.start for part in self.slices]
            self.hidden = OnDisk(spill, rows, stack.device, depth, saved)
            for chunk, hidden in enumerate(entering if saved is None else ()):
                self.hidden[chunk] = hidden
        elif saved is None:
            self.hidden = list(entering)
        else:
            read = read_tensors(saved)
            self.hidden = [read.pop(str(chunk)).to(stack.device) for chunk in range(len(self.slices))]

    def _way_out(self, dtype: torch.dtype) -> str:
        return way_out(dtype, self.stack.checkpoint is None)

    def _entered(self, hidden: Tensor) -> Tensor:
        if bool(torch.isfinite(hidden).all()):
            return hidden
        for name, weight in self.stack.model.named_parameters():
            if not weight.is_meta and not bool(torch.isfinite(weight).all()):
                raise NumericalError(
                    f"{name} {list(weight.shape)} holds NaN or infinite weights {self._way_out(weight.dtype)}"
                )
        raise NumericalError(
            f"what enters the first block is NaN or infinite {self._way_out(self.stack.compute)}"
        )

    def __len__(self) -> int:
        return len(self.slices)

    @property
    def walks_alone(self) -> bool:
        """Whether no block asks again for what is outside the blocks of the stack."""
        shapes = (self.slices[0], self.slices[-1])  # all but the last chunk are equally large
        return all(self.stack.walks_alone(self.samples.take(part).inputs) for part in shapes)

    def call(self, index: int, chunk: int) -> Call:
        """What block `index` is called with for one chunk."""
        return self.stack.calls(self.samples.take(self.slices[chunk]).inputs)[index]

    def valid(self, chunk: int) -> Tensor | None:
        """`[batch, tokens]` bool of one chunk's real tokens, or None if all are."""
        return None if self.samples.mask is None else self.samples.mask[self.slices[chunk]].bool()

    def advance(self, index: int, step: Callable[[], None] = lambda: None) -> None:
        """Replace the hidden states by the outputs of block `index`, which must be loaded.

        Raises:
            NumericalError: the block gives NaN or infinity.
        """
        for chunk, hidden in enumerate(self.hidden):
            self.replace(index, chunk, self.stack.forward(index, hidden, self.call(index, chunk)))
            step()

    def replace(self, index: int, chunk: int, made: Tensor) -> None:
        """Replace one chunk by what block `index` made of it, in the order of the chunks; raises as `advance` does."""
        if not bool(torch.isfinite(made.sum(dtype=torch.float32))) and not bool(torch.isfinite(made).all()):
            self.check_weights(index)
            raise NumericalError(
                f"block {self.stack.name(index)} gives NaN or infinite activations {self._way_out(self.stack.compute)}"
            )
        self.hidden[chunk] = made
        if chunk == len(self.slices) - 1:
            self.depth = index + 1

    def kept(self, spill: Path | None) -> Sequence[Tensor]:
        """The hidden states where they stand now, which stay when the stream goes on; in a file named after `spill`, if given."""
        if spill is None:
            return list(self.hidden)
        rows = [part.stop - part.start for part in self.slices]
        copy = OnDisk(spill, rows, self.stack.device, self.depth, None)
        for chunk, hidden in enumerate(self.hidden):
            copy[chunk] = hidden
        return copy

    def check_weights(self, index: int) -> None:
        """Name what makes the outputs of block `index`, which must be loaded, not finite, where that is a weight of it.

        Raises:
            NumericalError: a weight of the block is NaN or infinite.
        """
        for key, weight in self.stack.blocks[index].named_parameters():
            if not bool(torch.isfinite(weight).all()):
                raise NumericalError(
                    f"{self.stack.name(index)}.{key} {list(weight.shape)} holds NaN or infinite weights {self._way_out(weight.dtype)}"
                )

    def save(self, path: Path) -> None:
        """A durable copy of the hidden states."""
        if isinstance(self.hidden, OnDisk):
            self.hidden.save(path)
            return
        with durable.beside(path) as temporary:
            write_tensors(temporary, {str(chunk): hidden for chunk, hidden in enumerate(self.hidden)})
