"""What a search found: its record, what is said of it, and the files it writes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tawny.allocation.profile import Allocation
from tawny.choosing.evolution import Outcome, Trial
from tawny.choosing.member_space import SparsitySpace
from tawny.choosing.scores import Scores, lead
from tawny.choosing.settings import SearchSettings
from tawny.choosing.solving import Solved
from tawny.errors import OutputError
from tawny.machine import peak_memory
from tawny.model import durable
from tawny.model.durable import writing
from tawny.model.streams import Samples
from tawny.pruning.prepare import Job
from tawny.pruning.profiling import block_sparsities
from tawny.pruning.session import Session
from tawny.recipe.merge import changes_from, resolve_recipe
from tawny.recipe.schema import as_list, default_name
from tawny.record import finite
from tawny.report.pages import or_say
from tawny.run.place import Workplace

_DRAWN_M = "5"
_ENDINGS = (".yaml", ".yml")
_BESIDE = (".json", ".png", ".svg")
_USE = "# Use it: tawny prune"  # begins the line by which an earlier search knows its file again


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes:
        allocation: `{linear: sparsity}`, which meets the budget to the weight.
        winner: what it comes from: an allocator with its strengths, and how often that was refined.
        margin: how much nearer to the dense model than uniform it is, as a share of uniform's divergence.
        margin_stderr: standard error of the margin over the windows that decided; None where none was proven, or one
            window decided.
        says: the winner and its margin, in one line.
        cut_short: why not everything was tried, or "".
        trials: everything tried: name, divergence, windows, and for the last few verdict and proof.
        blocks: sparsity of each block under uniform, under the best of each family, and under what was found.
        seconds: by phase.
    """

    recipe: dict[str, Any]
    settings: dict[str, Any]
    source: str
    out: str | None
    sparsity: float
    allocation: Allocation
    winner: str
    margin: float
    margin_stderr: float | None
    says: str
    cut_short: str
    solver: str
    levels: dict[str, Any]
    held_out: dict[str, int]
    tokens_tried: int
    generations: list[float]
    trials: list[dict[str, Any]]
    blocks: dict[str, list[float]]
    profile: list[dict[str, Any]]
    text: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, Any]
    memory: dict[str, Any]
    date: str
    seconds: dict[str, float]
    peak_memory: int
    resumed: int
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def facts_of(
    outcome: Outcome,
    space: SparsitySpace,
    settings: SearchSettings,
    solved: Solved,
    scores: Scores,
    held_out: Samples,
    deciding: Sequence[int],
) -> dict[str, Any]:
    """The allocation that was found, and what is told of finding it."""
    winner = outcome.winner
    allocation = winner.allocation or space.allocation(winner.levels)  # a proposal is not rounded to levels
    stderr, warnings = None, list(solved.warnings)
    proven = [scores.proven(each) for each in (allocation, space.allocation(space.uniform))]
    if winner is not outcome.uniform and min(map(len, proven)) > 1:
        _, stderr = lead(*proven)
        if outcome.margin < 2 * stderr:
            warnings.append(
                f"{len(deciding)} windows of {held_out.seqlen} held-out tokens do not tell the winner from uniform: "
                f"{outcome.margin:.1%} ± {stderr:.1%} nearer; give a longer text, or more search.windows"
            )
    pictured = _pictured(settings, space, outcome) | {"found": allocation}
    return {
        "allocation": allocation,
        "winner": _named(winner),
        "margin": outcome.margin,
        "margin_stderr": stderr,
        "says": _says(outcome, space, stderr),
        "cut_short": outcome.cut_short,
        "tokens_tried": scores.tokens,
        "generations": finite(outcome.generations),
        "trials": [_row(trial) for trial in outcome.trials],
        "blocks": {name: block_sparsities(a, solved.profile) for name, a in pictured.items()},
        "profile": list(solved.profile.measures),
        "warnings": warnings,
    }


def _pictured(settings: SearchSettings, space: SparsitySpace, outcome: Outcome) -> dict[str, Allocation]:
    """Uniform, and the best that was tried of each family."""
    pictured = {"uniform": space.allocation(space.uniform)}
    for family in settings.families:
        tried = [t for t in outcome.trials if t.allocation and t.name.startswith(f"{family} ")]
        if tried:
            best = min(tried, key=lambda trial: (-trial.windows, trial.score))
            pictured[best.name] = best.allocation or {}
    return pictured


def tell(session: Session, settings: SearchSettings, facts: dict[str, Any], out: str | None) -> Searched:
    """The record of a search."""
    record, clock = session.record, session.run.clock
    session.run.progress.say(facts["says"])
    clock.seconds["total"] = clock.elapsed
    return Searched(
        recipe=record.recipe,
        settings=asdict(settings),
        source=record.source,
        out=out,
        sparsity=session.job.recipe.sparsity,
        text=record.text,
        versions=record.versions,
        machine=record.machine,
        memory=record.memory,
        date=record.date,
        seconds={phase: round(seconds, 3) for phase, seconds in clock.seconds.items()},
        peak_memory=max(peak_memory(), record.peak_memory),
        resumed=record.resumed,
        **facts,
    )


def _named(trial: Trial) -> str:
    if not trial.origin:
        return trial.name
    return f"{trial.origin}, refined {trial.depth} time{'s' * (trial.depth != 1)}"


def _row(trial: Trial) -> dict[str, Any]:
    return {
        "name": _named(trial),
        "divergence": finite(trial.score),
        "windows": trial.windows,
        "verdict": finite(trial.verdict),
        "proof": finite(trial.proof),
        "broke_down": trial.proof == math.inf,
    }


def _says(outcome: Outcome, space: SparsitySpace, stderr: float | None) -> str:
    """The winner and its margin over uniform, in one line."""
    winner, uniform = outcome.winner, outcome.uniform
    tail = f"; {outcome.cut_short}" if outcome.cut_short else ""
    finalists = sum(trial.proof is not None for trial in outcome.trials)
    proven = f", {finalists} of them pruned in earnest" if finalists else ""
    if len(space.levels) == 1:
        return f"uniform: a sparsity of {space.target:.1%} leaves no room for other allocations{tail}"
    if winner is uniform:
        return f"uniform wins: none of {len(outcome.trials)} allocations came nearer to the dense model{proven}{tail}"
    return (
        f"{_named(winner)} wins: {outcome.margin:.1%}{'' if stderr is None else f' ± {stderr:.1%}'} nearer to the dense model than uniform "
        f"(divergence {winner.last_word:.4f} against {uniform.last_word:.4f} nats a token, "
        f"{len(outcome.trials)} tried{proven}){tail}"
    )


def accepts_allocation(source: Path | None, out: Path, overwrite: bool, continued: bool) -> None:
    """Raise an OutputError unless the file `out` and those beside it can be written.

    Args:
        source: folder of the model, of which nothing is replaced.
        continued: the search goes on with an unfinished one, which may have written those beside it already.
    """
    if out.suffix.lower() not in _ENDINGS:
        raise OutputError(f"--out {out} does not end in .yaml: name a file such as allocation.yaml")
    files = [out, *(out.with_suffix(ending) for ending in _BESIDE if not continued)]
    there = [path for path in files if path.exists()]
    names = ", ".join([str(there[0]), *(path.name for path in there[1:])]) if there else ""
    if there and source is not None and out.absolute().parent.samefile(source) and not _searched(out):
        raise OutputError(f"a search would replace {names} of the model; choose another --out")
    if there and not overwrite:
        exist = "exists" if len(there) == 1 else "exist"
        raise OutputError(f"{names} {exist}; choose another --out or pass --overwrite")
    if out.is_dir():
        raise OutputError(f"--out {out} is a folder; name a file in it, such as {out / 'allocation.yaml'}")
    if not out.absolute().parent.is_dir():
        raise OutputError(f"--out {out}: its folder does not exist; make it first")


def _searched(out: Path) -> bool:
    """Whether `out` is of an earlier search, so that the files beside it are, too."""
    return out.is_file() and _USE in out.read_text(encoding="utf-8", errors="replace")


def write(searched: Searched, session: Session) -> None:
    """The allocation, everything that was tried, and a picture; the allocation comes last, so that it means all is there."""
    place = session.place
    assert place is not None
    out = place.out

    def draw(suffix: str) -> None:
        from tawny.report.plot import plot_allocations

        picture = place.steps / f"picture{suffix}"
        plot_allocations(
            searched.blocks,
            picture,
            sparsity=searched.sparsity,
            outliers=[measures["outlier_share"][_DRAWN_M] for measures in searched.profile],
            M=_DRAWN_M,
            title=searched.source,
        )
        durable.replace(picture, place.out.with_suffix(suffix))

    for suffix in (".png", ".svg"):
        or_say(out.with_suffix(suffix), partial(draw, suffix), session.run.progress)
    facts = json.dumps(finite(searched.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    lines = [
        f"# {searched.says}",
        f"{_USE} MODEL {_options(searched, session.job)} -a {shlex.quote(out.name)} --out DIR",
        *(f"{name}: {value!r}" for name, value in searched.allocation.items()),
    ]
    deliver_allocation(place, facts, "\n".join(lines) + "\n")


def deliver_allocation(place: Workplace, tried: str, allocation: str) -> None:
    """Write the two files, each in one piece. The allocation comes last, so that it means all is there."""
    for path, text in ((place.out.with_suffix(".json"), tried), (place.out, allocation)):
        with writing(path):
            durable.write(path, text.encode())
    place.discard()


def _options(searched: Searched, job: Job) -> str:
    """What `tawny prune` has to be told beside the file. Of whole members the file's own mean: they miss the one asked for."""
    sparsity, recipe = searched.sparsity, job.recipe
    if job.couplings or job.mixtures:
        removed = math.fsum(searched.allocation[x.name] * x.numel for x in job.linears)
        sparsity = removed / sum(x.numel for x in job.linears)
    words = ["-s", f"{sparsity:.6g}"]
    chosen = {"pattern": recipe.pattern, "solver": recipe.solver.name}
    if recipe.pattern != "unstructured":
        words += ["-p", recipe.pattern]
    if recipe.solver.name != default_name("solver", {"pattern": recipe.pattern, "compat": recipe.compat}):
        words += ["-m", recipe.solver.name]
    named = {"values.kind": "--values", "calibration.samples": "--samples", "calibration.seqlen": "--seqlen"}
    for key, value in changes_from(recipe, resolve_recipe(chosen, sparsity=recipe.sparsity)).items():
        if key == "calibration.text":
            for text in as_list(value):
                words += ["--calibration", text]
        elif not key.startswith("allocator."):
            plain = value if isinstance(value, str) else json.dumps(value)
            words += [named[key], plain] if key in named else ["-o", f"{key}={plain}"]
    return shlex.join(words)
