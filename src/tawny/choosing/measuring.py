"""What it costs to store each linear at each level, in nats of the output's divergence.

1. One walk through the dense model rounds a sample of each linear's rows to each kind, and removes what Wanda would at some
   sparsities. Rows are rounded apart from each other, so a sample of them tells the error. The whole linear is rounded to one
   kind, the probe.
2. All linears of each block in turn are set to their probes, and all of each role (such as every `q_proj`), and the
   divergence of the output is measured. `reactions` makes each linear's share of it. Linears whose error is far from that of
   their role are measured alone: where a few huge activations are most of an output, a small relative error loses much.
3. Head and embedding are rounded to each kind, as packing does it, and each is measured whole.

A level costs the linear's share, times the level's error over that of the probe; errors of zeros and bits add up. Nothing is
solved here. A solver takes about the same share off all of these errors, and shares are all that choosing needs
(docs/log/fit.md: how far off that is).
"""

from __future__ import annotations

__all__ = ["far_from_role", "few_bits", "measure", "probes_bytes", "react", "react_ends"]

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from statistics import median
from typing import Any, final

import torch
from torch import Tensor

from tawny.allocation.knapsack import reactions
from tawny.calibration.statistics import Statistics
from tawny.choosing.demand import TOGETHER
from tawny.choosing.divergence import Scorer
from tawny.choosing.level import KINDS_TRIED, PROBE, SPARSITIES, Measures
from tawny.choosing.packed_size import PackedSize
from tawny.choosing.rehearsal import HELD_OUT, rehearsing
from tawny.choosing.solving import WALK, LevelStore, key_of, level_dtype
from tawny.errors import NumericalError
from tawny.evaluation.hidden_states import stream_through
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.streams import Samples
from tawny.model.tensorfile import TensorWriter
from tawny.packed import format
from tawny.packed.choice import pack_end
from tawny.progress import silent
from tawny.pruning.block import PRUNED, PrunedBlock
from tawny.pruning.prepare import Job
from tawny.pruning.session import Session
from tawny.pruning.visitors import samples_of
from tawny.run.walk import Advance, Block, Visitor, walk
from tawny.solvers.base import Solution, on_grid, reconstruction_error
from tawny.solvers.grid import largest
from tawny.solvers.wanda import Wanda

PROBED = 1  # its number in the store
_FEW_BITS = 20  # different values of 32 neighbours; weights that were never rounded have nearly 32
_ROWS = 96  # of a linear that are solved at each level; up to twice as many where they are few
_APART = 96  # times the smallest group of a row: 2⁷ is what eight bits hold, and a solve moves scales
_FAR = 4  # times the median error of its role, or a share of it


def few_bits(job: Job) -> str:
    """A warning, or "": the source is itself a model of few bits that was made dense."""
    first = next(index for index, linears in enumerate(job.by_block) if linears)
    with job.stack.block(first):
        W_OI = job.stack.look(job.by_block[first][0])[:64]
        columns = W_OI.shape[1] // 32 * 32
        values = W_OI[:, :columns].reshape(-1, 32)
        survivors = [part for part in (part[part != 0] for part in values) if len(part)]
        different = [32 * len(torch.unique(part)) / len(part) for part in survivors] or [32]
    if sum(different) / len(different) > _FEW_BITS:
        return ""
    return f"the weights of {job.source} were rounded to few bits before: compare with keeping the file that they came from"


def probes_bytes(job: Job) -> int:
    """Of one rounding of every linear."""
    return sum(x.numel for x in job.linears) * level_dtype(job.stack).itemsize


def measure(
    session: Session, store: LevelStore, samples: Samples, held_out: Samples
) -> tuple[dict[str, Measures], Tensor]:
    """Step 1, and the probe of step 2 into the store.

    Returns:
        The errors of each linear, and the dense model's `[windows, tokens, hidden]` after its last block.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    rehearsal = rehearsing(session, samples)
    given = {**samples_of(rehearsal), HELD_OUT: held_out}
    rounding = _Round(rehearsal, store)
    streams = walk(
        session.run,
        session.job.stack,
        given,
        [Advance(HELD_OUT), rounding, Advance(PRUNED)],
        name=WALK,
        phase="measuring what bits and zeros cost",
        ends=[HELD_OUT],
        drop_outside=True,
    )
    measures = {name: Measures(**errors) for name, errors in rounding.errors.items()}
    return measures, torch.cat(list(streams[HELD_OUT].hidden))


@final
class _Round(Visitor):
    """Measures the errors of each linear, and puts its probe into the store; blocks stay dense."""

    def __init__(self, session: Session, store: LevelStore) -> None:
        self.session, self.store = session, store
        self.errors: dict[str, Any] = {}

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.errors = dict(kept.get("errors", {}))

    def keep(self, blocks: int) -> Mapping[str, Any]:
        self.store.settle(blocks)
        return {"errors": self.errors}

    def visit(self, block: Block) -> None:
        dense, store = PrunedBlock(self.session, block, {}), self.store
        path = store.path(block.index)
        specs = {key_of(linear, PROBED): (store.dtype, linear.shape) for linear in dense.linears}
        with writing(path), TensorWriter(path, specs) as writer:
            for stage, statistics in dense.stages():
                for linear in stage.linears:
                    self.errors[linear.name], probe_OI = _rounded(dense, linear, statistics)
                    writer.write(key_of(linear, PROBED), probe_OI.to(store.dtype).cpu())


def _rounded(
    block: PrunedBlock, linear: Linear, statistics: Mapping[str, Statistics]
) -> tuple[dict[str, Any], Tensor]:
    """The errors of one linear, and its probe."""
    job, values = block.job, block.job.recipe.values
    W_OI = job.stack.weight(linear)
    known = block.known(linear, statistics.get(linear.name))
    assert known is not None and known.hessian is not None
    H_II = known.hessian
    W_RI = W_OI[:: max(1, linear.shape[0] // _ROWS)].contiguous()

    def rounded(W: Tensor, kind: str) -> Tensor:
        kept = torch.ones_like(W, dtype=torch.bool)
        return on_grid(Solution(W, kept), values.grid(kind).suiting(W_OI), known).weight

    block.session.run.progress.detail(f"rounding {linear.name}", 0, 0)
    bits, rounds = {}, {}
    for kind in KINDS_TRIED:
        rounded_RI = rounded(W_RI, kind)
        bits[kind] = reconstruction_error(W_RI, rounded_RI, H_II)
        rounds[kind] = float((rounded_RI == 0).float().mean())
    zeros = {
        str(share): reconstruction_error(W_RI, Wanda().solve(W_RI, known, job.pattern, share).weight, H_II)
        for share in SPARSITIES
        if share
    }
    probe_OI = rounded(W_OI, PROBE)
    whole, had = reconstruction_error(W_OI, probe_OI, H_II), int((W_OI == 0).sum())
    grid = values.grid(PROBE).suiting(W_OI)
    ends_OS = largest(W_OI, grid).abs()
    low_O = ends_OS.where(ends_OS > 0, torch.inf).amin(1)
    far = grid.long or bool((ends_OS.amax(1) > _APART * low_O).any())
    facts = {"bits": bits, "zeros": zeros, "whole": whole, "had": had, "far": far, "rounds": rounds}
    return facts, probe_OI


def react(session: Session, scorer: Scorer, measures: Mapping[str, Measures]) -> dict[str, float]:
    """Step 2: what each linear, at its probe, adds to the output's divergence; nats a token."""
    linears = session.job.linears
    block = {x.name: x.block for x in linears}
    role = {x.name: re.sub(r"\d+", "*", x.name) for x in linears}
    sets: dict[tuple[str, Any], tuple[int, ...]] = {}
    alone = far_from_role({name: measured.whole for name, measured in measures.items()}, role)
    for key in dict.fromkeys(("block", each) for each in block.values()):
        sets[key] = tuple(PROBED * (x.block == key[1] and x.name not in alone) for x in linears)
    for named in dict.fromkeys(("role", each) for each in role.values()):
        sets[named] = tuple(PROBED * (role[x.name] == named[1] and x.name not in alone) for x in linears)
    for name in alone:
        sets["linear", name] = tuple(PROBED * (x.name == name) for x in linears)
    order = sorted(set(sets.values()))
    windows = range(len(scorer.held_out))
    parts = [order[start : start + TOGETHER] for start in range(0, len(order), TOGETHER)]
    session.run.progress.phase("measuring how the output reacts", len(parts), "rounds")
    score: dict[tuple[int, ...], float] = {}
    for number, part in enumerate(parts, 1):
        score |= zip(part, scorer(part, windows), strict=True)
        session.run.progress.step(f"round {number}")
    # A model that broke down is far worse than any that did not, and shares cannot be of infinity.
    most = max((value for value in score.values() if math.isfinite(value)), default=1.0)
    known = {
        key: max(0.0, score[levels]) if math.isfinite(score[levels]) else 10 * max(1.0, most)
        for key, levels in sets.items()
    }
    own = {name: known["linear", name] for name in alone}
    others = reactions(
        {name: measured.whole for name, measured in measures.items() if name not in own},
        block,
        role,
        {each: value for (kind, each), value in known.items() if kind == "block"},
        {each: value for (kind, each), value in known.items() if kind == "role"},
    )
    return {x.name: own.get(x.name, others.get(x.name, 0.0)) for x in linears}


def far_from_role(errors: Mapping[str, float], role: Mapping[str, str]) -> list[str]:
    """The linears whose errors are far from the median of their role, the farthest first; not more than go together."""
    of_role: dict[str, list[float]] = {}
    for name, error in errors.items():
        of_role.setdefault(role[name], []).append(error)
    usual = {each: median(own) for each, own in of_role.items()}
    far = {
        name: abs(math.log(error / usual[role[name]]))
        for name, error in errors.items()
        if error > 0 and usual[role[name]] > 0
    }
    order = sorted(far, key=lambda name: -far[name])
    return [name for name in order if far[name] > math.log(_FAR)][:TOGETHER]


@torch.no_grad()
def react_ends(session: Session, size: PackedSize, scorer: Scorer) -> dict[str, dict[str, float]]:
    """Step 3: the divergence with the head rounded to each kind, and with an embedding of its own; nats a token.

    A kind of the `head` is that of an embedding which is tied to it, too.
    """
    stack, samples = session.job.stack, scorer.held_out
    lost: dict[str, dict[str, float]] = {"head": {}, "embedding": {}}
    names = {"head": size.head, "embedding": size.embedding}
    kinds = len(KINDS_TRIED) * sum(name is not None for name in names.values())
    session.run.progress.phase("rounding head and embedding", kinds, "kinds")
    stack.logits(samples.tokens[:1, :1], scorer.hidden[:1, :1])  # a head of its own is read now
    for end, name in names.items():
        module: Any = None if name is None else stack.model.get_submodule(name)
        for kind in () if module is None else KINDS_TRIED:
            lost[end][kind] = math.inf  # a model that breaks down is not chosen
            with suppress(NumericalError):
                W = module.weight.detach()
                rounded = format.unpack(pack_end(W, kind, str(name)), W.dtype).to(W.device)
                hidden = scorer.hidden
                if end == "embedding" or size.tied:
                    hidden = _through(session, samples, size.tied or name, rounded)
                head = partial(_weight, module, rounded) if end == "head" else nullcontext
                lost[end][kind] = max(0.0, scorer.of_hidden(hidden, head))
            session.run.progress.step(f"{end} {kind}")
    return lost


def _through(session: Session, samples: Samples, embedding: str | None, weight: Tensor) -> Tensor:
    """`[windows, tokens, hidden]` after the last block with another embedding."""
    stack = session.job.stack
    with _weight(stack.model.get_submodule(str(embedding)), weight):
        stream = stream_through(stack, samples, silent, "")
    return torch.cat(list(stream.hidden))


@contextmanager
def _weight(module: torch.nn.Module, weight: Tensor) -> Iterator[None]:
    """Inside, a module (and what shares its weight) multiplies by another one."""
    parameter: Any = module.weight
    before = parameter.data
    parameter.data = weight
    try:
        yield
    finally:
        parameter.data = before
