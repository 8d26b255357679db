"""Open the model that a recipe is for, choose its linears, refuse what cannot be, and say what it asks of memory.

`plan`, `prune`, `profile` and `search` start here.
"""

from __future__ import annotations

__all__ = ["PROFILE_TOKENS", "Job", "decoded", "demand_of", "prepare", "profile_count"]

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tawny.allocation.profile import Allocator, LinearInfo
from tawny.calibration.statistics import Needs
from tawny.errors import ModelError, RecipeError
from tawny.model.checkpoint import Checkpoint, file_bytes, is_packed
from tawny.model.linears import Linear, check_selection, check_writable, select
from tawny.model.source import resolve
from tawny.model.stack import Stack, live_stack
from tawny.packed.linear import PackedLinear
from tawny.packed.opening import open_stack
from tawny.patterns import Pattern, check_pattern
from tawny.precision import DTYPES, native_dtype
from tawny.progress import Progress
from tawny.pruning.memory_plan import Demand, Load
from tawny.recipe.schema import Recipe
from tawny.solvers.base import Solver
from tawny.words import size

# Tokens after which the outlier shares of a model no longer move its sparsities by more than 0.005.
PROFILE_TOKENS = 8192


@dataclass(frozen=True)
class Job:
    """What a recipe asks of one model.

    Attributes:
        source: the model as it was named.
        folder: where its files are; None for a live module.
        by_block: the linears to prune, block by block.
    """

    recipe: Recipe
    source: str
    folder: Path | None
    stack: Stack
    by_block: Sequence[Sequence[Linear]]
    pattern: Pattern
    allocator: Allocator
    solver: Solver

    @property
    def needs(self) -> Needs:
        """What calibration has to yield for the solves."""
        return "hessian" if self.recipe.refit else self.solver.needs

    @property
    def needs_samples(self) -> bool:
        refining = self.recipe.refine.epochs > 0
        return self.needs != "none" or self.allocator.needs != "none" or refining

    @property
    def linears(self) -> tuple[LinearInfo, ...]:
        """All of them, as an allocator knows them before anything is measured."""
        return tuple(LinearInfo(x.name, x.shape, i) for i, some in enumerate(self.by_block) for x in some)

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
    """
    if isinstance(source, nn.Module):
        folder, stack = None, live_stack(source)
        _check_live(recipe, stack)
    else:
        folder = resolve(source, progress.say)
        if changes and is_packed(folder):
            raise ModelError(f"{source} is packed; `tawny unpack` it first and prune the dense checkpoint")
        stack = open_stack(folder, _compute_dtype(recipe), device)
    every = [stack.linears(index) for index in range(len(stack))]
    by_block = [select(linears, recipe.include, recipe.exclude) for linears in every]
    chosen = [linear for linears in by_block for linear in linears]
    check_selection(chosen, [x for linears in every for x in linears], recipe.include, recipe.exclude)
    pattern = recipe.make_pattern()
    if changes:
        check_writable(chosen)
        check_pattern(pattern, {linear.name: linear.shape for linear in chosen})
    name = str(source) if folder else type(source).__name__
    return Job(recipe, name, folder, stack, by_block, pattern, recipe.make_allocator(), recipe.make_solver())


def decoded(checkpoint: Checkpoint | None) -> list[str]:
    """What whoever prunes a quantised checkpoint has to know: the result is larger. Empty for others."""
    if checkpoint is None or not checkpoint.coded:
        return []
    dense = checkpoint.bytes_in(None)
    return [
        f"{checkpoint.folder.name} is stored as {checkpoint.stored_as} ({size(file_bytes(checkpoint.folder))}) and is written dense "
        f"({size(dense)}); `tawny pack` makes it smaller"
    ]


def profile_count(recipe: Recipe, samples: int, seqlen: int) -> int:
    """How many of the samples a profile takes: the recipe's count, or enough for `PROFILE_TOKENS` tokens."""
    if recipe.profile_samples is not None:
        return min(samples, recipe.profile_samples)
    if recipe.compat == "official":
        return samples
    return min(samples, math.ceil(PROFILE_TOKENS / seqlen))


def demand_of(job: Job, load: Load) -> Demand:
    """What pruning asks of memory."""
    wanted = job.needs_samples
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
        in_data_order=job.recipe.order == "data",
        refining=job.recipe.refine.epochs > 0,
    )


def _check_live(recipe: Recipe, stack: Stack) -> None:
    """Refuse keys that would change how a live model is kept or computes: it stays as it is. Refuse a packed one."""
    if any(isinstance(module, PackedLinear) for module in stack.model.modules()):
        raise ModelError(
            f"the live {type(stack.model).__name__} is packed: what is packed is not pruned or profiled; load the dense model"
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


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of forwards: the recipe's, or what the machine multiplies natively."""
    return native_dtype() if recipe.compute == "auto" else DTYPES[recipe.compute]
