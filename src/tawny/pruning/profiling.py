"""The profile walk: what an allocator wants to know of the dense model, one forward a block.

Statistics of a dense block and its outputs come from the same forward, so the walk costs one pass. Column norms
settle long before the weights' solution does; so a subset of the samples is enough unless a recipe says otherwise.
"""

from __future__ import annotations

__all__ = [
    "LazyWeights",
    "allocate",
    "block_sparsities",
    "measured",
    "places",
    "profile_walk",
    "spend",
    "with_stages",
]

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tawny.allocation.budget import (
    given_blocks,
    given_members,
    given_nm,
    mixed_bits,
    mixed_nm,
    spread_in_blocks,
    whole_members,
    whole_ranks,
)
from tawny.allocation.profile import Allocation, Allocator, LinearInfo, Measuring, Profile
from tawny.calibration.observe import Stage, observe
from tawny.calibration.statistics import Statistics
from tawny.errors import NumericalError, RecipeError, TawnyError
from tawny.kinds import kind_of
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Stream
from tawny.patterns import NM, AnyPattern, Blocks, Members, Rank
from tawny.pruning.prepare import Job, profile_count
from tawny.pruning.session import Session

WALK = "profile"  # what the journal calls it


class LazyWeights(Mapping[str, tuple[Tensor, Statistics | None]]):
    """The weights of one block in float32, each made when it is asked for and kept by nobody."""

    def __init__(self, stack: Stack, linears: Sequence[Linear], statistics: Mapping[str, Statistics]) -> None:
        self._stack = stack
        self._linears = {linear.name: linear for linear in linears}
        self._statistics = statistics

    def __getitem__(self, name: str) -> tuple[Tensor, Statistics | None]:
        return self._stack.weight(self._linears[name]), self._statistics.get(name)

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
    job, journal, ranks = session.job, session.run.journal, session.run.ranks
    stack, samples = job.stack, session.samples
    done, found = journal.walk(WALK)
    stages: dict[str, str] = found.get("stages", {})
    measures: list[dict[str, Any]] = found.get("measures", [])
    if measuring.measures_weights and done < len(stack):
        stream = None
        if measuring.needs != "none":
            assert samples is not None
            # Each of several processes needs a sample, even where fewer would do.
            shared = samples.first(max(ranks.size, profile_count(job.recipe, len(samples), samples.seqlen)))
            stream = Stream(
                stack,
                ranks.part(shared),
                depth=done,
                saved=journal.hidden(WALK),
                spill=session.run.spill(WALK),
            )
            stream.leave_outside()
        else:
            stack.forget_outside()
        session.run.progress.phase("profiling", len(stack) - done)
        for index in range(done, len(stack)):
            last = index == len(stack) - 1
            with torch.no_grad(), stack.block(index):
                statistics: dict[str, Any] = {}
                if stream is not None:
                    seen = observe(
                        stream,
                        index,
                        job.by_block[index],
                        measuring.needs,
                        advance=not last,
                        exact=ranks.several,
                    )
                    statistics = seen.statistics
                    ranks.add(statistics)
                    stages.update(places(seen.stages))
                inputs = LazyWeights(stack, job.by_block[index], statistics)
                inputs.check_finite()
                measures.append(
                    ranks.same(measured(measuring, inputs, stack.name(index)) if ranks.first else {})
                )
                del inputs, statistics
            if last or journal.due():
                kept = {} if last or stream is None else {"pruned": stream}
                journal.commit(WALK, index + 1, {"stages": stages, "measures": measures}, kept)
            session.run.progress.step(stack.name(index))
    return Profile(with_stages(job.linears, stages), tuple(measures))


def places(stages: Sequence[Stage]) -> dict[str, str]:
    """The number of the stage that each linear was seen in."""
    return {linear.name: str(n) for n, stage in enumerate(stages) for linear in stage.linears}


def measured(measuring: Measuring, inputs: LazyWeights, name: str) -> dict[str, Any]:
    """What is measured of one block, through JSON at once, so that it is the same when it comes out of a journal."""
    try:
        made: dict[str, Any] = json.loads(json.dumps(measuring.measure(inputs)))
    except TawnyError as error:
        raise type(error)(f"block {name}: {error}") from error
    return made


def with_stages(linears: Sequence[LinearInfo], stages: Mapping[str, str]) -> tuple[LinearInfo, ...]:
    """The linears with the stage each was seen in."""
    return tuple(replace(linear, group=stages.get(linear.name, "")) for linear in linears)


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
        RecipeError: a chosen number is no whole n of m, or blocks are to leave in part.
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
    made = mixed_nm(wish, profile, pattern.m, pattern.n)
    means = [mean for i, mean in enumerate(block_sparsities(wish, profile)) if profile.parameters(i)]
    if warnings is not None and max(means) - min(means) > 1e-6 and len(set(made.values())) == 1:
        warnings.append(
            f"every block keeps {pattern}: what the allocator gave them differs by less than one n of {pattern.m}"
        )
    return made


def spend(job: Job, profile: Profile, warnings: list[str] | None = None) -> tuple[Allocation, dict[str, str]]:
    """Sparsities, and the kinds that the linears are solved for: none, one for all, or bits as the allocator shares them."""
    recipe, values = job.recipe, job.recipe.values
    sizes = {linear.name: linear.numel for linear in profile.linears}
    if values.mean is None:
        kinds = dict.fromkeys(sizes, values.kind) if values.kind else job.allocator.kinds(profile)
        if not values.kind and (set(kinds.values()) - set(values.of) or (values.of and not kinds)):
            has = ", ".join(sorted(set(kinds.values()))) or "no kinds"
            raise RecipeError(f"values.of is {list(values.of)}, and the allocation file has {has}")
        return allocate(job.allocator, profile, job.budget_pattern, recipe.sparsity, warnings), kinds
    by_bits = {kind_of(name).bits: name for name in values.of}
    wish = job.allocator.allocate(profile, 1 - values.mean / max(by_bits))
    bits = mixed_bits(wish, sizes, list(by_bits), values.mean)
    return dict.fromkeys(sizes, 0.0), {name: by_bits[count] for name, count in bits.items()}


def block_sparsities(allocation: Mapping[str, float], profile: Profile) -> list[float]:
    """The parameter-weighted sparsity of every block; 0 for one that holds nothing to prune."""
    return [
        sum(allocation[x.name] * x.numel for x in profile.linears_of(block))
        / max(1, profile.parameters(block))
        for block in range(profile.blocks)
    ]
