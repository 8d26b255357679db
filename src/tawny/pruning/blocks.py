"""Whole blocks leave: which ones, and what that makes of them.

The stack is the one coupling here and its blocks are the members, so there is nothing to share among blocks: the solver ranks
them. A block that leaves has only zero linears and is an identity, because it adds to the hidden states what its output
projections make. So the checkpoint keeps its shapes, and `tawny slim` cuts such blocks out. That a block without its
linears is an identity is proven by a forward.

Candidates share a walk: what the model does without block i is the same up to block i. So n candidates cost n/2 forwards,
and as many hidden states, of the few tokens that the solver looks at.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from typing import Any, final

import torch
from torch import Tensor

from tawny.allocation.profile import Allocation
from tawny.errors import ModelError, NumericalError, RecipeError
from tawny.model.couplings import probe_of
from tawny.model.stack import Stack
from tawny.model.streams import Stream
from tawny.model.structure import TOKENS, head_of, input_of
from tawny.progress import Within
from tawny.pruning.block import PRUNED, PrunedBlock
from tawny.pruning.session import Session
from tawny.run.journal import BLOCKS
from tawny.run.memory import LOGIT_BYTES
from tawny.run.run import Run
from tawny.run.walk import Block, Visitor, walk
from tawny.solvers.base import BlockSolver


def choose_blocks(session: Session) -> Allocation:
    """Sparsity 1 for the linears of the blocks that leave, 0 for the others: as near to the budget as whole blocks come.

    Raises:
        RecipeError: no block would be left, or the solver compares what the model does not give.
    """
    job, journal = session.job, session.run.journal
    if job.block_solver.compares == "logits" and not _says_words(job.stack):
        raise RecipeError(
            f"solver {job.recipe.solver.name} compares what a model says of each token, and {type(job.stack.model).__name__} says "
            "nothing of tokens: choose --solver influence"
        )
    sizes = {i: sum(x.numel for x in linears) for i, linears in enumerate(job.by_block) if linears}
    wanted = job.recipe.sparsity * sum(sizes.values())
    most = sum(sizes.values()) - min(sizes.values())
    if wanted > most + min(sizes.values()) / 2:
        raise RecipeError(
            f"sparsity {job.recipe.sparsity:g} leaves no block; of {len(sizes)} blocks one stays, so the most that is possible is "
            f"{math.floor(most / sum(sizes.values()) * 1e4) / 1e4:g}"
        )
    _, state = journal.walk(BLOCKS)
    state = state or {"gone": [], "scores": [], "over": False}
    session.run.progress.phase(
        "choosing blocks", max(1, round(wanted / max(sizes.values())) - len(state["gone"]))
    )
    while not state["over"]:
        state = session.run.ranks.same(
            _next(session, sizes, wanted, state) if session.run.ranks.first else {}
        )
        journal.commit(BLOCKS, len(state["gone"]), state, {})
        if not state["over"]:
            session.run.progress.step(job.stack.name(state["gone"][-1]))
    gone = set(state["gone"])
    return {x.name: float(i in gone) for i, linears in enumerate(job.by_block) for x in linears}


def _says_words(stack: Stack) -> bool:
    """Whether the model reads tokens and gives logits for each."""
    return input_of(stack.model) == TOKENS and head_of(stack.model) is not None


def _next(session: Session, sizes: dict[int, int], wanted: float, found: dict[str, Any]) -> dict[str, Any]:
    """What was found, with one more block that leaves; or that enough have left."""
    solver, gone, scores = session.job.block_solver, list(found["gone"]), dict(found["scores"])
    stay, left = sizes.keys() - set(gone), wanted - sum(sizes[index] for index in gone)
    over = {**found, "over": True}
    if len(stay) == 1 or left < min(sizes[index] for index in stay) / 2:
        return over
    order = sorted(stay, key=lambda index: (scores.get(index, 0.0), index))
    # Larger ones would take the model farther past the budget than it is before it.
    small = [index for index in order if left >= sizes[index] / 2]
    if not scores:
        scores |= _apart(session, gone, order)
    elif solver.again:
        small = small[: solver.again]
        scores |= _apart(session, gone, small)
    best = min(small, key=lambda index: (scores[index], index))
    return {"gone": [*gone, best], "scores": sorted(map(list, scores.items())), "over": False}


def _apart(session: Session, gone: Collection[int], candidates: Collection[int]) -> dict[int, float]:
    """What the model without the blocks that are gone loses where each of the candidates leaves, too."""
    stack, solver = session.job.stack, session.job.block_solver
    assert session.samples is not None
    samples = session.samples.first(math.ceil(solver.tokens / session.samples.seqlen))
    leaving = _Leave(solver, gone, candidates)
    run = Run.unkept(Within(session.run.progress))
    stream = walk(run, stack, {PRUNED: samples}, [leaving], phase="trying without each block")[PRUNED]
    scores = leaving.apart
    for index, hidden in leaving.without.items():
        scores[index] = _mean(stream, solver, leaving.dense, hidden, stack)
    if bad := [index for index, value in scores.items() if not math.isfinite(value)]:
        raise NumericalError(
            f"without block {stack.name(bad[0])} the model gives NaN or infinite activations"
        )
    return scores


@final
class _Leave(Visitor):
    """Takes samples through a model without some blocks, and without each of the candidates.

    Attributes:
        apart: of each candidate what its own block's output loses, where the solver compares that.
        dense, without: else hidden states of the whole model, and without each candidate, a chunk each.
    """

    def __init__(self, solver: BlockSolver, gone: Collection[int], candidates: Collection[int]) -> None:
        self.solver, self.gone, self.candidates = solver, gone, candidates
        self.apart: dict[int, float] = {}
        self.dense: list[Tensor] = []
        self.without: dict[int, list[Tensor]] = {}

    def visit(self, block: Block) -> None:
        stream, index, logits = block.streams[PRUNED], block.index, self.solver.compares == "logits"
        if logits:
            self.dense = _through(stream, index, self.dense or list(stream.hidden))
        passed_on = _onward(stream, index)
        if index in self.gone:
            stream.hidden = passed_on
            return
        self.without = {other: _through(stream, index, hidden) for other, hidden in self.without.items()}
        stream.advance(index)
        if index in self.candidates and logits:
            self.without[index] = passed_on
        elif index in self.candidates:
            self.apart[index] = _mean(stream, self.solver, list(stream.hidden), passed_on)


def _through(stream: Stream, index: int, hidden: list[Tensor]) -> list[Tensor]:
    """Outputs of a loaded block, a chunk each; what went in is kept by whoever still needs it."""
    return [stream.stack.forward(index, one.clone(), stream.call(index, c)) for c, one in enumerate(hidden)]


def _onward(stream: Stream, index: int) -> list[Tensor]:
    """What comes after block `index` if it passes on what it receives, a chunk each, in memory of its own."""
    return [stream.stack.onward(one.clone(), stream.call(index, c)) for c, one in enumerate(stream.hidden)]


def _mean(
    stream: Stream,
    solver: BlockSolver,
    with_: list[Tensor],
    without: list[Tensor],
    tail: Stack | None = None,
) -> float:
    """The mean over all tokens that are not masked; of logits where a `tail` makes them from hidden states."""
    samples = stream.samples
    step = samples.seqlen
    if tail is not None:
        step = max(16, LOGIT_BYTES // 4 // int(tail.config.get_text_config().vocab_size))
    total, count = 0.0, 0
    for chunk, part in enumerate(stream.slices):
        valid_BT = stream.valid(chunk)
        for row in range(part.stop - part.start):
            for start in range(0, samples.seqlen, step):
                here = slice(start, start + step)
                pair = [hidden[chunk][row : row + 1, here] for hidden in (with_, without)]
                if tail is not None:
                    ids = samples.tokens[part][row : row + 1, here]
                    pair = [tail.logits(ids, one) for one in pair]
                apart_T = solver.apart(pair[0][0], pair[1][0])
                if valid_BT is not None:
                    apart_T = apart_T[valid_BT[row, here].to(apart_T.device)]
                total, count = total + float(apart_T.sum(dtype=torch.float64)), count + len(apart_T)
    return total / max(count, 1)


def remove_block(block: PrunedBlock) -> None:
    """Write zeros where the allocation says that a block leaves, and record what became of every linear.

    Raises:
        ModelError: without its linears the block still changes what passes through it.
    """
    stack, index = block.job.stack, block.index
    for linear in block.linears:
        start, leaves = time.perf_counter(), block.allocation[linear.name] == 1
        if leaves and (bias_O := stack.bias(linear)) is not None:
            stack.set_bias(linear, bias_O.zero_())
        weight_OI = torch.zeros(linear.shape, device=stack.device) if leaves else stack.weight(linear)
        block.put(linear, weight_OI, "blocks", (float(leaves), "weights"), time.perf_counter() - start, {})
    if block.leaves and not _passes_on(stack, index):
        raise ModelError(
            f"{stack.name(index)} of {type(stack.model).__name__} changes what passes through it without its linears, too, so it cannot "
            "leave: choose another pattern"
        )


def _passes_on(stack: Stack, index: int) -> bool:
    """Whether a loaded block passes on what it receives."""
    call = stack.calls(probe_of(stack))[index]
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(call.shape, generator=random).to(stack.device, stack.compute)
    return torch.equal(stack.alone(index, hidden.clone(), call), hidden)
