"""Open the model that a recipe is for, choose its linears, refuse what cannot be, and say what it asks of memory.

`plan`, `prune`, `profile` and `search` start here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from tawny.allocation.profile import Allocator, LinearInfo
from tawny.calibration.output import Factor, most_felt
from tawny.calibration.statistics import Needs
from tawny.errors import ModelError, RecipeError
from tawny.gguf_kinds import GGUF_KINDS, fitting
from tawny.kinds import GPU_KINDS, dividing
from tawny.model.biases import bias_settings
from tawny.model.checkpoint import file_bytes, is_packed
from tawny.model.couplings import Coupling, couple, some_tokens
from tawny.model.linears import Linear, check_selection, check_writable, select
from tawny.model.mixtures import Mixture, find_mixtures
from tawny.model.source import resolve
from tawny.model.stack import Stack, live_stack
from tawny.model.streams import CHUNK_TOKENS
from tawny.model.structure import TOKENS, adapters, input_of, predicts_tokens, staying_dense
from tawny.packed.install import check_ends
from tawny.packed.linear import PackedLinear
from tawny.packed.opening import open_stack
from tawny.patterns import (
    NM,
    AnyPattern,
    Blocks,
    Experts,
    Members,
    Pattern,
    Rank,
    Unstructured,
    check_pattern,
)
from tawny.precision import compute_dtype
from tawny.progress import Progress
from tawny.recipe.schema import Recipe
from tawny.run.memory import Demand, Load
from tawny.solvers.base import BlockSolver, Solver
from tawny.solvers.experts import ExpertSolver
from tawny.solvers.members import MemberSolver
from tawny.words import size

# Tokens after which the outlier shares of a model no longer move its sparsities by more than 0.005.
PROFILE_TOKENS = 8192
_TILE = (64, 128)  # outputs and inputs that vLLM's Marlin kernels take at once


@dataclass(frozen=True)
class Job:
    """What a recipe asks of one model.

    Attributes:
        source: the model as it was named.
        folder: where its files are; None for a live module.
        by_block: the linears to prune, block by block.
        budget_pattern: what the budget is spent in.
        couplings: what their members belong to, block by block; empty where single weights go.
        mixtures: of which whole experts leave, block by block; empty where others go, None where a block keeps all.
        settings: what config.json will say otherwise, so that there are biases to compensate with.
    """

    recipe: Recipe
    source: str
    folder: Path | None
    stack: Stack
    by_block: Sequence[Sequence[Linear]]
    budget_pattern: AnyPattern
    allocator: Allocator
    solver: Solver | MemberSolver | BlockSolver | ExpertSolver
    couplings: Sequence[Sequence[Coupling]] = ()
    mixtures: Sequence[Mixture | None] = ()
    settings: Mapping[str, bool] = field(default_factory=dict)

    @property
    def pattern(self) -> Pattern:
        """Which single weights may go.

        Raises:
            RecipeError: the recipe removes whole members, experts or blocks.
        """
        if isinstance(self.budget_pattern, Members | Blocks | Experts):
            raise RecipeError(
                f"this is done with single weights, and pattern {self.budget_pattern} removes none: choose another pattern"
            )
        # A solver of low rank goes by the share alone.
        return Unstructured() if isinstance(self.budget_pattern, Rank) else self.budget_pattern

    @property
    def weight_solver(self) -> Solver:
        """The solver of single weights."""
        assert not self.couplings
        return cast(Solver, self.solver)

    @property
    def member_solver(self) -> MemberSolver:
        """The solver of whole members."""
        assert self.couplings
        return cast(MemberSolver, self.solver)

    @property
    def block_solver(self) -> BlockSolver:
        """The solver of whole blocks."""
        assert self.removes_blocks
        return cast(BlockSolver, self.solver)

    @property
    def expert_solver(self) -> ExpertSolver:
        """The solver of whole experts."""
        assert self.mixtures
        return cast(ExpertSolver, self.solver)

    @property
    def limits(self) -> dict[str, tuple[int, int]]:
        """Of each mixture, by name, how many experts leave at once, and how many stay at least."""
        return {m.name: (m.groups, m.least) for m in self.mixtures if m is not None}

    @property
    def removes_blocks(self) -> bool:
        return isinstance(self.budget_pattern, Blocks)

    @property
    def chooses_blocks(self) -> bool:
        """Whether the solver decides which blocks leave; otherwise an allocation file has."""
        return self.removes_blocks and not self.allocator.as_given

    @property
    def needs(self) -> Needs:
        """What calibration has to yield for the solves."""
        return "hessian" if self.recipe.refit else self.solver.needs

    @property
    def factor(self) -> Factor:
        """What is asked of the output: for the solves, and for what the allocator measures."""
        return most_felt([self.recipe.output.factor or "none", self.allocator.output])

    @property
    def needs_samples(self) -> bool:
        refining = self.recipe.refine.epochs > 0
        asks = self.factor != "none" or refining or self.chooses_blocks
        return asks or self.needs != "none" or self.allocator.needs != "none"

    @property
    def linears(self) -> tuple[LinearInfo, ...]:
        """All of them, as an allocator knows them before anything is measured."""
        coupled = {x.name: (c.name, c.members) for some in self.couplings for c in some for x in c.linears}
        coupled |= {x.name: (m.name, m.count) for m in self.mixtures if m is not None for x in m.linears}
        return tuple(
            LinearInfo(x.name, x.shape, i, coupling=coupled[x.name][0], members=coupled[x.name][1])
            if coupled
            else LinearInfo(x.name, x.shape, i)
            for i, some in enumerate(self.by_block)
            for x in some
        )

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.stack.model.parameters())


def prepare(
    recipe: Recipe, source: str | Path | nn.Module, progress: Progress, device: str, *, changes: bool = True
) -> Job:
    """Open the model without reading weights, and choose what is pruned.

    Args:
        changes: weights are going to change.

    Raises:
        ModelError: the model is packed, a glob matches nothing, or there is nothing to prune.
        PatternError: m does not divide a width.
        RecipeError: a key says another thing than a live model does.
        UserError: an embedding is to have a kind of its own, and has none.
    """
    if isinstance(source, nn.Module):
        folder, stack = None, live_stack(source)
        _check_live(recipe, stack)
    else:
        folder = resolve(source, progress.say)
        if changes and is_packed(folder):
            raise ModelError(f"{source} is packed; `tawny unpack` it first and prune the dense checkpoint")
        stack = open_stack(folder, compute_dtype(recipe.compute, device), device)
    job = _chosen(recipe, str(source) if folder else type(source).__name__, folder, stack, changes)
    if not (changes and folder is not None and job.couplings and job.member_solver.wants_bias):
        return job
    consumers = [
        coupling.name for some in job.couplings for coupling in some if coupling.consumer.expert is None
    ]
    settings = bias_settings(stack, consumers)
    if not settings:
        return job
    stack = open_stack(folder, compute_dtype(recipe.compute, device), device, settings)
    return replace(_chosen(recipe, job.source, folder, stack, changes), settings=settings)


def _chosen(recipe: Recipe, source: str, folder: Path | None, stack: Stack, changes: bool) -> Job:
    """The job on an open stack: its linears, or couplings, are chosen and checked."""
    every = [stack.linears(index) for index in range(len(stack))]
    by_block = [select(linears, recipe.include, recipe.exclude) for linears in every]
    chosen = [linear for linears in by_block for linear in linears]
    check_selection(chosen, [x for linears in every for x in linears], recipe.include, recipe.exclude)
    pattern = recipe.make_pattern()
    if changes:
        check_ends(stack.model, recipe.values.head, recipe.values.embedding)  # before the work, not after it
        check_writable(chosen)
        check_pattern(pattern, {linear.name: linear.shape for linear in chosen})
        if recipe.refine.epochs and (expert := next((x for x in chosen if x.expert is not None), None)):
            raise ModelError(
                f"refine trains linears, and {expert.name} is an expert of a fused tensor: leave refine out, and `tawny recover` the "
                "result, or leave the experts out (-o exclude=…)"
            )
        if recipe.values.names and recipe.values.names[0] in GGUF_KINDS:
            check_widths(chosen)
        if recipe.values.names and recipe.values.names[0] in GPU_KINDS:
            check_groups(
                chosen, (x for some in every for x in some), recipe.values.names[0], recipe.values.group_size
            )
        if isinstance(pattern, NM):
            _check_grids(recipe, pattern, {linear.shape[1] for linear in chosen})
    couplings: list[list[Coupling]] = []
    mixtures: list[Mixture | None] = []
    if isinstance(pattern, Experts):
        mixtures = _mixtures(stack, by_block)
        by_block = [list(mixture.linears) if mixture else [] for mixture in mixtures]
    if isinstance(pattern, Blocks):
        _check_whole_blocks(stack, every, by_block)
    if isinstance(pattern, Members):
        couplings = couple(stack, by_block, pattern.kinds)
        by_block = [[linear for coupling in some for linear in coupling.linears] for some in couplings]
    return Job(
        recipe,
        source,
        folder,
        stack,
        by_block,
        pattern,
        recipe.make_allocator(),
        recipe.make_solver(),
        couplings,
        mixtures,
    )


def _mixtures(stack: Stack, by_block: Sequence[Sequence[Linear]]) -> list[Mixture | None]:
    """The mixtures whose linears are all chosen.

    Raises:
        ModelError: there is none, one cannot be found, or one is chosen in part; a live model would keep its shapes.
    """
    if stack.checkpoint is None:
        raise ModelError(
            "experts are cut out of a checkpoint, and a live model keeps its shapes: save it, and give its folder and out=…"
        )
    mixtures: list[Mixture | None] = []
    for mixture, linears in zip(find_mixtures(stack), by_block, strict=True):
        names = {linear.name for linear in linears}
        missing = [x.name for x in mixture.linears if x.name not in names] if mixture else []
        if mixture is not None and 0 < len(missing) < len(mixture.linears):
            raise ModelError(
                f"experts leave as a whole, and include or exclude leaves {missing[0]} out: choose all linears of {mixture.name}, or none"
            )
        mixtures.append(None if missing else mixture)
    if not any(mixtures):
        raise ModelError("no mixture is left to prune: include or exclude leaves all experts out")
    return mixtures


def check_widths(linears: Sequence[Linear], instead: str = "leave it out (-o exclude=…)") -> None:
    """Refuse a linear that no type of GGUF files takes, and say what to do `instead`."""
    for linear in linears:
        if not fitting("q8_0", linear.shape[1]):
            raise RecipeError(
                f"{linear.name} has {linear.shape[1]} columns, and types of GGUF files take multiples of 32: {instead}"
            )


def check_groups(linears: Sequence[Linear], every: Iterable[Linear], kind: str, group: int | None) -> None:
    """Refuse what compressed-tensors does not hold in one of `GPU_KINDS`.

    Args:
        every: linears of the model, those that stay too.
    """
    if expert := next((linear for linear in every if linear.expert is not None), None):
        raise ModelError(
            f"{expert.name} is an expert of a fused tensor, and transformers opens no compressed-tensors checkpoint of such a model: "
            "choose kinds of packed folders, such as int4"
        )
    for linear in linears:
        if linear.transposed:
            raise ModelError(
                f"{linear.name} is stored as [in, out], which a compressed-tensors checkpoint does not hold as {kind}: leave it out "
                "(-o exclude=…)"
            )
        if not dividing(linear.shape[1], group):
            raise RecipeError(
                f"{linear.name} has {linear.shape[1]} columns, which {group or '128, 64 or 32'} does not divide: give another "
                "group (-o values.group_size=-1 is a row), or leave it out (-o exclude=…)"
            )


def _check_grids(recipe: Recipe, pattern: NM, widths: Iterable[int]) -> None:
    """Refuse kinds that the solver cannot combine with n:m, before the first weight is solved."""
    solver = cast(Solver, recipe.make_solver())
    for kind in recipe.values.names:
        for width in sorted(widths):
            solver.check_grid(pattern, recipe.values.grid(kind, width), width)


def _check_whole_blocks(
    stack: Stack, every: Sequence[Sequence[Linear]], by_block: Sequence[Sequence[Linear]]
) -> None:
    """Refuse a block that is chosen in part: it could not leave."""
    for index, (linears, chosen) in enumerate(zip(every, by_block, strict=True)):
        if 0 < len(chosen) < len(linears):
            names = {linear.name for linear in chosen}
            missing = next(linear.name for linear in linears if linear.name not in names)
            raise ModelError(
                f"blocks leave as a whole, and include or exclude leaves {missing} of {stack.name(index)} out: choose all linears of a "
                "block, or none (-o exclude=layers.0.*)"
            )


def notices(job: Job, tokens: int) -> list[str]:
    """What whoever prunes this has to know: which products stay dense, that the result is larger, or that another choice kept more.

    Args:
        tokens: that are calibrated on; of what is not made of tokens, positions.
    """
    said = staying_dense(job.stack.model, job.stack.structure)
    checkpoint, allocator = job.stack.checkpoint, job.recipe.allocator.name
    if checkpoint is not None and checkpoint.coded:
        said.append(
            f"{checkpoint.folder.name} is stored as {checkpoint.stored_as} ({size(file_bytes(checkpoint.folder))}) and is written "
            f"dense ({size(checkpoint.bytes_in(None))}); `tawny pack` makes it smaller"
        )
    weights = not (job.couplings or job.removes_blocks or job.mixtures)
    if weights and not (predicts_tokens(job.stack.model) or allocator == "uniform" or job.allocator.as_given):
        said.append(
            "uniform kept more than other allocators in nearly every trial on encoders: try -a uniform"
        )
    if any(kind in GPU_KINDS for kind in job.recipe.values.names):
        said += off_tiles(job)
    widest = max((linear for linears in job.by_block for linear in linears), key=lambda x: x.shape[1])
    if job.needs == "hessian" and tokens < widest.shape[1]:
        said.append(
            f"{tokens:,} calibration tokens are fewer than the {widest.shape[1]:,} inputs of {widest.name}: {job.recipe.solver.name} "
            "fits so few too closely; give more samples"
        )
    return said


def off_tiles(job: Job) -> list[str]:
    """Which linears the quickest kernels on GPUs do not take, if any."""
    off = [x for linears in job.by_block for x in linears if x.shape[0] % _TILE[0] or x.shape[1] % _TILE[1]]
    return [
        f"{len(off)} linears, first {off[0].name} {list(off[0].shape)}, are no multiples of {list(_TILE)}, which the Marlin kernels of "
        "vLLM need: slower ones multiply them, or none"
        for _ in off[:1]
    ]


def profile_count(recipe: Recipe, samples: int, seqlen: int) -> int:
    """How many of the samples a profile takes: the recipe's count, or enough for `PROFILE_TOKENS` tokens."""
    if recipe.profile_samples is not None:
        return min(samples, recipe.profile_samples)
    if recipe.compat == "official":
        return samples
    return min(samples, math.ceil(PROFILE_TOKENS / seqlen))


def output_count(recipe: Recipe, samples: int, seqlen: int) -> int:
    """How many of the samples are run backward, where the output is asked."""
    return min(samples, math.ceil(recipe.output.tokens / seqlen))


def demand_of(job: Job, load: Load) -> Demand:
    """What pruning asks of memory."""
    wanted = job.needs_samples
    asks = (job.factor != "none" or (job.mixtures and job.expert_solver.asks_output)) and load.samples
    felt = output_count(job.recipe, load.samples, load.seqlen) if asks else 0
    return Demand(
        job.stack,
        job.by_block,
        job.solver,
        job.needs,
        job.allocator,
        samples=load.samples if wanted else 0,
        seqlen=load.seqlen if wanted else 0,
        characters=load.characters if wanted else 0,
        profiled=profile_count(job.recipe, load.samples, load.seqlen) if wanted and load.samples else 0,
        felt=felt,
        factor=job.factor,
        asked=_asking_bytes(job, felt * load.seqlen) if job.mixtures and felt else 0,
        refining=job.recipe.refine.epochs > 0,
        compared=_compared(job, load) if job.chooses_blocks else 0,
        alone=_walks_alone(job, load),
    )


def _asking_bytes(job: Job, tokens: int) -> int:
    """While experts of a block leave one by one: tokens, gradients, what each expert gives along them, and one chunk in float64."""
    count = max(mixture.count for mixture in job.mixtures if mixture is not None)
    hidden = job.stack.hidden_bytes
    chunk = CHUNK_TOKENS * hidden * (2 + 16 // job.stack.compute.itemsize)
    return tokens * (3 * hidden + 2 * 8 * count) + chunk


def _walks_alone(job: Job, load: Load) -> bool:
    """Whether the walks of a run need what is outside the blocks only until samples are embedded, as far as is known before any."""
    stack = job.stack
    if stack.checkpoint is None or job.removes_blocks or job.mixtures:  # what leaves is tried out
        return False
    if not job.needs_samples:
        return True
    if load.given is not None:
        return stack.walks_alone(load.given.first(1).inputs)
    # Outside the blocks of what sees or hears there is little.
    return input_of(stack.model) == TOKENS and stack.walks_alone(some_tokens(stack, load.seqlen))


def _compared(job: Job, load: Load) -> int:
    """Tokens of the samples, taken whole, that blocks are chosen by."""
    return load.seqlen * min(load.samples, math.ceil(job.block_solver.tokens / max(1, load.seqlen)))


def _check_live(recipe: Recipe, stack: Stack) -> None:
    """Refuse keys that would change how a live model is kept or computes: it stays as it is. Refuse a packed one."""
    if any(isinstance(module, PackedLinear) for module in stack.model.modules()):
        raise ModelError(
            f"the live {type(stack.model).__name__} is packed: what is packed is not pruned or profiled; load the dense model"
        )
    if adapters(stack.model):
        raise ModelError(
            f"the live {type(stack.model).__name__} carries adapters of peft, whose factors are not weights to prune: "
            "merge_and_unload() them first"
        )
    own = str(stack.compute).removeprefix("torch.")
    compute = None if recipe.compute == "auto" else recipe.compute
    for key, given in (("dtype", recipe.dtype), ("compute", compute)):
        if given is not None and given != own:
            raise RecipeError(
                f"{key} is {given} and the live model is {own}: leave {key} out, or convert the model first (model.to(torch.{given}))"
            )
    if recipe.device != "cpu" and torch.device(recipe.device).type != stack.device.type:
        raise RecipeError(
            f"device is {recipe.device} and the live model is on {stack.device}: leave device out, or move the model first"
        )
