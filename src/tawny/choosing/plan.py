"""`tawny plan fit` and `tawny plan search`: what they would make and take, before anything is measured.

Sizes are those of the files. Which linear gets which kind is not known before the measuring, so the kinds that are shown
are chosen as if every weight mattered alike, with the errors that bits and zeros cost SmolLM2-135M (docs/log/fit.md); from the
folder of an earlier fit they are those that it measured. Times are estimates from shapes, as for `prune`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tawny.choosing.demand import (
    FitDemand,
    SearchDemand,
    asked_windows,
    role_of,
    searched_windows,
    solver_of_levels,
)
from tawny.choosing.formats import FORMATS, check_aim
from tawny.choosing.kept import Measured, read_measured
from tawny.choosing.level import PROBE, SPARSITIES, Level, Measures
from tawny.choosing.limit import Target, room_for, smallest
from tawny.choosing.measuring import few_bits, probes_bytes
from tawny.choosing.member_space import space_of
from tawny.choosing.pace import measured_pace
from tawny.choosing.settings import FitSettings, SearchSettings, what_is_fitted, what_is_searched
from tawny.choosing.sizes import Sizes
from tawny.choosing.solving import level_dtype
from tawny.choosing.table import Finalist, Table
from tawny.errors import RecipeError
from tawny.kinds import solved_kind
from tawny.model.context import check_context
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.pruning.plan import Planned, forward_seconds, load_of, rounded_seconds, seconds_of
from tawny.pruning.prepare import Job, notices, prepare
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe
from tawny.run.memory import Load, available, parse_size, place

# Of a linear's output by Wanda, as a multiple of what int3 loses by rounding (docs/log/fit.md, q_proj).
_ZEROS = {0.5: 1.68, 0.7: 5.21}
# Seconds a weight, two threads: of rounding a sample of rows to every kind and the whole to one, and of packing.
_ROUNDING, _PACKING = 5e-7, 1e-7


@dataclass(frozen=True, kw_only=True)
class FitPlan(Planned):
    """What a fit would make and take.

    Attributes:
        asked: `bytes`, `bits` and `speed`, of which one is not None.
        budget: bytes that files may take; None for a speed.
        smallest: bytes of the smallest model there is of it.
        kinds: of each kind, bytes of the model with it in every linear and the head, and whether that `fits`.
        chosen: bytes of the model in all, of `blocks`, `head` (with embeddings that are tied to it), `embedding` and `rest`; the
            share of the weights in blocks of each kind; the share of zeros; the kinds of head and embedding.
        expected: divergence from the dense model, nats a token, where it was measured; else None.
        assumes: what a speed is turned into bytes by; "" for a size.
        memory, disk, seconds: peak bytes and seconds by phase, estimated.
    """

    recipe: dict[str, Any]
    settings: dict[str, Any]
    asked: dict[str, Any]
    budget: int | None
    smallest: int
    kinds: list[dict[str, Any]]
    chosen: dict[str, Any]
    expected: float | None
    assumes: str
    finalists: list[str]


@opens_models
def plan_fit(
    source: str | Path,
    *,
    size: str | int | None = None,
    bits: float | None = None,
    speed: float | None = None,
    ram: str | int | None = None,
    context: int | None = None,
    recipe: Recipe | None = None,
    settings: FitSettings | None = None,
    memory: str | int | None = None,
    measured: str | Path | None = None,
    to: str | None = None,
    kinds: str | None = None,
    template: str | Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **keys: Any,
) -> FitPlan:
    """What `fit` would do with the same arguments.

    Args:
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: as `fit` would, for everything that can be known without work.
    """
    target = Target.of(size, bits, speed, ram, context)
    recipe, settings = what_is_fitted(recipe, settings, keys, to=to, kinds=kinds, template=template)
    known = None if measured is None else Measured.kept_in(read_measured(Path(measured)))
    job = prepare(recipe, source, progress, recipe.device)
    check_aim(settings, target)
    sizes = FORMATS[settings.to].sizes(job, settings, None, progress)
    room = room_for(job, target, sizes, lambda: measured_pace(job.linears, progress))
    if known is not None and set(known.measures) != {x.name for x in job.linears}:
        raise RecipeError(f"what {measured} holds was measured of another model than {source}")
    table = Table(job, room, known or _alike(job, room.sizes))
    finalists = table.finalists()
    best = min(finalists, key=lambda each: each.expected)
    check_context(job.stack.model, recipe.calibration.seqlen)
    limit = parse_size(memory)
    load, notes = load_of(job, limit)
    placement = place(FitDemand.of(settings, job, load), limit, available(job.stack.device))
    checkpoint = job.stack.checkpoint
    assert checkpoint is not None
    dense, probes = checkpoint.bytes_in(None), probes_bytes(job)
    # Each finalist is written dense before it is packed, and those that are packed stay until one has won.
    disk = max(probes, dense + sum(each.bytes for each in finalists))
    return FitPlan(
        source=job.source,
        recipe=recipe.to_mapping(),
        settings=asdict(settings),
        parameters=job.parameters,
        asked=asdict(target),
        budget=room.file_bytes,
        smallest=int(smallest(job, room.sizes, room.sizes)),
        kinds=[_kind(table, kind) for kind in sizes.kinds],
        chosen=_chosen(job, room.sizes, best),
        expected=None if known is None else best.expected,
        assumes="" if room.pace is None else room.pace.told(),
        finalists=[each.name for each in finalists],
        memory=placement.told(),
        disk={"peak": disk, "packed": best.bytes},
        seconds=_seconds(job, load, settings, len(finalists), measured is not None),
        notes=[*notices(job, load.samples * load.seqlen), *notes, *filter(None, [few_bits(job)])],
    )


def _alike(job: Job, sizes: Sizes) -> Measured:
    """As if every weight mattered alike."""
    zeros = {str(share): _ZEROS[share] for share in SPARSITIES if share}
    bits = {kind: solved_kind(kind).error for kind in (*sizes.every, *sizes.every_end, PROBE)}
    measures = {x.name: Measures(bits, zeros, 0, False) for x in job.linears}
    head, embedding = (
        {kind: bits[kind] * numel for kind in sizes.every_end} if numel else {}
        for numel in (sizes.head_numel, sizes.embedding_numel)
    )
    reactions = {x.name: bits[PROBE] * x.numel for x in job.linears}
    return Measured(measures, reactions, head, embedding)


def _kind(table: Table, kind: str) -> dict[str, Any]:
    """A model of one kind, its head in that or the one of most nearly as many bits."""
    bits = solved_kind(kind).bits
    head = min(table.room.sizes.ends, key=lambda end: abs(solved_kind(end).bits - bits), default=None)
    uniform = table.finalist("", dict.fromkeys((x.name for x in table.linears), Level(0.0, kind)), None, head)
    return {"kind": kind, "bytes": uniform.bytes, "fits": uniform.takes <= table.room.budget}


def _chosen(job: Job, sizes: Sizes, best: Finalist) -> dict[str, Any]:
    shares: Counter[str] = Counter()
    zeros = 0.0
    for x in job.linears:
        shares[best.levels[x.name].kind] += x.numel
        zeros += x.numel * best.levels[x.name].sparsity
    total = sum(shares.values())
    head = sizes.of_head(best.head)
    embedding = sizes.of_embedding(best.embedding or best.head)
    return {
        "bytes": best.bytes,
        "bits": 8 * best.bytes / job.parameters,
        "blocks": best.bytes - sizes.rest - head - embedding,
        "head": head,
        "embedding": embedding,
        "rest": sizes.rest,
        "kinds": {kind: shares[kind] / total for kind in sizes.kinds if shares[kind]},
        "zeros": zeros / total,
        "head_kind": best.head,
        "embedding_kind": best.embedding or best.head if sizes.embedding else None,
    }


def _seconds(job: Job, load: Load, settings: FitSettings, finalists: int, measured: bool) -> dict[str, float]:
    """Of asking the output, measuring, reactions, and pruning and comparing finalists."""
    prune = seconds_of(job, load)
    forward = forward_seconds(job.stack)
    asked, length = asked_windows(settings, load.samples, load.seqlen)
    read = asked * length / (load.samples * load.seqlen)  # of the calibration
    models = (
        len({role_of(x.name) for x in job.linears}) + 1
    )  # of each role at its probes, and with a rounded embedding
    reactions = settings.windows * length * forward * models
    judge = 2 * settings.deciding * length * forward
    numel = sum(x.numel for x in job.linears)
    seconds = {
        "output": 0.0 if measured else 4 * asked * length * forward,
        "levels": 0.0 if measured else read * (prune["forward"] + prune["statistics"]) + _ROUNDING * numel,
        "reactions": 0.0 if measured else reactions,
        "finalists": finalists
        * ((prune["forward"] if settings.quick else prune["total"]) + judge + _PACKING * numel),
    }
    return rounded_seconds(seconds)


@dataclass(frozen=True, kw_only=True)
class SearchPlan(Planned):
    """What a search would take.

    Attributes:
        levels: sparsities that each linear is solved at, and their reach.
        held_out: windows to search on and to decide on, and tokens of one, where the text has as many.
        memory, disk, seconds: peak bytes and seconds by phase, estimated.
    """

    recipe: dict[str, Any]
    settings: dict[str, Any]
    solver: str
    levels: dict[str, Any]
    held_out: dict[str, int]


@opens_models
def plan_search(
    source: str | Path,
    *,
    recipe: Recipe | None = None,
    settings: SearchSettings | None = None,
    memory: str | int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
    **keys: Any,
) -> SearchPlan:
    """What `search` would take with the same arguments.

    Args:
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        UserError: as `search` would, for everything that can be known without work.
    """
    recipe, settings = what_is_searched(recipe, settings, keys)
    job = prepare(recipe, source, progress, recipe.device)
    check_context(job.stack.model, recipe.calibration.seqlen)
    limit = parse_size(memory)
    load, notes = load_of(job, limit)
    placement = place(SearchDemand.of(settings, job, load), limit, available(job.stack.device))
    space, (solver, _) = space_of(job, settings.levels), solver_of_levels(job)
    searched = searched_windows(settings, settings.held_out)
    length = min(settings.length, load.seqlen)
    # Levels are solved by a quicker solver where the recipe's names one. Most trials see a quarter of the windows.
    quick = job
    if solver != recipe.solver.name:
        quick = prepare(resolve_recipe(recipe, solver=solver), source, progress, recipe.device)
    calibration = replace(load, samples=min(load.samples, math.ceil(settings.tokens / load.seqlen)))
    prune, level = seconds_of(job, calibration), seconds_of(quick, calibration)
    forward = forward_seconds(job.stack) * length
    seconds = {
        "output": prune.get("output", 0.0),
        "levels": level["forward"] + level["statistics"] + len(space.levels) * level["solve"],
        "trials": settings.trials * max(1, searched // 4) * forward,
        "finalists": (settings.finalists + 1) * (prune["forward"] + prune["statistics"] + prune["solve"])
        if settings.finalists
        else 0.0,
        "deciding": (settings.finalists + 1) * settings.held_out * forward,
    }
    if settings.seconds is not None:
        seconds["trials"] = min(seconds["trials"], settings.seconds)
    return SearchPlan(
        source=job.source,
        recipe=recipe.to_mapping(),
        settings=asdict(settings),
        parameters=job.parameters,
        solver=solver,
        levels={**dict(zip(("from", "to"), space.reach, strict=True)), "count": len(space.levels)},
        held_out={"windows": searched, "deciding": settings.held_out - searched, "tokens": length},
        memory=placement.told(),
        disk={"peak": 0 if job.mixtures else space.bytes_in(level_dtype(job.stack))},
        seconds=rounded_seconds(seconds),
        notes=[*notices(job, load.samples * load.seqlen), *notes],
    )
