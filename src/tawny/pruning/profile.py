"""`tawny profile`: the layerwise outlier distribution (LOD) of a model, and what allocators make of it."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tawny.allocation.joint import Joint, Survey
from tawny.allocation.owl import Owl
from tawny.allocation.profile import Allocator, Profile
from tawny.errors import RecipeError
from tawny.model.trust import opens_models
from tawny.patterns import AnyPattern, Blocks, Experts, Members, Unstructured
from tawny.progress import Progress, silent
from tawny.pruning.output import asking_output
from tawny.pruning.profiling import allocate, block_sparsities, profile_walk
from tawny.pruning.session import Purpose, open_session, text_or_tokens
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe


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
        recipe: calibration, include and exclude are used; `keys` override single entries. Sparsities are for a mean of 0.7 unless
            it or its pattern says another. Where its pattern removes whole blocks, channels or heads, they are those of single weights.
        Ms: an outlier is a score above M times the block's mean (OWL, 2310.05175, section 3).
        allocators: names whose sparsities are given; the recipe's own with its options, others with their defaults.
            Empty: OWL for every M.
        calibration: tokens `[samples, tokens]`, or the name or path of a text.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: something asked for cannot be done.
        NumericalError: a weight or an activation is not finite.
    """
    start = time.perf_counter()
    Ms = tuple(dict.fromkeys(float(M) for M in Ms))
    for M in Ms:
        if not 0 < M < math.inf:
            raise RecipeError(f"M is {M:g}; expected a positive multiple of the mean score, such as 5 (-M 5)")
    named, given = text_or_tokens(calibration)
    recipe = resolve_recipe(recipe, default_sparsity=0.7, **named, **keys)
    named_allocators = {name: _allocator(name, recipe) for name in dict.fromkeys(allocators)}
    survey = Survey(Joint(named_allocators), Ms)
    purpose = Purpose(samples=survey.needs != "none", changes=False)
    with open_session(
        recipe, source, purpose, progress, tokenizer=tokenizer, calibration=given, alone=True
    ) as session:
        pattern = session.job.budget_pattern
        if isinstance(pattern, Blocks | Experts | Members):
            progress.say(f"sparsities are shown as for single weights, not as whole {pattern}")
            pattern = Unstructured()
        with asking_output(session, survey.output) as asked:
            walked = profile_walk(asked, survey)
    sizes = [walked.parameters(block) for block in range(walked.blocks)]
    return ProfileReport(
        source=session.job.source,
        profile=walked,
        Ms=survey.Ms,
        shares={f"{M:g}": [m["outlier_share"][f"{M:g}"] for m in walked.measures] for M in survey.Ms},
        mean_score=[m["mean_score"] for m in walked.measures],
        max_score=[m["max_score"] for m in walked.measures],
        zeros=[m["zeros"] / max(1, n) for m, n in zip(walked.measures, sizes, strict=True)],
        allocations=_named_allocations(walked, survey, recipe, pattern)
        if named_allocators
        else _owl_allocations(walked, recipe, survey.Ms, pattern),
        sparsity=recipe.sparsity,
        text=session.record.text,
        seconds=time.perf_counter() - start,
    )


def _allocator(name: str, recipe: Recipe) -> Allocator:
    if recipe.allocator.name != name:
        recipe = resolve_recipe(sparsity=recipe.sparsity, compat=recipe.compat, allocator=name)
    allocator: Allocator = recipe.make_allocator()
    return allocator


def _named_allocations(
    walked: Profile, survey: Survey, recipe: Recipe, pattern: AnyPattern
) -> dict[str, list[float]]:
    """Sparsity of each block as each allocator would set it."""
    allocations = {}
    for name, allocator in survey.joint.allocators.items():
        allocation = allocate(allocator, survey.profile_of(name, walked), pattern, recipe.sparsity)
        allocations[name] = block_sparsities(allocation, walked)
    return allocations


def _owl_allocations(
    walked: Profile, recipe: Recipe, Ms: Sequence[float], pattern: AnyPattern
) -> dict[str, list[float]]:
    """Sparsity of each block as OWL would set it for every M, with the recipe's λ where it has one."""
    strength = recipe.allocator.options.get("lambda_", recipe.allocator.options.get("lambda", 0.08))
    allocations = {}
    for M in Ms:
        owl = Owl(M=M, lambda_=float(strength))
        allocations[f"owl M={M:g}"] = block_sparsities(
            allocate(owl, walked, pattern, recipe.sparsity), walked
        )
    return allocations
