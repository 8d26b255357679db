"""The profile walk: what an allocator wants to know of the dense model, one forward a block.

Statistics of a dense block and its outputs come from the same forward, so the walk costs one pass. Column norms
settle long before the weights' solution does; so a subset of the samples is enough unless a recipe says otherwise.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tawny.allocation import ALLOCATORS
from tawny.allocation.budget import given_nm, mixed_nm, spread_in_blocks
from tawny.allocation.owl import Owl, measure_outliers
from tawny.allocation.profile import Allocation, LinearInfo, Profile, largest
from tawny.allocation.several import Several
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Needs, Statistics, most
from tawny.errors import NumericalError, RecipeError, TawnyError
from tawny.model.linears import Linear
from tawny.model.stack import Stack
from tawny.model.streams import Samples, Stream
from tawny.model.trust import opens_models
from tawny.patterns import NM, Pattern
from tawny.progress import Progress, silent
from tawny.pruning.journal import Journal
from tawny.pruning.ranks import Ranks
from tawny.recipe.schema import Recipe, resolve_recipe

# Tokens after which the outlier shares of a model no longer move its sparsities by more than 0.005.
PROFILE_TOKENS = 8192


def profile_samples(samples: Samples, recipe: Recipe) -> Samples:
    """The subset the profile is taken on."""
    return samples.first(profile_count(recipe, len(samples), samples.seqlen))


def profile_count(recipe: Recipe, samples: int, seqlen: int) -> int:
    """How many of the samples a profile takes: the recipe's count, or enough for `PROFILE_TOKENS` tokens."""
    if recipe.profile_samples is not None:
        return min(samples, recipe.profile_samples)
    if recipe.compat == "official":
        return samples
    return min(samples, math.ceil(PROFILE_TOKENS / seqlen))


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

    def finite(self) -> Iterator[Tensor]:
        """Each weight in turn.

        Raises:
            NumericalError: it holds a number that is not finite; names it.
        """
        for name in self:
            weight, _ = self[name]
            if not bool(torch.isfinite(weight).all()):
                raise NumericalError(
                    f"{name} {list(weight.shape)} holds NaN or infinite weights; check the checkpoint"
                )
            yield weight


def profile_walk(
    stack: Stack,
    by_block: Sequence[Sequence[Linear]],
    allocator: Any,
    samples: Samples | None,
    recipe: Recipe,
    progress: Progress,
    journal: Journal | None = None,
    spill: Path | None = None,
    ranks: Ranks | None = None,
) -> Profile:
    """Shapes of all linears and, if the allocator measures anything, its measures of every block.

    Args:
        stack: the dense model.
        by_block: the linears that will be pruned.
        allocator: says what it `needs` and has `measure`.
        samples: calibration tokens; needed if the allocator needs statistics.
        journal: where finished blocks are kept, and found again.
        spill: where hidden states are kept instead of in memory.
        ranks: the processes that share the walk.

    Raises:
        NumericalError: a weight is NaN or infinite; names the linear.
    """
    journal, ranks = journal or Journal(None), ranks or Ranks(alone=True)
    done, found = journal.walk("profile")
    stages: dict[str, str] = found.get("stages", {})
    measures: list[dict[str, Any]] = found.get("measures", [])
    if allocator.measures_weights and done < len(stack):
        stream = None
        if allocator.needs != "none":
            assert samples is not None
            saved = journal.hidden("profile")
            # Each of several processes needs a sample, even where fewer would do.
            shared = profile_samples(samples, recipe)
            shared = samples.first(ranks.size) if len(shared) < ranks.size else shared
            stream = Stream(stack, ranks.part(shared), depth=done, saved=saved, spill=spill)
        progress.phase("profiling", len(stack) - done)
        for index in range(done, len(stack)):
            last = index == len(stack) - 1
            with torch.no_grad(), stack.block(index):
                statistics: dict[str, Any] = {}
                if stream is not None:
                    seen = observe(
                        stream, index, by_block[index], allocator.needs, advance=not last, exact=ranks.several
                    )
                    statistics = seen.statistics
                    ranks.add(statistics)
                    stages.update(
                        {x.name: str(n) for n, stage in enumerate(seen.stages) for x in stage.linears}
                    )
                inputs = LazyWeights(stack, by_block[index], statistics)
                for _ in inputs.finite():
                    pass
                try:
                    # What is measured goes through JSON at once, so that it is the same when it comes out of a journal.
                    measures.append(json.loads(json.dumps(allocator.measure(inputs) if ranks.first else {})))
                    measures[-1] = ranks.same(measures[-1])
                except TawnyError as error:
                    raise type(error)(f"block {stack.name(index)}: {error}") from error
                del inputs, statistics
            if last or journal.due():
                kept = {} if last or stream is None else {"pruned": stream}
                journal.commit("profile", index + 1, {"stages": stages, "measures": measures}, kept)
            progress.step(stack.name(index))
    infos = tuple(
        LinearInfo(linear.name, linear.shape, index, stages.get(linear.name, ""))
        for index, linears in enumerate(by_block)
        for linear in linears
    )
    return Profile(infos, tuple(measures))


def allocate(
    allocator: Any,
    profile: Profile,
    pattern: Pattern,
    sparsity: float,
    warnings: list[str] | None = None,
) -> Allocation:
    """The allocator's decision; where the pattern is n:m, in whole steps of n.

    One n for each block, as in OWL's mixed n:8 (2310.05175), because finer ratios did worse (docs/allocators.md); only where
    somebody chose the numbers, each linear has its own.

    Args:
        warnings: told where rounding made equal what the allocator gave different linears of a block.

    Raises:
        RecipeError: a chosen number is no whole n of m.
    """
    if not isinstance(pattern, NM):
        made: Allocation = allocator.allocate(profile, sparsity)
        return made
    wish: Allocation = allocator.allocate(profile, pattern.sparsity)
    if getattr(allocator, "as_given", False):
        return given_nm(wish, pattern.m)
    spread = spread_in_blocks(wish, profile)
    if spread and warnings is not None:
        warnings.append(
            f"{pattern} gives the linears of a block one n of {pattern.m}, the mean of what the allocator gave them, which "
            f"differs in {len(spread)} of {profile.blocks} blocks, by up to {max(spread.values()):.2g}"
        )
    return mixed_nm(wish, profile, pattern.m, pattern.n)


@dataclass(frozen=True)
class ProfileReport:
    """The layerwise outlier distribution of a model, block by block.

    Attributes:
        profile: what allocators read.
        Ms: the multiples of the mean score that were counted.
        shares: `{"5": [share of block 0 in %, …], …}`.
        mean_score, max_score: of each block, a token.
        zeros: share of exact zeros of each block's prunable weights.
        allocations: block sparsities that allocators would give, by allocator name.
    """

    source: str
    profile: Profile
    Ms: tuple[float, ...]
    shares: dict[str, list[float]]
    mean_score: list[float]
    max_score: list[float]
    zeros: list[float]
    allocations: dict[str, list[float]]
    sparsity: float
    text: dict[str, Any]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        plain = asdict(self)
        del plain["profile"]
        return plain


@dataclass(frozen=True)
class Together(Several):
    """Several allocators measured in one walk, and outlier shares for several M.

    Attributes:
        Ms: multiples of the mean whose outlier shares are counted; none if empty.
    """

    Ms: tuple[float, ...] = ()

    @property
    def needs(self) -> Needs:
        return most([super().needs, "norms" if self.Ms else "none"])

    @property
    def measures_weights(self) -> bool:
        return True

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """Outliers are counted before the others measure."""
        return max(super().workspace(shapes), 16 * largest(shapes))

    def measure(self, linears: Mapping[str, tuple[Tensor, Statistics | None]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        if self.Ms:
            zeros = sum(int((weight == 0).sum()) for weight, _ in linears.values())
            made = {**measure_outliers(linears, self.Ms), "zeros": zeros}
        return {**made, "allocators": super().measure(linears)}

    def profile_of(self, name: str, walked: Profile) -> Profile:
        theirs = tuple(measured["allocators"] for measured in walked.measures)
        return super().profile_of(name, Profile(walked.linears, theirs))


def block_sparsities(allocation: Mapping[str, float], profile: Profile) -> list[float]:
    """The parameter-weighted sparsity of every block; 0 for one that holds nothing to prune."""
    return [
        sum(allocation[x.name] * x.numel for x in profile.linears_of(block))
        / max(1, profile.parameters(block))
        for block in range(profile.blocks)
    ]


@opens_models
def profile(
    source: str | Path | nn.Module,
    *,
    recipe: Recipe | None = None,
    Ms: Sequence[float] = (3, 5, 7, 10),
    allocators: Sequence[str] = (),
    progress: Progress = silent,
    tokenizer: Any = None,
    calibration: Any = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> ProfileReport:
    """Measure the layerwise outlier distribution (LOD) of a model, dense or pruned.

    Args:
        source: a folder, hub id, `.gguf` file, `smollm2`, or a live module.
        recipe: calibration, include and exclude are used; `keys` override single entries.
        Ms: an outlier is a score above M times the block's mean (OWL, 2310.05175, section 3).
        allocators: names whose sparsities are given; the recipe's own with its options, others with their defaults.
            Empty: OWL for every M.
        calibration: tokens `[samples, tokens]`, or the name or path of a text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: something asked for cannot be done.
        NumericalError: a weight or an activation is not finite.
    """
    from tawny.pruning.inputs import text_or_tokens
    from tawny.pruning.run import open_run

    start = time.perf_counter()
    Ms = tuple(dict.fromkeys(float(M) for M in Ms))
    for M in Ms:
        if not 0 < M < math.inf:
            raise RecipeError(f"M is {M:g}; expected a positive multiple of the mean score, such as 5 (-M 5)")
    named, given = text_or_tokens(calibration)
    recipe = resolve_recipe(recipe, default_sparsity=0.5, **named, **keys)
    named_allocators = {name: _allocator(name, recipe) for name in dict.fromkeys(allocators)}
    several = Together(named_allocators, Ms)
    with open_run(
        recipe,
        source,
        None,
        progress,
        overwrite=False,
        tokenizer=tokenizer,
        calibration=given,
        measuring=several,
    ) as run:
        walked = profile_walk(run.stack, run.by_block, several, run.samples, recipe, progress)
    sizes = [walked.parameters(block) for block in range(walked.blocks)]
    return ProfileReport(
        source=run.source,
        profile=walked,
        Ms=several.Ms,
        shares={f"{M:g}": [m["outlier_share"][f"{M:g}"] for m in walked.measures] for M in several.Ms},
        mean_score=[m["mean_score"] for m in walked.measures],
        max_score=[m["max_score"] for m in walked.measures],
        zeros=[m["zeros"] / max(1, n) for m, n in zip(walked.measures, sizes, strict=True)],
        allocations=_named_allocations(walked, several, recipe)
        if named_allocators
        else _owl_allocations(walked, recipe, several.Ms),
        sparsity=recipe.sparsity,
        text=run.record.text,
        seconds=time.perf_counter() - start,
    )


def _allocator(name: str, recipe: Recipe) -> Any:
    if recipe.allocator.name != name:
        recipe = recipe.with_overrides([("allocator", name)])
    if getattr(ALLOCATORS[name], "searches", False):
        raise RecipeError(
            f"{name} tries allocations on a model, which a profile does not: prune with -a {name}"
        )
    return recipe.make_allocator()


def _named_allocations(walked: Profile, several: Together, recipe: Recipe) -> dict[str, list[float]]:
    """Sparsity of each block as each allocator would set it."""
    pattern = recipe.make_pattern()
    made = {}
    for name, allocator in several.allocators.items():
        allocation = allocate(allocator, several.profile_of(name, walked), pattern, recipe.sparsity)
        made[name] = block_sparsities(allocation, walked)
    return made


def _owl_allocations(walked: Profile, recipe: Recipe, Ms: Sequence[float]) -> dict[str, list[float]]:
    """Sparsity of each block as OWL would set it for every M, with the recipe's λ where it has one."""
    strength = recipe.allocator.options.get("lambda_", recipe.allocator.options.get("lambda", 0.08))
    pattern, made = recipe.make_pattern(), {}
    for M in Ms:
        owl = Owl(M=M, lambda_=float(strength))
        made[f"owl M={M:g}"] = block_sparsities(allocate(owl, walked, pattern, recipe.sparsity), walked)
    return made
