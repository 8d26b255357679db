"""What a fit made: its folder, its record, and what is said of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tawny.allocation.profile import LinearInfo
from tawny.choosing.finalists import Judged, lead_over_uniform
from tawny.choosing.kept import keep_measured
from tawny.choosing.level import Level
from tawny.choosing.settings import FitSettings
from tawny.choosing.table import ZEROS_GAIN, Finalist, Table
from tawny.kinds import solved_kind
from tawny.machine import peak_memory
from tawny.pruning.prepare import Job
from tawny.pruning.session import Session
from tawny.recipe.files import dump_recipe
from tawny.recipe.schema import Recipe
from tawny.record import finite
from tawny.report.pages import or_say, write_beside
from tawny.report.plot import plot_fit
from tawny.report.publish import refresh
from tawny.run.place import Workplace
from tawny.words import kl_text, percent, size

ALLOCATION = "allocation.yaml"


@dataclass(frozen=True)
class Fitted:
    """What a fit made.

    Attributes:
        budget: bytes that were allowed; None where a speed was asked for.
        speed: tokens a second, `asked` and `measured` of the packed model, and what the choice `assumes`; None otherwise.
        bytes: of the weight files and their index.
        bits: of those files, a weight of the model.
        finalists: name, bytes, bits, expected and measured divergence with its standard error, perplexity, top-1.
        lead: how much nearer to the dense model than the best uniform one, as a share of that one's divergence.
        says: what was chosen, in one line; `zeros` where zeros were used, in another.
        roles: by role, such as `mlp.up_proj`: bits of a survivor and sparsity, one a block; None where a block has none.
        curve: sizes and the divergence that is expected there.
    """

    source: str
    out: str
    recipe: dict[str, Any]
    settings: dict[str, Any]
    budget: int | None
    speed: dict[str, Any] | None
    bytes: int
    bits: float
    winner: str
    says: str
    zeros: str
    lead: float
    lead_stderr: float
    finalists: list[dict[str, Any]]
    roles: dict[str, dict[str, list[float | None]]]
    curve: list[tuple[int, float]]
    linears: dict[str, dict[str, Any]]
    head: dict[str, float]
    embedding: dict[str, float]
    held_out: dict[str, int]
    warnings: list[str]
    seconds: dict[str, float]
    peak_memory: int
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _zeros_told(job: Job, tried: Sequence[Level], finalist: Finalist, others: Sequence[Finalist]) -> str:
    """Where zeros were used, of the levels that were tried."""
    if not any(level.sparsity for level in tried):
        return "no zeros: the programs that read this format do not skip them"
    with_zeros = [x for x in job.linears if finalist.levels[x.name].sparsity]
    if not with_zeros and any(level.sparsity for other in others for level in other.levels.values()):
        return "no zeros: the model with zeros that was made is farther from the dense one"
    if not with_zeros:
        return f"no zeros: at this size they are expected to gain less than {percent(ZEROS_GAIN, 0)} over bits alone"
    blocks = sorted({x.block for x in with_zeros})
    names = sorted({x.name.rpartition(".")[2] for x in with_zeros})
    share = sum(x.numel * finalist.levels[x.name].sparsity for x in with_zeros) / sum(
        x.numel for x in job.linears
    )
    return (
        f"zeros in {len(with_zeros)} of {len(job.linears)} linears ({', '.join(names)}), in blocks "
        f"{', '.join(map(str, blocks))}: {percent(share)} of all weights in blocks"
    )


def _says(
    best: Judged,
    judged: Sequence[Judged],
    lead: tuple[float, float],
    speed: Mapping[str, Any] | None,
    fitting: Finalist | None,
) -> str:
    row = best.row
    head = f"{row['name']}: {size(row['bytes'])}, {row['bits']:.3f} bits a weight, KL {kl_text(row['kl'], row['kl_stderr'])}"
    if speed is not None:
        head += f", {speed['measured']:.1f} tokens a second (target: {speed['asked']:g})"
    uniform = next((each.row for each in judged if each.row["uniform"]), None)
    if row["uniform"]:
        return f"{head}; nothing that fits came nearer to the dense model"
    if uniform is None and fitting is not None:
        times = fitting.expected / best.finalist.expected
        return f"{head}; {times:.2f} times its divergence was expected of {fitting.name}, which was not made"
    if uniform is None:
        return f"{head}; no uniform model fits"
    return (
        f"{head}; {100 * lead[0]:.1f} ± {100 * lead[1]:.1f} % nearer to the dense model than {uniform['name']} "
        f"({size(uniform['bytes'])}, KL {uniform['kl']:.4f})"
    )


def _roles(job: Job, finalist: Finalist) -> dict[str, dict[str, list[float | None]]]:
    """By role, such as `mlp.up_proj`: bits of a survivor and sparsity in each block, of several linears their mean."""
    here: dict[str, list[list[LinearInfo]]] = {}
    for x in job.linears:
        role = re.sub(r"\d+", "*", x.name).partition("*.")[2] or x.name
        here.setdefault(role, [[] for _ in job.by_block])[x.block].append(x)

    def means(blocks: list[list[LinearInfo]], of: Callable[[Level], float]) -> list[float | None]:
        weights = [[(of(finalist.levels[x.name]), x.numel) for x in linears] for linears in blocks]
        return [sum(v * n for v, n in each) / sum(n for _, n in each) if each else None for each in weights]

    return {
        role: {
            "bits": means(blocks, lambda level: solved_kind(level.kind).bits),
            "sparsity": means(blocks, lambda level: level.sparsity),
        }
        for role, blocks in here.items()
    }


def tell(
    session: Session,
    settings: FitSettings,
    table: Table,
    best: Judged,
    judged: Sequence[Judged],
    *,
    speed: dict[str, Any] | None,
    held_out: Mapping[str, int],
    warnings: Sequence[str],
) -> Fitted:
    """The record of a fit, of which `best` is the output."""
    job, place, clock, record = session.job, session.place, session.run.clock, session.record
    assert place is not None
    chosen, measured = best.finalist, table.measured
    lead = lead_over_uniform(best, judged)
    clock.seconds["total"] = clock.elapsed
    return Fitted(
        source=job.source,
        out=str(place.out),
        recipe=job.recipe.to_mapping(),
        settings=asdict(settings),
        budget=table.room.file_bytes,
        speed=speed,
        bytes=best.row["bytes"],
        bits=best.row["bits"],
        winner=chosen.name,
        says=_says(best, judged, lead, speed, table.uniform()),
        zeros=_zeros_told(job, table.every, chosen, [each.finalist for each in judged]),
        lead=lead[0],
        lead_stderr=lead[1],
        finalists=[each.row for each in judged],
        roles=_roles(job, chosen),
        curve=table.curve(),
        linears={
            name: {**asdict(level), "expected": table.cost(name, level)}
            for name, level in ((x.name, chosen.levels[x.name]) for x in job.linears)
        },
        head=measured.head,
        embedding=measured.embedding,
        held_out=dict(held_out),
        warnings=list(warnings),
        seconds={phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        peak_memory=max(peak_memory(), record.peak_memory),
        resumed=record.resumed,
    )


def deliver(session: Session, fitted: Fitted, folder: Path, measured: Mapping[str, Any]) -> None:
    """Make a finalist's packed folder the output."""
    place = session.place
    assert place is not None
    keep_measured(folder, measured)
    facts = finite(fitted.to_dict())
    beside = folder.with_suffix(".yaml")
    if beside.exists():
        shutil.copyfile(beside, folder / ALLOCATION)
    _own(folder, place, facts, session.record.memory_before)
    for suffix in (".png", ".svg"):
        path = folder / f"fit{suffix}"
        or_say(path, partial(plot_fit, facts, path), session.run.progress)
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_beside(folder / "fit.json", text)
    place.deliver(folder)


def _own(folder: Path, place: Workplace, facts: Mapping[str, Any], memory_before: int) -> None:
    """Let record and recipe name what will be there, and let record, card and page tell of the fit."""
    path = folder / "run.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    allocator = plain["recipe"]["allocator"]
    if "path" in allocator:
        allocator["path"] = str(place.out / ALLOCATION)
    kept = (
        "budget",
        "speed",
        "winner",
        "says",
        "zeros",
        "lead",
        "lead_stderr",
        "finalists",
        "held_out",
        "warnings",
        "seconds",
        "resumed",
    )
    plain |= {"out": str(place.out), "source": facts["source"], "fit": {key: facts[key] for key in kept}}
    plain |= {"peak_memory": facts["peak_memory"], "memory_before": memory_before}
    write_beside(path, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")
    write_beside(folder / "recipe.yaml", dump_recipe(Recipe.from_mapping(plain["recipe"])))
    refresh(folder)
