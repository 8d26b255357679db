"""What it costs to store each linear at each level, in nats of the output's divergence.

1. One walk through the dense model rounds a sample of each linear's rows to each kind, and removes what Wanda would at some
   sparsities. Rows are rounded apart from each other, so a sample of them tells the error. The whole linear is rounded to one
   kind, the probe.
2. One walk back asks what the output feels of each linear's probe: to second order `½ E[(gᵀ Δ x)²]`, with Δ what rounding
   changed, x the inputs and g the gradient at the outputs (calibration/output.py). Token by token, because at the first
   tokens of a text x and g are both far from usual: `½ tr(G Δ H Δᵀ)` of their means is up to ten times too much.
3. All linears of each role (such as every `q_proj`) are set to their probes, and the divergence of the output is measured:
   large errors, and those of several linears, leave the second order. What is felt shares it out.
4. Head and embedding are rounded to their coarsest kind, as packing does it, and each is measured whole.

A level costs the linear's share, times the level's error over that of the probe; errors of zeros and bits add up. Nothing is
solved here. A solver takes about the same share off all of these errors, and shares are all that choosing needs
(docs/log/fit.md: how far off that is).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from tawny.calibration.output import watch_gradients
from tawny.calibration.statistics import Statistics
from tawny.choosing.demand import role_of
from tawny.choosing.divergence import Scorer
from tawny.choosing.level import PROBE, Measures
from tawny.choosing.rehearsal import HELD_OUT, rehearsing
from tawny.choosing.sizes import Sizes
from tawny.choosing.solving import WALK, LevelStore, key_of, level_dtype
from tawny.errors import NumericalError
from tawny.evaluation.hidden_states import stream_through
from tawny.kinds import KINDS, solved_kind
from tawny.model.durable import writing
from tawny.model.linears import Linear
from tawny.model.streams import Samples
from tawny.model.tensorfile import TensorWriter
from tawny.progress import silent
from tawny.pruning.block import PRUNED, PrunedBlock
from tawny.pruning.output import End
from tawny.pruning.prepare import Job
from tawny.pruning.session import Session
from tawny.pruning.visitors import samples_of
from tawny.run.walk import Advance, Block, Visitor, walk, walk_back
from tawny.solvers.base import Solution, energy, on_grid, reconstruction_error
from tawny.solvers.grid import Grid, ScaledGrid, largest
from tawny.solvers.wanda import Wanda

Felt = tuple[float, int]  # nats a token, and how many of the tokens the linear multiplied

PROBED = 1  # its number in the store
ASKING = "asking"  # what the journal calls the walk back
_FEW_BITS = 20  # different values of 32 neighbours; weights that were never rounded have nearly 32
_ROWS = 96  # of a linear that are solved at each level; up to twice as many where they are few
_END_ROWS = 4096  # of a head or an embedding that tell the errors of its kinds
_LARGE = 0.5  # nats from which a divergence follows the squared error no more
_APART = 96  # times the smallest group of a row: 2⁷ is what eight bits hold, and a solve moves scales
_FEW_TOKENS = 32  # what is usual in a role counts for so many, where a linear, such as an expert, saw few


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
    session: Session, sizes: Sizes, store: LevelStore, samples: Samples, held_out: Samples
) -> tuple[dict[str, Measures], Tensor]:
    """Step 1, and the probes into the store.

    Returns:
        The errors of each linear, and the dense model's `[windows, tokens, hidden]` after its last block.

    Raises:
        NumericalError: a weight or an activation is not finite; names the linear.
    """
    rehearsal = rehearsing(session, samples)
    given = {**samples_of(rehearsal), HELD_OUT: held_out}
    rounding = _Round(rehearsal, sizes, store)
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

    def __init__(self, session: Session, sizes: Sizes, store: LevelStore) -> None:
        self.session, self.sizes, self.store = session, sizes, store
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
                    self.errors[linear.name], probe_OI = _rounded(dense, self.sizes, linear, statistics)
                    writer.write(key_of(linear, PROBED), probe_OI.to(store.dtype).cpu())


def _rounded(
    block: PrunedBlock, sizes: Sizes, linear: Linear, statistics: Mapping[str, Statistics]
) -> tuple[dict[str, Any], Tensor]:
    """The errors of one linear, and its probe."""
    job = block.job
    W_OI = job.stack.weight(linear)
    known = block.known(linear, statistics.get(linear.name), None)
    assert known is not None and known.hessian is not None
    H_II = known.hessian
    W_RI = W_OI[:: max(1, linear.shape[0] // _ROWS)].contiguous()

    def rounded(W: Tensor, grid: Grid) -> Tensor:
        kept = torch.ones_like(W, dtype=torch.bool)
        return on_grid(Solution(W, kept), grid.suiting(W_OI), known).weight

    block.session.run.progress.detail(f"rounding {linear.name}", 0, 0)
    bits = dict.fromkeys(sizes.every, 0.0)  # of floats, which stay as they are
    rounds = {}
    probe = ScaledGrid(KINDS[PROBE].grid, KINDS[PROBE].span(None))
    grids = {kind: sizes.grid(kind, linear.shape[1]) for kind in sizes.every if solved_kind(kind).scaled} | {
        PROBE: probe
    }
    whole = energy(W_RI, H_II)
    for kind, grid in grids.items():
        rounded_RI = rounded(W_RI, grid)
        bits[kind] = reconstruction_error(W_RI, rounded_RI, H_II, whole=whole)
        rounds[kind] = float((rounded_RI == 0).float().mean())
    zeros = {
        str(share): reconstruction_error(W_RI, Wanda().solve(W_RI, known, job.pattern, share).weight, H_II)
        for share in sizes.sparsities
        if share
    }
    probe_OI = rounded(W_OI, probe)
    had = int((W_OI == 0).sum())
    probe = probe.suiting(W_OI)
    ends_OS = largest(W_OI, probe).abs()
    low_O = ends_OS.where(ends_OS > 0, torch.inf).amin(1)
    far = probe.long or bool((ends_OS.amax(1) > _APART * low_O).any())
    return {"bits": bits, "zeros": zeros, "had": had, "far": far, "rounds": rounds}, probe_OI


def ask(session: Session, store: LevelStore, asked: Samples) -> dict[str, Felt]:
    """Step 2: what the output feels of each linear at its probe."""
    stack, asking = session.job.stack, _Ask(session.job, store, asked.tokens.numel())
    end, phase = End(session, asked), "asking the output"
    walk_back(session.run, stack, asked, [asking], end=end, name=ASKING, phase=phase)
    return asking.felt


@final
class _Ask(Visitor):
    """Adds up ½ (gᵀ Δ x)² of every linear, over the tokens that are asked on."""

    def __init__(self, job: Job, store: LevelStore, tokens: int) -> None:
        self.job, self.store, self.tokens = job, store, tokens
        self.felt: dict[str, Felt] = {}

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.felt = dict(kept.get("felt", {}))

    def keep(self, blocks: int) -> Mapping[str, Any]:
        return {"felt": self.felt}

    @contextmanager
    def around(self, block: Block) -> Iterator[None]:
        linears, add = self.job.by_block[block.index], {}
        self.store.open(block.index)
        for linear in linears:
            W_OI, probe_OI = block.stack.weight(linear), self.store.read(linear, PROBED)
            assert probe_OI is not None
            D_OI = (W_OI - probe_OI.to(W_OI)).to(block.stack.compute)
            self.felt[linear.name], add[linear.name] = (0.0, 0), partial(self._add, linear.name, D_OI)
        with watch_gradients(linears, add, block.streams[ASKING]):
            yield

    def visit(self, block: Block) -> None:
        """All is added up while the gradient runs back."""

    def _add(self, name: str, D_OI: Tensor, g_TO: Tensor, x_TI: Tensor) -> None:
        lost_TO = x_TI.to(D_OI.dtype) @ D_OI.T
        squares_T = torch.linalg.vecdot(g_TO.float(), lost_TO.float()).double().square()
        nats, tokens = self.felt[name]
        self.felt[name] = nats + 0.5 * float(squares_T.sum()) / self.tokens, tokens + len(g_TO)


def react(session: Session, scorer: Scorer, felt: Mapping[str, Felt]) -> dict[str, float]:
    """Step 3: what each linear, at its probe, adds to the output's divergence; nats a token."""
    roles = [role_of(x.name) for x in session.job.linears]
    sets = {role: tuple(PROBED * (own == role) for own in roles) for role in roles}
    session.run.progress.phase("measuring how the output reacts", 1, "round")
    lost = scorer([*sets.values()], range(len(scorer.held_out)))
    session.run.progress.step("all roles")
    return in_nats(felt, dict(zip(sets, lost, strict=True)))


def in_nats(felt: Mapping[str, Felt], lost: Mapping[str, float]) -> dict[str, float]:
    """What each linear, at its probe, adds to the output's divergence: of what its role loses the share that is felt of it.

    Args:
        lost: by role, the divergence with all of its linears at their probes, in nats a token; infinite where the model broke down.
    """
    # A model that broke down is far worse than any that did not, and shares cannot be of infinity.
    worst = 10 * max([1.0, *filter(math.isfinite, lost.values())])
    by_role: dict[str, dict[str, Felt]] = {}
    for name, each in felt.items():
        by_role.setdefault(role_of(name), {})[name] = each
    reactions: dict[str, float] = {}
    for role, members in by_role.items():
        usual = math.fsum(nats for nats, _ in members.values()) / len(members)
        shares = {
            name: (nats * tokens + usual * _FEW_TOKENS) / (tokens + _FEW_TOKENS)
            for name, (nats, tokens) in members.items()
        }
        total = math.fsum(shares.values())
        nats = max(0.0, lost[role]) if math.isfinite(lost[role]) else worst
        reactions |= {name: nats * share / total if total > 0 else 0.0 for name, share in shares.items()}
    return reactions


@torch.no_grad()
def react_ends(session: Session, size: Sizes, scorer: Scorer) -> dict[str, dict[str, float]]:
    """Step 4: the divergence with the head rounded to each kind, and with an embedding of its own; nats a token.

    The coarsest kind is measured, whose loss stands out from the rounding of forwards, and while it is large the next finer one.
    Kinds finer than these cost their share of the last one's squared error.
    A kind of the `head` is that of an embedding which is tied to it, too.
    """
    stack, samples = session.job.stack, scorer.held_out
    lost: dict[str, dict[str, float]] = {"head": {}, "embedding": {}}
    ends = {"head": size.head, "embedding": size.embedding}
    named = {end: name for end, name in ends.items() if name is not None and size.every_end}
    if not named:
        return lost
    session.run.progress.phase("rounding head and embedding", len(named), "matrices")
    stack.logits(samples.tokens[:1, :1], scorer.hidden[:1, :1])  # a head of its own is read now
    for end, name in named.items():
        module: Any = stack.model.get_submodule(name)
        W = module.weight.detach()
        some = W[:: max(1, len(W) // _END_ROWS)].contiguous()
        errors = {
            kind: float((size.rounded_end(some, kind, name).float() - some.float()).square().sum())
            for kind in size.every_end
        }
        lost[end] = dict.fromkeys(errors, math.inf)  # a model that breaks down is not chosen
        for probe in sorted(errors, key=errors.__getitem__, reverse=True):
            with suppress(NumericalError):
                rounded = size.rounded_end(W, probe, name)
                tied = end == "embedding" or size.tied
                hidden = _through(session, samples, size.tied or name, rounded) if tied else scorer.hidden
                head = partial(_weight, module, rounded) if end == "head" else nullcontext
                nats = max(0.0, scorer.of_hidden(hidden, head))
                lost[end][probe] = nats
                if nats < _LARGE:
                    by = nats / errors[probe] if errors[probe] else 0.0
                    lost[end] |= {
                        kind: by * error for kind, error in errors.items() if error <= errors[probe]
                    }
                    break
        session.run.progress.step(end)
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
