"""The same walk without the work: what would be pruned, and what it would take.

Memory is added up from shapes; time is multiplied out from the matrix products of the walk and the speed this
machine shows on such products just now. Both are estimates and say so; sizes on disk are exact.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from tawny.allocation.profile import LinearInfo, Profile
from tawny.calibration.context import check_context
from tawny.calibration.text import NAMED_TEXTS, load_text
from tawny.model.linears import check_selection, select
from tawny.model.output import SHARD_BYTES
from tawny.model.source import resolve
from tawny.model.stack import Stack, open_stack
from tawny.model.trust import opens_models
from tawny.patterns import check_pattern
from tawny.precision import DTYPES, native_dtype, rounds_products
from tawny.progress import Progress, silent
from tawny.pruning.demand import demand_of, needs_of
from tawny.pruning.inputs import check_dense, compute_dtype
from tawny.pruning.memory_plan import available, parse_size, place, sharing_inputs
from tawny.pruning.profiling import allocate, profile_count
from tawny.pruning.refine import holds_out
from tawny.recipe.schema import Recipe, resolve_recipe
from tawny.search.cost import cost_of_search, needs_of_search, stand_in
from tawny.search.grid import check_study
from tawny.solvers.base import Work

# Elementwise work, attention and Python beside the matrix products of a forward, as a factor on their time.
_OVERHEAD = 1.7
# Seconds a weight of elementwise work on what stays in the cache, with two threads.
_PASS = 3e-10


@dataclass(frozen=True)
class Plan:
    """What a recipe would do to a model, without doing it.

    Attributes:
        blocks: `[{index, linears, parameters}]`.
        allocation: by linear name, or None where the allocator has to see data first.
        memory: estimated peak bytes of the whole process, the smallest budget that would do, and the parts of the peak.
        disk: bytes written at the peak (hidden states that resuming needs among them), and of the finished checkpoint.
        hidden_states: where they are kept, "memory" or "disk".
        reads_text: whether calibration text is needed at all.
        seconds: estimated, by phase.
    """

    source: str
    recipe: dict[str, Any]
    parameters: int
    prunable: int
    removed: int
    blocks: list[dict[str, Any]]
    linears: list[dict[str, Any]]
    allocation: dict[str, float] | None
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    notes: list[str] = field(default_factory=list)
    hidden_states: str = "memory"
    reads_text: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured_speed(dtype: torch.dtype) -> float:
    """FLOP a second of a large matrix product on this machine, in `dtype`."""
    a = torch.randn(1024, 1024).to(dtype)
    a @ a
    best = min(_time(lambda: a @ a) for _ in range(5))
    return 2 * 1024**3 / best


def _time(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@opens_models
def plan(
    source: str | Path,
    *,
    recipe: Recipe | None = None,
    memory: str | int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **keys: Any,
) -> Plan:
    """What `prune` would do with the same arguments.

    Args:
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: as `prune` would, for everything that can be known without work.
    """
    recipe = resolve_recipe(recipe, **keys)
    folder = resolve(source, progress.say)
    check_dense(source, folder)
    stack = open_stack(folder, compute_dtype(recipe), recipe.device)
    every = [stack.linears(index) for index in range(len(stack))]
    chosen = [select(linears, recipe.include, recipe.exclude) for linears in every]
    flat = [linear for linears in chosen for linear in linears]
    check_selection(flat, [linear for linears in every for linear in linears], recipe.include, recipe.exclude)
    pattern = recipe.make_pattern()
    check_pattern(pattern, {linear.name: linear.shape for linear in flat})
    allocator, solver = recipe.make_allocator(), recipe.make_solver()
    needs = needs_of(recipe, solver)
    infos = tuple(LinearInfo(x.name, x.shape, i) for i, linears in enumerate(chosen) for x in linears)
    allocation = None
    rounded: list[str] = []
    if not allocator.measures_weights:
        allocation = allocate(allocator, Profile(infos), pattern, recipe.sparsity, rounded)
    prunable = sum(info.numel for info in infos)
    needs_data = needs != "none" or allocator.needs != "none" or recipe.refine.epochs > 0
    if needs_data:
        check_context(stack.model, recipe.calibration.seqlen)
    if recipe.refine.epochs:
        holds_out(recipe.calibration.samples, recipe.refine, recipe.seed)
    text = recipe.calibration.text
    fetched = text in NAMED_TEXTS and text != "wiki"  # a plan does not download
    characters = len(load_text(text, "calibration").text) if needs_data and not fetched else 0
    tokens = recipe.calibration.samples * recipe.calibration.seqlen if needs_data else 0
    streams = 2 if recipe.refine.epochs else 1  # behind pruned blocks, and behind dense ones
    placement = place(
        demand_of(recipe, stack, chosen, solver, allocator, characters), parse_size(memory), available()
    )
    checkpoint = stack.checkpoint
    assert checkpoint is not None
    seconds = _seconds(stack, recipe, infos, needs, allocator)
    disk_of_search = 0
    if getattr(allocator, "searches", False):
        check_study(allocator.study, opened=False)
        cost = cost_of_search(
            recipe,
            infos,
            min(stack.compute, checkpoint.storage_dtype, key=lambda d: d.itemsize),
            stack.hidden_bytes,
        )
        disk_of_search = cost["disk"]
        took = _seconds_of_search(stack, recipe, infos, cost, needs, allocator)
        seconds = {**seconds, "total": round(seconds["total"] + took, 1), "search": took}
    written = checkpoint.bytes_in(DTYPES[recipe.dtype] if recipe.dtype else None)
    return Plan(
        source=str(source),
        recipe=recipe.to_mapping(),
        parameters=sum(p.numel() for p in stack.model.parameters()),
        prunable=prunable,
        removed=round(recipe.sparsity * prunable),
        blocks=[
            {"index": i, "linears": len(linears), "parameters": sum(x.numel for x in linears)}
            for i, linears in enumerate(chosen)
        ],
        linears=[{"name": x.name, "shape": list(x.shape), "block": x.block} for x in infos],
        allocation=allocation,
        memory={
            "peak": placement.peak,
            "smallest": placement.smallest,
            **placement.parts,
        },
        hidden_states="disk" if placement.spill else "memory",
        disk={
            # The solutions of a search are gone before the first block is written.
            "peak": max(written + min(written, SHARD_BYTES), disk_of_search)
            + (3 if placement.spill else 2) * streams * tokens * stack.hidden_bytes,
            "checkpoint": written,
            "hidden_states": streams * tokens * stack.hidden_bytes,
            "search": disk_of_search,
        },
        seconds=seconds,
        notes=rounded + _notes(recipe, allocation is None, needs_data and fetched),
        reads_text=needs_data,
    )


def _notes(recipe: Recipe, undecided: bool, text_unknown: bool) -> list[str]:
    notes = []
    options = recipe.allocator.options
    if getattr(recipe.make_allocator(), "searches", False):
        earnest = f", prunes up to {options['finalists'] + 1} in earnest" if options["finalists"] else ""
        notes.append(
            f"{recipe.allocator.name} tries up to {options['trials']} allocations on held-out text{earnest}, "
            "and keeps solutions of every linear on disk until it is over"
        )
    elif undecided:
        notes.append(
            f"{recipe.allocator.name} decides once it has measured the dense model; `tawny profile` shows what it would see"
        )
    if text_unknown:
        notes.append(
            f"{recipe.calibration.text} is not fetched for a plan: the memory to tokenise it is not counted"
        )
    return notes


def _seconds(
    stack: Stack, recipe: Recipe, infos: tuple[LinearInfo, ...], solver_needs: str, allocator: Any
) -> dict[str, float]:
    tokens = recipe.calibration.samples * recipe.calibration.seqlen
    forward_flops = 2.0 * sum(p.numel() for b in stack.blocks for p in b.parameters() if p.dim() > 1)
    fast, exact = measured_speed(stack.compute), measured_speed(torch.float32)
    profile_tokens = _profile_tokens(recipe)
    seconds = {"profile": 0.0, "forward": 0.0, "statistics": 0.0, "solve": 0.0}
    searches = getattr(allocator, "searches", False)
    if allocator.needs != "none" and not searches:
        seconds["profile"] = profile_tokens * forward_flops / fast * _OVERHEAD
    if hasattr(allocator, "work"):
        seconds["profile"] += allocator.work(infos) / exact
    if solver_needs != "none":
        seconds["forward"] = 2 * tokens * forward_flops / fast * _OVERHEAD
    if solver_needs == "hessian":
        seconds["statistics"] = tokens * _seconds_a_token(stack)
    seconds["solve"] = _solving(recipe.make_solver(), infos)
    if recipe.refit:
        seconds["refit"] = sum(2.0 * 12 * x.shape[0] * x.shape[1] ** 2 / exact for x in infos)
    if recipe.refine.epochs:
        # Backward costs two forwards; and the dense samples walk beside the pruned ones.
        passes = 1 + 3 * recipe.refine.epochs
        seconds["refine"] = passes * tokens * forward_flops / fast * _OVERHEAD
    seconds = {phase: round(value, 1) for phase, value in seconds.items()}
    return {"total": round(sum(seconds.values()), 1), **seconds}


def _profile_tokens(recipe: Recipe, samples: int | None = None) -> int:
    """How many tokens, of all samples or so many, what an allocator reads is measured on."""
    count, seqlen = recipe.calibration.samples if samples is None else samples, recipe.calibration.seqlen
    return profile_count(recipe, count, seqlen) * seqlen


def _seconds_a_token(stack: Stack) -> float:
    """Of the Hessians of every block."""
    per_block = sum(group[0].shape[1] ** 2 for group in sharing_inputs(stack.linears(0)))
    rounded = stack.compute == torch.bfloat16 and rounds_products()
    speed = measured_speed(torch.bfloat16 if rounded else torch.float32)
    # Inputs multiplied as bfloat16 are so fast that converting them and adding up take as long again.
    around = 2.6 if rounded else 1.3
    return around * per_block * len(stack) / speed


def _solving(solver: Any, infos: tuple[LinearInfo, ...]) -> float:
    """Seconds of all solves."""
    if solver.needs != "hessian":
        return sum(x.numel for x in infos) * 2e-8
    work = getattr(solver, "work", Work(tall=3.0, square=3.0))
    exact = measured_speed(torch.float32)
    rounded = measured_speed(native_dtype()) if work.rounded else exact
    a_row = work.tall / exact + work.rounded / rounded
    a_column = work.square / exact + work.rounded_square / rounded
    products = sum(2.0 * x.shape[1] ** 2 * (a_row * x.shape[0] + a_column * x.shape[1]) for x in infos)
    return products + sum(x.numel for x in infos) * work.passes * _PASS


def _seconds_of_search(
    stack: Stack,
    recipe: Recipe,
    infos: tuple[LinearInfo, ...],
    cost: dict[str, int],
    solver_needs: str,
    allocator: Any,
) -> float:
    """One walk behind pruned blocks and one of the dense model, a solve a level, held-out tokens with their logits; finalists."""
    text = stack.config.get_text_config()
    logits = 2.0 * int(text.vocab_size) * int(text.hidden_size)
    forward = 2.0 * sum(p.numel() for b in stack.blocks for p in b.parameters() if p.dim() > 1)
    speed = measured_speed(stack.compute)
    samples = min(cost["samples"], recipe.calibration.samples)
    tokens = samples * recipe.calibration.seqlen
    walk = (2 * tokens + _profile_tokens(recipe, samples)) * forward / speed * _OVERHEAD
    if needs_of_search(recipe) == "hessian":
        walk += tokens * _seconds_a_token(stack)
    solver = stand_in(recipe.make_allocator(), recipe.solver.name, recipe.make_solver())[1]
    solve = _solving(solver, infos) * cost["levels"]
    final = recipe.with_overrides([("refine.epochs", 0), ("calibration.samples", samples)])
    earnest = cost["finalists"] * _seconds(stack, final, infos, solver_needs, allocator)["total"]
    return round(walk + solve + earnest + cost["tokens"] * (forward + logits) / speed * _OVERHEAD, 3)
