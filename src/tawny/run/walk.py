"""The one loop over the blocks of a model, forward or backward: load each, let visitors work on it, keep what is finished, drop it.

What is done at a block is said by visitors: they observe, solve, train, measure or write it, in the order they are given in.
A walk promises:

- The weights of one block are in memory at a time, beside what is outside the blocks unless that is dropped.
- Blocks that an earlier, stopped run finished are skipped. Streams stand where it left them, and visitors get back what they
  kept, so that the result has the bytes of a walk that was never stopped.
- The journal names a block only when what visitors made of it is durable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, final

import torch
from torch import Tensor

from tawny.errors import ModelError, NumericalError, first_line
from tawny.model.replay import Call
from tawny.model.stack import Stack
from tawny.model.streams import OnDisk, Samples, Stream
from tawny.run.journal import Journal
from tawny.run.run import Run


@final
@dataclass(frozen=True)
class Block:
    """One loaded block of a walk.

    Attributes:
        streams: the samples before the block, by name; after it once a visitor has advanced them.
        wanted: names of the streams that something receives after the block: of all, or at the end of the walk of those
            whose end is wanted.
    """

    run: Run
    stack: Stack
    index: int
    streams: Mapping[str, Stream]
    wanted: Collection[str]

    @property
    def name(self) -> str:
        return self.stack.name(self.index)


class Visitor(Protocol):
    """What is done at every block of a walk; a visitor defines what it needs of this and leaves the rest."""

    def begin(self, kept: Mapping[str, Any]) -> None:
        """Called before the first block: take up what `keep` gave in the run that is continued; empty in a new one."""
        return

    def around(self, block: Block) -> AbstractContextManager[None]:
        """Entered before any visitor has changed the block, and left after all have visited it, or one has failed."""
        return nullcontext()

    def visit(self, block: Block) -> None:
        """Called after the visitors named before this one have visited the block."""

    def keep(self, blocks: int) -> Mapping[str, Any]:
        """What the journal keeps of the first `blocks` blocks, in JSON types; files that belong to it are durable on return."""
        return {}


def walk(
    run: Run,
    stack: Stack,
    samples: Mapping[str, Samples],
    visitors: Sequence[Visitor],
    *,
    name: str = "",
    phase: str = "",
    ends: Collection[str] = (),
    drop_outside: bool = False,
) -> Mapping[str, Stream]:
    """Let the visitors see every block from first to last.

    Args:
        samples: what goes through the blocks, by name; of several processes each takes its part.
        name: what the journal calls this walk.
        phase: what the progress calls it; steps of "" belong to a phase that has begun before.
        drop_outside: once the samples are embedded, drop what is in no block, such as embeddings, where no block asks for it; it is
            read again when it is needed.
        ends: samples whose hidden states after the last block are wanted; they stay in memory.

    Returns:
        The streams, after the last block where that is wanted. Of a walk that an earlier run finished only those.

    Raises:
        NumericalError: what enters a block is not finite.
    """
    done, kept = run.journal.walk(name)
    count = len(stack)
    with run.clock("forward"):
        streams = {
            key: Stream(
                stack,
                run.ranks.part(given),
                depth=done,
                saved=run.journal.hidden(name, key),
                spill=None if key in ends else run.spill(name, key),
            )
            for key, given in samples.items()
            if done < count or key in ends
        }
    if drop_outside and done < count and all(stream.walks_alone for stream in streams.values()):
        stack.forget_outside()
    for visitor in visitors:
        visitor.begin(kept)
    if phase:
        run.progress.phase(phase, count - done)
    for index in range(done, count):
        wanted = ends if index == count - 1 else samples
        with _at(Block(run, stack, index, streams, wanted), visitors):
            pass
        if index == count - 1 or run.journal.due():
            with run.clock("write"):
                _commit(run, name, index + 1, visitors, {key: streams[key] for key in wanted})
        run.progress.step(stack.name(index))
    return streams


def walk_back(
    run: Run,
    stack: Stack,
    samples: Samples,
    visitors: Sequence[Visitor],
    *,
    end: Callable[[Stream, int], Tensor],
    name: str,
    phase: str,
) -> None:
    """Let the visitors see every block from last to first, while the gradient of what `end` says runs back through it.

    The samples go forward once, and what enters each block is kept, in memory or on disk. A visitor sets hooks `around` a block,
    and takes what these saw when it visits. Weights get no gradients.

    Args:
        end: the gradient `[batch, positions, hidden]` at the last block's outputs, of a chunk of the stream that holds these.
        name: what the journal calls this walk, and what its samples are called.

    Raises:
        ModelError: a block has no gradient.
        NumericalError: a gradient is not finite.
    """
    done, kept = run.journal.walk(name)
    for visitor in visitors:
        visitor.begin(kept)
    left = len(stack) - done
    if not left:
        return
    entering = _Entering(name, left)
    forward = replace(run, journal=Journal(None))
    there = [entering, Advance(name)]
    stream = walk(
        forward,
        stack,
        {name: samples},
        there,
        name=name,
        phase=f"{phase}: forward",
        ends={name},
        drop_outside=True,
    )[name]
    if done:
        stream = Stream(stack, run.ranks.part(samples), depth=left, saved=run.journal.hidden(name, name))
    else:
        run.progress.phase(f"{phase}: head", len(stream), "chunks")
        for chunk in range(len(stream)):
            with run.clock("backward"), _with_gradient(stack, "the head"):
                stream.hidden[chunk] = _finite(end(stream, chunk), "the model's head")
            run.progress.step(f"chunk {chunk}")
        if stream.walks_alone:
            stack.forget_outside()
    run.progress.phase(f"{phase}: backward", left)
    for index in reversed(range(left)):
        with _at(Block(run, stack, index, {name: stream}, {name}), visitors), run.clock("backward"):
            for chunk, hidden in enumerate(entering.of[index]):
                with _with_gradient(stack, stack.name(index)):
                    felt = _back(stack, index, hidden, stream.call(index, chunk), stream.hidden[chunk])
                stream.hidden[chunk] = _finite(felt, stack.name(index))
        stream.depth = index
        entering.drop(index)
        if index == 0 or run.journal.due():
            with run.clock("write"):
                _commit(run, name, len(stack) - index, visitors, {name: stream} if index else {})
        run.progress.step(stack.name(index))


@final
class _Entering(Visitor):
    """Keeps what enters each of the first blocks."""

    def __init__(self, name: str, blocks: int) -> None:
        self.name, self.blocks = name, blocks
        self.of: list[Sequence[Tensor]] = []

    def visit(self, block: Block) -> None:
        if block.index < self.blocks:
            spill = block.run.spill(self.name, f"entering{block.index}")
            self.of.append(block.streams[self.name].kept(spill))

    def drop(self, index: int) -> None:
        hidden = self.of.pop(index)
        if isinstance(hidden, OnDisk) and hidden.path is not None:
            hidden.path.unlink(missing_ok=True)


def _back(stack: Stack, index: int, hidden: Tensor, call: Call, gradient: Tensor) -> Tensor:
    """The gradient at the inputs of a block from that at its outputs."""
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = stack.differentiable(index, leaf.clone(), call)  # a copy, which a block may change in place
    (felt,) = torch.autograd.grad(output, leaf, gradient.to(output.dtype))
    return felt


@contextmanager
def _with_gradient(stack: Stack, where: str) -> Iterator[None]:
    """Inside, what torch cannot differentiate ends in one line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ModelError(
            f"{where} of {type(stack.model).__name__} has no gradient ({first_line(error)}); ask nothing of the output "
            "(-o output=none, another allocator than curves, prune instead of fit)"
        ) from error


def _finite(gradient: Tensor, where: str) -> Tensor:
    if not bool(torch.isfinite(gradient.sum(dtype=torch.float32))):
        raise NumericalError(
            f"the gradient before {where} is NaN or infinite; try compute=float32, or output=none"
        )
    return gradient


@contextmanager
def _at(block: Block, visitors: Sequence[Visitor]) -> Iterator[None]:
    """One block, loaded; inside, what is around it has begun, and at the end it is visited."""
    run, stack, index = block.run, block.stack, block.index
    with ExitStack() as leaving:
        with run.clock("read"):
            stack.load(index)
        leaving.callback(stack.release, index)
        for visitor in visitors:
            leaving.enter_context(visitor.around(block))
        yield
        for visitor in visitors:
            visitor.visit(block)


def _commit(
    run: Run, name: str, blocks: int, visitors: Sequence[Visitor], streams: Mapping[str, Stream]
) -> None:
    if run.journal.folder is None:
        return
    kept: dict[str, Any] = {}
    for visitor in visitors:
        kept |= visitor.keep(blocks)
    run.note_cost()
    run.journal.commit(name, blocks, kept, streams)


@final
class Advance(Visitor):
    """Gives the next block what this one makes of the named streams, unless another visitor has."""

    def __init__(self, *names: str) -> None:
        self.names = names

    def visit(self, block: Block) -> None:
        for name in self.names:
            stream = block.streams.get(name)
            if stream is None or name not in block.wanted or stream.depth > block.index:
                continue
            with block.run.clock("forward"):
                stream.advance(block.index, lambda: block.run.progress.detail("advancing", 0, 0))
