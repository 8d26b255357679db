"""`tawny search`: solve at several levels once, try allocations on held-out text, refine the best.

1. One walk through the dense model: statistics, what candidates measure, every linear solved at every level (solving.py).
2. Uniform, then each candidate allocator over a grid of strengths, its defaults first (candidates.py).
3. Switches of budget between blocks and linears, generation by generation (evolution.py).
4. The last few and uniform on windows that took no part so far.
5. The best of these and uniform are pruned in earnest (rehearsal.py) and measured on more such windows. The best model's
   allocation wins, and uniform wins ties.

The held-out windows are drawn, with the recipe's seed, from what the calibration windows leave of the text. Each ends with a
passage it held before: in text of short documents it would hardly show what copying from its context a model lost. The
bound is a number of trials, so the same recipe gives the same answer. A time budget may change what is tried, and the result
says so.
"""

from __future__ import annotations

__all__ = ["Found", "search"]

import itertools
import json
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.allocation.profile import Allocation
from tawny.calibration.windows import TokenisedText, held_out_windows
from tawny.choosing.candidates import allocators_to_try, surveyed
from tawny.choosing.demand import SearchDemand, held_back, searched_windows, solver_of_levels
from tawny.choosing.divergence import Divergence
from tawny.choosing.evolution import Outcome, Proposal, Trial, evolve
from tawny.choosing.member_space import SparsitySpace, space_of
from tawny.choosing.output import USE, SearchOutput, open_search
from tawny.choosing.rehearsal import rehearse
from tawny.choosing.scores import Scores, lead
from tawny.choosing.settings import SearchSettings, own_keys
from tawny.choosing.solving import WALK, LevelStore, level_dtype, solve_levels
from tawny.errors import NumericalError, RecipeError, TextError
from tawny.machine import peak_memory
from tawny.model import durable
from tawny.model.streams import Samples, repeated_tokens
from tawny.model.trust import opens_models
from tawny.patterns import Blocks, Rank
from tawny.process_group import started_by_torchrun
from tawny.progress import Progress, silent
from tawny.pruning.memory_plan import Load
from tawny.pruning.prepare import Job
from tawny.pruning.profiling import allocate, block_sparsities
from tawny.pruning.session import Purpose, Session, open_session, text_or_tokens
from tawny.recipe.merge import changes_from, resolve_recipe
from tawny.recipe.schema import Recipe, as_list, default_name
from tawny.record import finite
from tawny.report.pages import or_say
from tawny.run.resumable import place_of

_DRAWN_M = "5"


@dataclass(frozen=True)
class Found:
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


@opens_models
def search(
    source: str | Path | nn.Module,
    out: str | Path | None = None,
    *,
    recipe: Recipe | None = None,
    settings: SearchSettings | None = None,
    progress: Progress = silent,
    overwrite: bool = False,
    memory: str | int | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    trust_remote_code: bool = False,
    **keys: Any,
) -> Found:
    """Find the allocation under which pruning by `recipe` stays nearest to the dense model on held-out text.

    The model is not changed. A search that was stopped goes on when it is called again, from `OUT.partial`.

    Args:
        source: a folder, hub id, `.gguf` file, `smollm2`, or a live module.
        out: the file to write, such as `allocation.yaml`; `prune(…, allocator="allocation.yaml")` reads it. A picture and
            all that was tried are written beside it, as `.png`, `.svg` and `.json`.
        recipe: of the pruning that the allocation is for. Its allocator is what is searched, and nothing is refined.
        settings: how to search; `keys` override single entries of both (`sparsity=0.6`, `**{"search.trials": 40}`).
        calibration: tokens `[samples, tokens]`, or the name or path of a text. Of tokens some are held out.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        TextError: nothing is left of the text to compare models on.
        OutputError: `out` or a file beside it exists, or the disk has no room for the solutions.
        UserError: something else that was asked for cannot be done.
    """
    if started_by_torchrun():
        raise RecipeError("a search works in one process, and torchrun started several: run it with one")
    named, given = text_or_tokens(calibration)
    of_recipe, own = own_keys({**named, **keys}, "search")
    if of_recipe.get("allocator") is not None:
        raise RecipeError("a search finds the allocation itself: leave the allocator out")
    recipe = resolve_recipe(recipe, {"refine.epochs": 0}, **of_recipe, allocator="uniform")
    if isinstance(pattern := recipe.make_pattern(), Blocks | Rank):
        raise RecipeError(
            f"a search moves weights or whole members from one linear to another, and {pattern} removes neither: give this pattern "
            "to `tawny prune`, or search with another"
        )
    if recipe.values.mean is not None:
        raise RecipeError(
            "a search moves zeros, and values.mean spends the budget in bits: leave values.mean and values.of out, or use a fit"
        )
    settings = SearchSettings.make(settings, **own)

    def held_out(job: Job, tokens: TokenisedText) -> Tensor:
        length = min(recipe.calibration.seqlen, settings.length)
        wanted = recipe.calibration
        return held_out_windows(tokens, wanted.samples, wanted.seqlen, recipe.seed, length, settings.held_out)

    def demand(job: Job, load: Load) -> SearchDemand:
        return SearchDemand.of(settings, job, load)

    with open_session(
        recipe,
        source,
        Purpose(samples=True, demand=demand, held_out=held_out),
        progress,
        place_to_write=None if out is None else open_search(place_of(out), settings, overwrite),
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
        alone=True,
    ) as session:
        with session.run.clock("search"):
            found = session.run.journal.once("search", lambda: _search(session, settings))
        made = _found(session, settings, found, None if out is None else str(out))
        if session.place is not None:
            _write(made, session)
        return made


def _found(session: Session, settings: SearchSettings, found: dict[str, Any], out: str | None) -> Found:
    record, clock = session.record, session.run.clock
    session.run.progress.say(found["says"])
    clock.seconds["total"] = clock.elapsed
    return Found(
        recipe=record.recipe,
        settings=settings.to_mapping(),
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
        **found,
    )


def _search(session: Session, settings: SearchSettings) -> dict[str, Any]:
    """Steps 1 to 5: what is told of them, and the allocation."""
    job, recipe = session.job, session.job.recipe
    space = space_of(job, settings.levels)
    samples, held_out = _split(session, settings)
    searched = searched_windows(settings, len(held_out))
    windows, deciding = range(searched), range(searched, len(held_out))
    name_of_solver, solver = solver_of_levels(settings, job)
    survey = surveyed(settings.families)
    with _level_store(session, space) as store:
        measured = Scores(None if session.run.journal.folder is None else store.folder / "scores.jsonl")
        solved = solve_levels(
            session, space, store, solver=solver, survey=survey, samples=samples, held_out=held_out
        )
        divergence = Divergence(job, store, held_out, solved.hidden, session.run.progress, measured)
        rounds = 2 + math.ceil(settings.trials / settings.offspring)
        session.run.progress.phase("trying allocations", rounds, "rounds")

        def prove(allocations: Sequence[Allocation], windows: Sequence[int]) -> Iterator[float]:
            unknown = sum(measured.proof(allocation) is None for allocation in allocations)
            session.run.progress.phase("pruning finalists", unknown * len(job.stack))
            for number, allocation in enumerate(allocations, 1):
                known = measured.proof(allocation)
                if known is None:
                    by_window: list[float] = []
                    known = math.inf  # a model that breaks down loses
                    with suppress(NumericalError):
                        name = f"{number} of {len(allocations)}"
                        behind = rehearse(session, allocation, samples, divergence.samples(windows), name)
                        known, by_window = divergence.judge(behind, windows)
                        del behind  # its hidden states, before the next walk
                    measured.prove(allocation, known, by_window)
                yield known

        def proposals() -> Iterator[Proposal]:
            blocks = len(solved.profile.span)
            for family, name, allocator in allocators_to_try(settings.families, recipe.sparsity, blocks):
                own = survey.profile_of(family, solved.profile)
                wish = allocate(allocator, own, job.budget_pattern, recipe.sparsity)
                yield Proposal(name, space.within(wish))

        outcome = evolve(
            space,
            proposals(),
            divergence,
            trials=settings.trials,
            offspring=settings.offspring,
            windows=windows,
            deciding=deciding or windows,
            seed=recipe.seed,
            stopped=lambda: _over(settings, session.run.clock.elapsed),
            step=_telling(session, settings, measured, rounds),
            prove=prove,
            finalists=settings.finalists,
        )
    winner = outcome.winner
    allocation = winner.allocation or space.allocation(winner.levels)  # a proposal is not rounded to levels
    stderr, warnings = None, list(solved.warnings)
    proven = [measured.proven(each) for each in (allocation, space.allocation(space.uniform))]
    if winner is not outcome.uniform and min(map(len, proven)) > 1:
        _, stderr = lead(*proven)
        if outcome.margin < 2 * stderr:
            warnings.append(
                f"{len(deciding)} windows of {held_out.seqlen} held-out tokens do not tell the winner from uniform: "
                f"{outcome.margin:.1%} ± {stderr:.1%} nearer; give a longer text, or more search.windows"
            )
    pictured = _pictured(settings, space, outcome) | {"found": allocation}
    begun = _begun(session)
    return {
        "allocation": allocation,
        "winner": _named(winner),
        "margin": outcome.margin,
        "margin_stderr": stderr,
        "says": _says(outcome, space, stderr),
        "cut_short": outcome.cut_short,
        "solver": name_of_solver,
        "levels": dict(zip(("from", "to"), space.reach, strict=True))
        | {"count": len(space.levels), "bytes": store.bytes},
        "held_out": {"windows": len(windows), "deciding": len(deciding), "tokens": held_out.seqlen}
        | {"repeated": repeated_tokens(held_out.seqlen, settings.repeat, begun=begun)},
        "tokens_tried": measured.tokens,
        "generations": finite(outcome.generations),
        "trials": [_row(trial) for trial in outcome.trials],
        "blocks": {name: block_sparsities(a, solved.profile) for name, a in pictured.items()},
        "profile": list(solved.profile.measures),
        "warnings": warnings,
    }


def _telling(
    session: Session, settings: SearchSettings, measured: Scores, rounds: int
) -> Callable[[str], None]:
    """What is told after each round: rounds end when time is up, and those that an earlier run measured took none."""
    if settings.seconds is None:
        return session.run.progress.step
    most, before, numbers = settings.seconds, measured.tokens, itertools.count(1)
    known, begun = 0, time.perf_counter()

    def step(_: str) -> None:
        nonlocal known, begun
        done, left = next(numbers), max(0.0, most - session.run.clock.elapsed)
        if measured.tokens == before:
            known, begun = done, time.perf_counter()
        else:
            left = min(left, (time.perf_counter() - begun) / (done - known) * max(0, rounds - done))
        session.run.progress.at(done, left)

    return step


@contextmanager
def _level_store(session: Session, space: SparsitySpace) -> Iterator[LevelStore]:
    """Room for the solutions beside the output; where a journal is kept, they outlive a search that was stopped."""
    kept = session.run.journal.folder
    folder = kept or Path(tempfile.mkdtemp(prefix="tawny-"))
    dtype = level_dtype(session.job.stack)
    count = len(space.levels)
    session.run.progress.say(
        f"the search solves each linear at {count} level{'s' * (count > 1)} from {space.told(space.low)} to "
        f"{space.told(space.high)}: {space.bytes_in(dtype) / 1e9:.2g} GB in {folder} until it is over"
    )
    try:
        store = LevelStore(
            folder / "levels", space.bytes_in(dtype), dtype, kept=session.run.journal.walk(WALK)[0]
        )
        try:
            yield store
        finally:
            store.close()
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)


def _pictured(settings: SearchSettings, space: SparsitySpace, outcome: Outcome) -> dict[str, Allocation]:
    """Uniform, and the best that was tried of each family."""
    pictured = {"uniform": space.allocation(space.uniform)}
    for family in settings.families:
        tried = [t for t in outcome.trials if t.allocation and t.name.startswith(f"{family} ")]
        if tried:
            best = min(tried, key=lambda trial: (-trial.windows, trial.score))
            pictured[best.name] = best.allocation or {}
    return pictured


def _split(session: Session, settings: SearchSettings) -> tuple[Samples, Samples]:
    """Calibration samples for the solutions, and held-out windows."""
    assert session.samples is not None
    samples = session.samples
    if session.held_out is not None:
        held_out = Samples(session.held_out)
    else:  # tokens were given: some of them are kept back while allocations are tried
        if len(samples) < 2:
            raise TextError(
                "a search compares models on tokens held out of the calibration: give at least 2 samples"
            )
        kept, length = held_back(settings, samples)
        cut = len(samples) - kept
        mask = samples.mask
        held_out = Samples(samples.tokens[cut:, :length], None if mask is None else mask[cut:])
        samples = samples.first(cut)
    few = samples.first(max(1, math.ceil(settings.tokens / samples.seqlen)))
    return few, held_out.repeating(settings.repeat, begun=_begun(session))


def _begun(session: Session) -> bool:
    """Whether the windows of the text begin with BOS; tokens that were given are taken as they are."""
    return bool(session.record.text.get("bos"))


def _over(settings: SearchSettings, spent: float) -> str:
    over = settings.seconds is not None and spent > settings.seconds
    return f"the budget of {settings.budget} ended the search" if over else ""


# --- in words and files ----------------------------------------------------------------------------------------


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


def _write(found: Found, session: Session) -> None:
    """The allocation, everything that was tried, and a picture; the allocation comes last, so that it means all is there."""
    assert isinstance(session.place, SearchOutput)
    place, out = session.place, session.place.out

    def draw(suffix: str) -> None:
        from tawny.report.plot import plot_allocations

        made = place.work / f"picture{suffix}"
        plot_allocations(
            found.blocks,
            made,
            sparsity=found.sparsity,
            outliers=[measures["outlier_share"][_DRAWN_M] for measures in found.profile],
            M=_DRAWN_M,
            title=found.source,
        )
        durable.replace(made, place.out.with_suffix(suffix))

    for suffix in (".png", ".svg"):
        or_say(out.with_suffix(suffix), partial(draw, suffix), session.run.progress)
    told = json.dumps(finite(found.to_dict()), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    lines = [
        f"# {found.says}",
        f"{USE} MODEL {_options(found, session.job)} -a {shlex.quote(out.name)} --out DIR",
        *(f"{name}: {value!r}" for name, value in found.allocation.items()),
    ]
    place.finish(told, "\n".join(lines) + "\n")


def _options(found: Found, job: Job) -> str:
    """What `tawny prune` has to be told beside the file. Of whole members the file's own mean: they miss the one asked for."""
    sparsity, recipe = found.sparsity, job.recipe
    if job.couplings:
        removed = math.fsum(found.allocation[x.name] * x.numel for x in job.linears)
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
