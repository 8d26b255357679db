"""What it costs to store each linear at each level, in nats of the output's divergence.

1. One walk through the dense model rounds a sample of each linear's rows to each kind, and solves it at some sparsities
   without a grid, by the quick solver that the recipe's names. Rows are solved apart from each other, so a sample of them
   tells the error. The whole linear is solved for one kind, the probe.
2. All linears of each block in turn are set to their probes, and all of each role (such as every `q_proj`), and the
   divergence of the output is measured. `reactions` makes each linear's share of it.
3. The head is rounded to each kind, as packing does it, and measured whole.

A level costs the linear's share, times the level's error over that of the probe: for bits the ratio of rounding errors, for
zeros that of solutions, and their sum for both (docs/log/fit.md: how far off that is). Errors of zeros and bits
add up within 2 % (five linears, int4 and 50 %, ALPS). Rounding has the ratios of ALPS within 7 % for int4, 20 % for int2 and 55 %
for int5 (three linears). SparseGPT sees zeros as dearer than ALPS: ALPS has 0.76 of its error on a grid, 0.62 at 50 %.
"""

from __future__ import annotations

__all__ = [
    "KINDS_TRIED",
    "SPARSITIES",
    "TOGETHER",
    "Level",
    "Measures",
    "levels",
    "measure",
    "react",
    "react_head",
]

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tawny.allocation.knapsack import reactions
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError
from tawny.kinds import KINDS, scaled_kinds
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import TensorWriter
from tawny.packed import format
from tawny.packed.choice import Choice
from tawny.pruning.block import LoadedBlock
from tawny.pruning.session import Session
from tawny.pruning.walk import walk_blocks
from tawny.searching.divergence import Divergence, Reference
from tawny.searching.fit_bytes import PackedSize
from tawny.searching.levels import WALK, LevelStore, key_of
from tawny.searching.rehearsal import rehearsing
from tawny.solvers import SOLVERS
from tawny.solvers.base import Solution, on_grid, reconstruction_error

KINDS_TRIED = tuple(sorted((kind.name for kind in scaled_kinds()), key=lambda name: -KINDS[name].bits))
SPARSITIES = (0.0, 0.5, 0.7)  # below, a mask takes more than it saves of any kind but int8
PROBE = "int3"  # far enough from the dense model to be measured, near enough for errors to add up
PROBED = 1  # its number in the store
_ROWS = 96  # of a linear that are solved at each level; up to twice as many where they are few
TOGETHER = 8  # models that go through the blocks together


@dataclass(frozen=True)
class Level:
    """How one linear is stored."""

    sparsity: float
    kind: str


def levels() -> list[Level]:
    """Those that are tried, the same of each linear."""
    return [Level(sparsity, kind) for sparsity in SPARSITIES for kind in KINDS_TRIED]


@dataclass(frozen=True)
class Measures:
    """Relative errors of one linear, on a sample of its rows.

    Attributes:
        bits: by kind, rounded.
        zeros: by sparsity, solved without a grid.
        probe: of the solution that the output's reaction is measured with, on these rows.
        whole: of that solution, on all rows.
    """

    bits: Mapping[str, float]
    zeros: Mapping[str, float]
    probe: float
    whole: float

    def relative(self, level: Level) -> float:
        """The error of a level, as a multiple of the probe's."""
        if self.probe <= 0:
            return 0.0
        zeros = self.zeros[str(level.sparsity)] if level.sparsity else 0.0
        return self.bits[level.kind] / self.bits[PROBE] + zeros / self.probe


def measure(
    session: Session, store: LevelStore, samples: Samples, held_out: Samples
) -> tuple[dict[str, Measures], Tensor]:
    """Step 1, and the probe of step 2 into the store.

    Returns:
        The errors of each linear, and the dense model's `[windows, tokens, hidden]` behind its last block.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    job, journal, stack = session.job, session.journal, session.job.stack
    done, found = journal.walk(WALK)
    errors: dict[str, Any] = found.get("errors", {})
    quick = SOLVERS[job.solver.stand_in]() if job.solver.stand_in else job.solver
    rehearsal = rehearsing(session, samples, journal, quick)
    dense = Stream(stack, held_out, depth=done, saved=journal.hidden(WALK, "held_out"))
    durable_blocks = done

    def commit(blocks: int, streams: Mapping[str, Stream | None]) -> None:
        nonlocal durable_blocks
        if journal.folder is None:
            return
        for path in map(store.path, range(durable_blocks, blocks)):
            with writing(path):
                durable.sync(path)
        durable_blocks = blocks
        session.note_cost()
        journal.commit(WALK, blocks, {"errors": errors}, {**streams, "held_out": dense})

    session.progress.phase("measuring what bits and zeros cost", len(stack) - done)
    for block in walk_blocks(rehearsal, {}, WALK, commit):
        dense.advance(block.index)
        path = store.path(block.index)
        specs = {key_of(linear, PROBED): (store.dtype, linear.shape) for linear in block.linears}
        with writing(path), TensorWriter(path, specs) as writer:
            for stage, statistics in block.stages():
                for linear in stage.linears:
                    errors[linear.name], probe_OI = _solved(block, linear, statistics)
                    writer.write(key_of(linear, PROBED), probe_OI.to(store.dtype).cpu())
        block.advance()
    return {name: Measures(**found) for name, found in errors.items()}, torch.cat(list(dense.hidden))


def _solved(
    block: LoadedBlock, linear: Linear, statistics: Mapping[str, Statistics]
) -> tuple[dict[str, Any], Tensor]:
    """The errors of one linear, and its probe."""
    job, values = block.job, block.job.recipe.values
    W_OI = job.stack.weight(linear)
    known = block.known(linear, statistics.get(linear.name))
    assert known is not None and known.hessian is not None
    H_II = known.hessian
    step = max(1, linear.shape[0] // _ROWS)
    W_RI = W_OI[::step].contiguous()

    def lost(found: Solution) -> float:
        return reconstruction_error(W_RI, found.weight, H_II, lost=found.lost)

    name = linear.name.removeprefix(f"{job.stack.name(block.index)}.")
    block.session.progress.detail(f"solving {name}", 0, 0)
    whole = Solution(W_RI, torch.ones_like(W_RI, dtype=torch.bool))
    bits = {kind: lost(on_grid(whole, values.grid(kind), known)) for kind in KINDS_TRIED}
    zeros = {str(share): lost(block.solution(linear, W_RI, known, share)[0]) for share in SPARSITIES if share}
    block.session.record.values[linear.name] = PROBE  # what a solution is rounded to
    probe_OI = block.solution(linear, W_OI, known, 0.0)[0].weight
    parts = {"probe": reconstruction_error(W_RI, probe_OI[::step], H_II)}
    parts["whole"] = reconstruction_error(W_OI, probe_OI, H_II)
    return {"bits": bits, "zeros": zeros, **parts}, probe_OI


def react(session: Session, divergence: Divergence, measures: Mapping[str, Measures]) -> dict[str, float]:
    """Step 2: what each linear, at its probe, adds to the output's divergence; nats a token."""
    linears = session.job.linears
    block = {x.name: x.block for x in linears}
    role = {x.name: re.sub(r"\d+", "*", x.name) for x in linears}
    sets: dict[tuple[str, Any], tuple[int, ...]] = {}
    for key in dict.fromkeys(("block", each) for each in block.values()):
        sets[key] = tuple(PROBED * (x.block == key[1]) for x in linears)
    for named in dict.fromkeys(("role", each) for each in role.values()):
        sets[named] = tuple(PROBED * (role[x.name] == named[1]) for x in linears)
    order = sorted(set(sets.values()))
    windows = range(len(divergence.held_out))
    parts = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    session.progress.phase("measuring how the output reacts", len(parts), "rounds")
    found: dict[tuple[int, ...], float] = {}
    for number, part in enumerate(parts, 1):
        found |= zip(part, divergence(part, windows), strict=True)
        session.progress.step(f"round {number}")
    known = {key: max(0.0, found[levels]) for key, levels in sets.items()}
    return reactions(
        {name: measured.whole for name, measured in measures.items()},
        block,
        role,
        {each: value for (kind, each), value in known.items() if kind == "block"},
        {each: value for (kind, each), value in known.items() if kind == "role"},
    )


@torch.no_grad()
def react_head(session: Session, size: PackedSize, divergence: Divergence) -> dict[str, float]:
    """Step 3: the divergence with the head (and an embedding that is tied to it) rounded to each kind; nats a token."""
    if size.head is None:
        return {}
    stack, samples = session.job.stack, divergence.held_out
    stack.logits(samples.tokens[:1, :1], divergence.hidden[:1, :1])  # a head of its own is read now
    module = stack.model.get_submodule(size.head)
    W_OI = module.weight.detach()
    rounded = {}
    session.progress.phase("rounding the head", len(KINDS_TRIED), "kinds")
    for kind in KINDS_TRIED:
        rounded[kind] = math.inf  # a model that breaks down is not chosen
        packed = Choice("bf16", head=kind).pack_head(W_OI, size.head)
        made = format.unpack(packed, W_OI.dtype).to(W_OI.device)
        del packed
        with suppress(NumericalError):
            hidden = divergence.hidden
            if size.tied is not None:  # the model reads other embeddings, too
                with _weight(module, made):
                    stream = Stream(stack, samples)
                    for index in range(len(stack)):
                        with stack.block(index):
                            stream.advance(index)
                hidden = torch.cat(list(stream.hidden))
            rounded[kind] = _divergence(session, divergence, hidden, module, made)
        session.progress.step(kind)
    return rounded


def _divergence(
    session: Session, divergence: Divergence, hidden: Tensor, module: torch.nn.Module, made: Tensor
) -> float:
    stack, tokens, total = session.job.stack, divergence.held_out.tokens, 0.0
    mask = divergence.held_out.mask
    counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    for row in range(len(tokens)):
        for some in divergence.parts():
            ids = tokens[row : row + 1, some]
            dense = Reference(stack.logits(ids, divergence.hidden[row, some][None])[0])
            with _weight(module, made):
                lost = dense.divergence(stack.logits(ids, hidden[row, some][None])[0])
            total += float(lost[counted[row, some].to(lost.device)].sum(dtype=torch.float64))
    value = total / max(1, int(counted.sum()))
    return max(0.0, value) if math.isfinite(value) else math.inf


@contextmanager
def _weight(module: torch.nn.Module, made: Tensor) -> Iterator[None]:
    """Inside, a module (and what shares its weight) multiplies by another one."""
    parameter: Any = module.weight
    before = parameter.data
    parameter.data = made
    try:
        yield
    finally:
        parameter.data = before
