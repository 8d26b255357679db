"""`tawny plan prune`: estimate memory, disk and time of a `prune` without running it.

Memory is added up from shapes; time is multiplied out from the matrix products of the walk and the speed this
machine shows on such products just now. Both are estimates and say so; sizes on disk are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from tawny.allocation.profile import Allocation, LinearInfo, Profile
from tawny.calibration.inputs import read_inputs
from tawny.calibration.mixture import OWN, Texts, load_texts, parse_texts
from tawny.calibration.output import factor_bytes
from tawny.calibration.text import NAMED_TEXTS
from tawny.decoding.author import author_of
from tawny.model.context import seqlen_of
from tawny.model.shards import SHARD_BYTES
from tawny.model.source import load_tokenizer
from tawny.model.stack import Stack
from tawny.model.structure import TOKENS, input_of
from tawny.model.trust import opens_models
from tawny.precision import DTYPES, measured_speed, native_dtype, rounds_products
from tawny.progress import Progress, silent
from tawny.pruning.prepare import Job, demand_of, notices, output_count, prepare, profile_count
from tawny.pruning.profiling import spend
from tawny.pruning.refine import holds_out
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.run.memory import Load, available, parse_size, place, sharing_inputs
from tawny.solvers.base import Work
from tawny.words import size

# Elementwise work, attention and Python beside the matrix products of a forward, as a factor on their time.
_OVERHEAD = 1.7
# Seconds a weight of elementwise work on what stays in the cache, with two threads.
_PASS = 3e-10


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What every plan says.

    Attributes:
        memory: estimated peak bytes of the whole process, the smallest budget that would do, and the parts of the peak.
        disk: bytes written at the peak.
        seconds: estimated, by phase.
    """

    source: str
    parameters: int
    memory: dict[str, int]
    disk: dict[str, int]
    seconds: dict[str, float]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Plan(Planned):
    """What a recipe would do to a model, without doing it.

    Attributes:
        blocks: `[{index, linears, parameters}]`.
        removed: weights; about, where the allocation is not known.
        allocation: by linear name, or None where the allocator has to see data first.
        memory, seconds: peak bytes of the whole process with the smallest budget that would do, and seconds by phase, estimated.
        disk: bytes written at the peak (hidden states that resuming needs among them), and of the finished checkpoint.
        hidden_states: where they are kept, "memory" or "disk".
        reads_text: whether calibration text is needed at all.
        seqlen: hidden states that a sample makes.
    """

    recipe: dict[str, Any]
    prunable: int
    removed: int
    blocks: list[dict[str, Any]]
    linears: list[dict[str, Any]]
    allocation: dict[str, float] | None
    hidden_states: str
    reads_text: bool
    seqlen: int


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
    job = prepare(recipe, source, progress, recipe.device)
    stack, infos, wanted = job.stack, job.linears, recipe.calibration
    allocation = None
    rounded: list[str] = []
    if not (job.allocator.measures_weights or job.chooses_blocks):
        allocation, _ = spend(job, Profile(infos), rounded)
    prunable = sum(info.numel for info in infos)
    if recipe.refine.epochs:
        holds_out(wanted.samples, recipe.refine, recipe.seed)
    budget = parse_size(memory)
    load, notes = load_of(job, budget) if job.needs_samples else (Load(wanted.samples, wanted.seqlen, 0), [])
    tokens = load.samples * load.seqlen if job.needs_samples else 0
    streams = 2 if recipe.refine.epochs else 1  # after pruned blocks, and after dense ones
    placement = place(demand_of(job, load), budget, available(job.stack.device))
    checkpoint = stack.checkpoint
    assert checkpoint is not None
    written = checkpoint.bytes_in(DTYPES[recipe.dtype] if recipe.dtype else None)
    most = written + min(written, SHARD_BYTES)
    most += (3 if placement.spill else 2) * streams * tokens * stack.hidden_bytes
    # The factors of the output lie there until the end, and what enters every block while they are made.
    if job.factor != "none":
        most += sum(factor_bytes(x.shape[0], job.factor) // 2 for x in infos)
        if placement.spill:
            felt = output_count(recipe, load.samples, load.seqlen) * load.seqlen
            most += felt * len(stack) * stack.hidden_bytes
    if recipe.values.names:  # a packed folder is no larger
        most = max(most, 2 * written)
        notes += [
            "`tawny prune` packs this: the dense model and the packed one lie on the disk until that is done"
        ]
    return Plan(
        source=job.source,
        recipe=recipe.to_mapping(),
        parameters=sum(p.numel() for p in stack.model.parameters()),
        prunable=prunable,
        removed=_removed(job, allocation),
        blocks=[
            {"index": i, "linears": len(linears), "parameters": sum(x.numel for x in linears)}
            for i, linears in enumerate(job.by_block)
        ],
        linears=[{"name": x.name, "shape": list(x.shape), "block": x.block} for x in infos],
        allocation=allocation,
        memory=placement.told(),
        hidden_states="disk" if placement.spill else "memory",
        disk={
            "peak": most,
            "checkpoint": written,
            "hidden_states": streams * tokens * stack.hidden_bytes,
        },
        seconds=seconds_of(job, load),
        notes=notices(job, tokens) + rounded + _notes(job, allocation is None) + notes,
        reads_text=job.needs_samples,
        seqlen=load.seqlen,
    )


def _removed(job: Job, allocation: Allocation | None) -> int:
    """Weights: those of the allocation, or about so many where it is not known; of blocks whole ones."""
    if allocation is not None:
        return sum(round(allocation[x.name] * x.numel) for x in job.linears)
    share = job.recipe.sparsity
    if job.chooses_blocks:
        blocks = sum(bool(linears) for linears in job.by_block)
        share = min(blocks - 1, math.floor(share * blocks + 0.5)) / blocks
    return round(share * sum(x.numel for x in job.linears))


def load_of(job: Job, budget: int | None) -> tuple[Load, list[str]]:
    """What will be calibrated on, and notes where a text is not there yet: a plan neither downloads nor writes."""
    wanted, model = job.recipe.calibration, job.stack.model
    if input_of(model) != TOKENS:
        one, _ = read_inputs(job.stack, job.folder, wanted.text, 1, job.recipe.seed, strict=wanted.strict)
        return Load(wanted.samples, one.seqlen, 0), []
    seqlen = seqlen_of(model, wanted.seqlen)
    ahead = texts_ahead(wanted.text, job.folder, job.folder, job.recipe.seed, job.stack.compute, budget)
    return Load(wanted.samples, seqlen, ahead.characters), ahead.notes


@dataclass(frozen=True)
class TextsAhead:
    """Texts that a run will read, as far as they are known before it.

    Attributes:
        characters: of those that are here.
        author: bytes of the model that writes one of them; 0 where none does.
        written: its share of what is read.
        fetched: names of those that a run would fetch.
    """

    characters: int = 0
    author: int = 0
    written: float = 0.0
    fetched: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)


def texts_ahead(
    texts: Texts,
    folder: Path | None,
    author: Path | None,
    seed: int,
    compute: torch.dtype,
    budget: int | None = None,
) -> TextsAhead:
    """What texts will take; `folder` has the tokenizer, and `author` the model that writes `self`."""
    sources = parse_texts(texts)
    fetched = [x.spec for x in sources if x.spec in NAMED_TEXTS and x.spec != "wiki"]
    here = [x.spec for x in sources if x.spec not in (*fetched, OWN)]
    chats = any(x.messages for x in sources)
    tokenizer = load_tokenizer(folder) if chats and folder else None
    characters = load_texts(here, "calibration", tokenizer).characters if here else 0
    bytes_, written = 0, sum(x.share for x in sources if x.spec == OWN)
    notes: list[str] = []
    if author and written:
        writer = author_of(author, tokenizer, seed, compute, memory=budget)
        writer.check_memory()
        bytes_ = writer.bytes_
        notes.append(f"the model writes its text first, whole in memory: {size(bytes_)}")
    notes += [
        f"{text} is not fetched for a plan: the memory to tokenise it is not counted" for text in fetched
    ]
    return TextsAhead(characters, bytes_, written, fetched, notes)


def _notes(job: Job, undecided: bool) -> list[str]:
    recipe = job.recipe
    if not undecided:
        return []
    if job.chooses_blocks:
        notes = [f"{recipe.solver.name} decides which blocks leave once it has measured the dense model"]
    else:
        notes = [
            f"{recipe.allocator.name} decides once it has measured the dense model; `tawny profile` shows what it would see"
        ]
    if job.chooses_blocks or job.couplings or job.mixtures:
        notes.append(f"about so many weights are removed: whole {job.budget_pattern} go")
    return notes


def forward_seconds(stack: Stack) -> float:
    """Of one token through all blocks."""
    flops = 0.0
    for index, block in enumerate(stack.blocks):
        weights = sum(p.numel() for p in block.parameters() if p.dim() > 1)
        idle = sum((1 - stack.routed(linear)) * linear.numel for linear in stack.linears(index))
        flops += 2 * stack.positions_at(index) * (weights - idle)
    return flops / measured_speed(stack.compute) * _OVERHEAD


def seconds_of(job: Job, load: Load) -> dict[str, float]:
    recipe, stack, infos = job.recipe, job.stack, job.linears
    tokens, factor = load.samples * load.seqlen, recipe.output.factor or "none"
    forward, exact = forward_seconds(stack), measured_speed(torch.float32)
    seconds = {"profile": 0.0, "forward": 0.0, "statistics": 0.0, "solve": 0.0}
    if job.factor != "none":
        # Once to the end, and through each block and back, which of activations alone takes as long.
        felt = load.seqlen * output_count(recipe, load.samples, load.seqlen)
        factors = sum(factor_bytes(x.shape[0], job.factor) / 8 for x in infos)
        seconds["output"] = felt * (3 * forward + 2 * factors / exact)
    if job.allocator.needs != "none":
        count = profile_count(recipe, load.samples, load.seqlen)
        seconds["profile"] = count * load.seqlen * forward
    seconds["profile"] += job.allocator.work(infos) / exact
    if job.chooses_blocks:
        seconds["choose"] = _comparing(job) * job.block_solver.tokens * forward
    if job.needs != "none":
        seconds["forward"] = 2 * tokens * forward
    if job.needs == "hessian":
        seconds["statistics"] = tokens * _seconds_a_token(stack)
    if job.couplings:
        consumers = tuple(info for info in infos if info.name == info.coupling)
        works = [partial(job.member_solver.work, output=factor)] * (job.needs == "hessian")
        seconds["solve"] = _solving(works, job.needs == "hessian", consumers)
    elif not (job.removes_blocks or job.mixtures):
        solver, grid = job.weight_solver, bool(recipe.values.names)
        works = [partial(solver.work, output=factor)] * (solver.needs == "hessian")
        works += [partial(solver.rounding, output=factor)] * grid
        seconds["solve"] = _solving(works, solver.needs == "hessian", infos)
    if recipe.refit:
        seconds["refit"] = sum(2.0 * 12 * x.shape[0] * x.shape[1] ** 2 / exact for x in infos)
    if recipe.refine.epochs:
        # Backward costs two forwards; and the dense samples walk beside the pruned ones.
        passes = 1 + 3 * recipe.refine.epochs
        seconds["refine"] = passes * tokens * forward
    return rounded_seconds(seconds)


def rounded_seconds(seconds: dict[str, float]) -> dict[str, float]:
    """Of each phase, and in `total`."""
    rounded = {phase: round(value, 1) for phase, value in seconds.items()}
    return {"total": round(sum(rounded.values()), 1), **rounded}


def _comparing(job: Job) -> float:
    """Forwards of the whole model that it takes to choose blocks: half of one for each candidate, of logits a whole one."""
    blocks, solver = len(job.stack), job.block_solver
    if solver.compares == "block":
        return 1.0
    return (blocks + solver.again * max(0, round(job.recipe.sparsity * blocks) - 1)) / 2 + blocks


def _seconds_a_token(stack: Stack) -> float:
    """Of the Hessians of every block."""
    products = sum(
        stack.positions_at(index) * stack.routed(group[0]) * group[0].shape[1] ** 2
        for index in range(len(stack))
        for group in sharing_inputs(stack.linears(index))
    )
    return products * _product_seconds(stack)


def _product_seconds(stack: Stack) -> float:
    """Of a multiplication and an addition, for each pair of activations: half of such a product is computed, and mirrored."""
    rounded = stack.compute == torch.bfloat16 and rounds_products()
    speed = measured_speed(torch.bfloat16 if rounded else torch.float32)
    # Inputs multiplied as bfloat16 are so fast that converting them and adding up take as long again.
    return (2.6 if rounded else 1.3) / speed


def _solving(
    works: Sequence[Callable[[int, int], Work]], exact_solver: bool, infos: tuple[LinearInfo, ...]
) -> float:
    """Seconds of all solves."""
    seconds, exact = 0.0, measured_speed(torch.float32)
    rounded = exact if native_dtype() is torch.float32 else measured_speed(native_dtype())
    for work_of, info in product(works, infos):
        out, width = info.shape
        work = work_of(out, width)
        a_row = work.tall / exact + work.rounded / rounded
        a_column = work.square / exact + work.rounded_square / rounded
        seconds += 2.0 * width**2 * (a_row * out + a_column * width) + info.numel * work.passes * _PASS
    return seconds if exact_solver else seconds + sum(x.numel for x in infos) * 2e-8
