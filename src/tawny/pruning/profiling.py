"""The profile walk: what an allocator wants to know of the dense model, one forward a block.

Statistics of a dense block and its outputs come from the same forward, so the walk costs one pass. Column norms
settle long before the weights' solution does; so a subset of the samples is enough unless a recipe says otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor

from tawny.allocation.budget import (
    given_blocks,
    given_members,
    given_nm,
    mixed_bits,
    mixed_nm,
    spread_in_blocks,
    whole_experts,
    whole_members,
    whole_ranks,
)
from tawny.allocation.profile import Allocation, Allocator, Measuring, Profile
from tawny.calibration.observe import observe
from tawny.calibration.output import OutputFactor
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError, TawnyError
from tawny.gguf_kinds import GGUF_KINDS, fitting
from tawny.kinds import GPU_KINDS, kind_of
from tawny.model.couplings import check_fused
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.patterns import NM, AnyPattern, Blocks, Members, Rank
from tawny.pruning.factors import OutputFactors
from tawny.pruning.prepare import Job, profile_count
from tawny.pruning.session import Session
from tawny.run.walk import Block, Visitor, walk

PROFILED = "profiled"  # the samples that are observed


class LazyWeights(Mapping[str, tuple[Tensor, Statistics | None]]):
    """The weights of one block in float32, each made when it is asked for and kept by nobody."""

    def __init__(
        self,
        stack: Stack,
        linears: Sequence[Linear],
        statistics: Mapping[str, Statistics],
        factors: Mapping[str, OutputFactor] = MappingProxyType({}),
    ) -> None:
        self._stack = stack
        self._linears = {linear.name: linear for linear in linears}
        self._statistics, self._factors = statistics, factors

    def __getitem__(self, name: str) -> tuple[Tensor, Statistics | None]:
        seen = self._statistics.get(name)
        if seen is not None and name in self._factors:
            seen = replace(seen, output=self._factors[name])
        return self._stack.weight(self._linears[name]), seen

    def __iter__(self) -> Iterator[str]:
        return iter(self._linears)

    def __len__(self) -> int:
        return len(self._linears)

    def check_finite(self) -> None:
        """Look at each weight in turn.

        Raises:
            NumericalError: it holds a number that is not finite; names it.
        """
        for name in self:
            weight, _ = self[name]
            if not bool(torch.isfinite(weight).all()):
                raise NumericalError(
                    f"{name} {list(weight.shape)} holds NaN or infinite weights; check the checkpoint"
                )
            del weight  # before the next one is made


def profile_walk(session: Session, measuring: Measuring) -> Profile:
    """Shapes of all linears and, if there is anything to measure, the measures of every block.

    Args:
        session: its stack is dense; finished blocks are in its journal.
        measuring: an allocator, or several.

    Raises:
        NumericalError: a weight is NaN or infinite; names the linear.
    """
    job, run = session.job, session.run
    profiling = Profiling(job, measuring, session.factors)
    if measuring.measures_weights:
        samples: dict[str, Samples] = {}
        if measuring.needs != "none":
            assert session.samples is not None
            count = profile_count(job.recipe, len(session.samples), session.samples.seqlen)
            # Each of several processes needs a sample, even where fewer would do.
            samples[PROFILED] = session.samples.first(max(run.ranks.size, count))
        walk(run, job.stack, samples, [profiling], name="profile", phase="profiling", drop_outside=True)
    return profiling.profile


@final
class Profiling(Visitor):
    """Measures every block, which is dense, for one or several allocators; `PROFILED` goes through it meanwhile."""

    def __init__(self, job: Job, measuring: Measuring, factors: OutputFactors) -> None:
        self.job, self.measuring, self.factors = job, measuring, factors
        self.stages: dict[str, str] = {}
        self.measures: list[dict[str, Any]] = []

    def begin(self, kept: Mapping[str, Any]) -> None:
        self.stages, self.measures = dict(kept.get("stages", {})), list(kept.get("measures", []))

    def keep(self, blocks: int) -> Mapping[str, Any]:
        return {"stages": self.stages, "measures": self.measures}

    @property
    def profile(self) -> Profile:
        """Of the blocks that were visited."""
        linears = (replace(linear, group=self.stages.get(linear.name, "")) for linear in self.job.linears)
        return Profile(tuple(linears), tuple(self.measures))

    def visit(self, block: Block) -> None:
        with block.run.clock("profile"):
            self._measure(block)

    def _measure(self, block: Block) -> None:
        linears, ranks = self.job.by_block[block.index], block.run.ranks
        statistics: dict[str, Statistics] = {}
        if PROFILED in block.streams:
            seen = observe(
                block.streams[PROFILED],
                block.index,
                linears,
                self.measuring.needs,
                advance=PROFILED in block.wanted,
                exact=ranks.several,
            )
            statistics = seen.statistics
            ranks.add(statistics)
            self.stages |= {x.name: str(n) for n, stage in enumerate(seen.stages) for x in stage.linears}
        factors = self.factors.of(block.index, block.stack.device, self.measuring.output)
        inputs = LazyWeights(block.stack, linears, statistics, factors)
        inputs.check_finite()
        self.measures.append(ranks.same(self._measured(inputs, block.name) if ranks.first else {}))

    def _measured(self, inputs: LazyWeights, name: str) -> dict[str, Any]:
        """Through JSON at once, so that it is the same when it comes out of a journal."""
        try:
            measures: dict[str, Any] = json.loads(json.dumps(self.measuring.measure(inputs)))
        except TawnyError as error:
            raise type(error)(f"block {name}: {error}") from error
        return measures


def allocate(
    allocator: Allocator,
    profile: Profile,
    pattern: AnyPattern,
    sparsity: float,
    warnings: list[str] | None = None,
) -> Allocation:
    """The allocator's decision; where the pattern is n:m, in whole steps of n, and where members go, in whole members.

    One n for each block, as in OWL's mixed n:8 (2310.05175), because finer ratios did worse (docs/allocators.md); only where
    somebody chose the numbers, each linear has its own.

    Args:
        warnings: told where rounding made equal what the allocator gave different linears of a block, or different blocks.

    Raises:
        RecipeError: a chosen number is not a whole n of m, or blocks are to leave in part.
    """
    if isinstance(pattern, Rank):
        if warnings is not None:
            warnings.append(
                "the product of each two factors is written dense, for studies: no zero is made and no file gets smaller"
            )
        return whole_ranks(allocator.allocate(profile, sparsity), profile, sparsity)
    if isinstance(pattern, Blocks):
        return given_blocks(allocator.allocate(profile, sparsity), profile)
    if isinstance(pattern, Members):
        wish = allocator.allocate(profile, sparsity)
        return given_members(wish, profile) if allocator.as_given else whole_members(wish, profile, sparsity)
    if not isinstance(pattern, NM):
        return allocator.allocate(profile, sparsity)
    wish = allocator.allocate(profile, pattern.sparsity)
    if allocator.as_given:
        return given_nm(wish, pattern.m)
    spread = spread_in_blocks(wish, profile)
    if spread and warnings is not None:
        warnings.append(
            f"{pattern} gives the linears of a block one n of {pattern.m}, the mean of what the allocator gave them, which "
            f"differs in {len(spread)} of {profile.blocks} blocks, by up to {max(spread.values()):.2g}"
        )
    allocation = mixed_nm(wish, profile, pattern.m, pattern.n)
    means = [mean for i, mean in enumerate(block_sparsities(wish, profile)) if profile.parameters(i)]
    if warnings is not None and max(means) - min(means) > 1e-6 and len(set(allocation.values())) == 1:
        warnings.append(
            f"every block keeps {pattern}: what the allocator gave them differs by less than one n of {pattern.m}"
        )
    return allocation


def spend(job: Job, profile: Profile, warnings: list[str] | None = None) -> tuple[Allocation, dict[str, str]]:
    """Sparsities, and the kinds that the linears are solved for: none, one for all, or bits as the allocator shares them."""
    recipe, values = job.recipe, job.recipe.values
    sizes = {linear.name: linear.numel for linear in profile.linears}
    if values.mean is None:
        kinds = dict.fromkeys(sizes, values.kind) if values.kind else job.allocator.kinds(profile)
        if not values.kind and (set(kinds.values()) - set(values.of) or (values.of and not kinds)):
            has = ", ".join(sorted(set(kinds.values()))) or "no kinds"
            raise RecipeError(f"values.of is {list(values.of)}, and the allocation file has {has}")
        kinds = _fitting(kinds, job, warnings)
        whole = len(kinds) == sum(len(job.stack.linears(i)) for i in range(len(job.stack)))
        if GPU_KINDS.keys() & kinds.values() and not (whole and len({*kinds.values()}) == 1):
            check_fused(job.stack, kinds)
        if job.mixtures:
            wish = job.allocator.allocate(profile, recipe.sparsity)
            return whole_experts(wish, profile, recipe.sparsity, job.limits), kinds
        return allocate(job.allocator, profile, job.budget_pattern, recipe.sparsity, warnings), kinds
    by_bits = {kind_of(name).bits: name for name in values.of}
    wish = job.allocator.allocate(profile, 1 - values.mean / max(by_bits))
    bits = mixed_bits(wish, sizes, list(by_bits), values.mean)
    return dict.fromkeys(sizes, 0.0), {name: by_bits[count] for name, count in bits.items()}


def _fitting(kinds: dict[str, str], job: Job, warnings: list[str] | None) -> dict[str, str]:
    """The kinds, with another one where the width of a linear is no multiple of the blocks of its own."""
    widths, others = {x.name: x.shape[1] for x in job.linears}, dict[tuple[str, str], int]()
    for name, kind in kinds.items():
        if kind not in GGUF_KINDS:
            continue
        kinds[name] = fitting(kind, widths[name])
        if kinds[name] != kind:
            others[kind, kinds[name]] = others.get((kind, kinds[name]), 0) + 1
    if warnings is not None:
        warnings += [
            f"{count} linears get {other}: {kind} has blocks of {GGUF_KINDS[kind].block} columns, which do not divide their width"
            for (kind, other), count in others.items()
        ]
    return kinds


def block_sparsities(allocation: Mapping[str, float], profile: Profile) -> list[float]:
    """The parameter-weighted sparsity of every block; 0 for one that holds nothing to prune."""
    return [
        sum(allocation[x.name] * x.numel for x in profile.linears_of(block))
        / max(1, profile.parameters(block))
        for block in range(profile.blocks)
    ]
