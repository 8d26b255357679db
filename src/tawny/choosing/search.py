"""`tawny search`: solve at several levels once, try allocations on held-out text, refine the best.

1. One walk through the dense model: statistics, what candidates measure, every linear solved at every level (solving.py), or
   the experts of every block scored (expert_levels.py).
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

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tawny.allocation.joint import Survey
from tawny.allocation.profile import Allocation, Profile
from tawny.calibration.windows import TokenisedText, held_out_windows
from tawny.choosing.candidates import allocators_to_try, surveyed
from tawny.choosing.demand import SearchDemand, held_back, searched_factor, searched_windows, solver_of_levels
from tawny.choosing.divergence import Levelled, Scorer
from tawny.choosing.evolution import Proposal, evolve
from tawny.choosing.expert_levels import score_experts
from tawny.choosing.member_space import SparsitySpace, space_of
from tawny.choosing.rehearsal import rehearse
from tawny.choosing.scores import Scores
from tawny.choosing.searched import Searched, accepts_allocation, facts_of, tell, write
from tawny.choosing.settings import SearchSettings, what_is_searched
from tawny.choosing.solving import WALK, LevelStore, level_dtype, solve_levels
from tawny.errors import NumericalError, TextError
from tawny.model.source import resolve
from tawny.model.streams import Samples, repeated_tokens
from tawny.model.trust import opens_models
from tawny.process_group import refuse_several
from tawny.progress import Progress, silent
from tawny.pruning.experts import Cut, asking_experts, check_experts
from tawny.pruning.output import asking_output
from tawny.pruning.prepare import Job
from tawny.pruning.profiling import allocate
from tawny.pruning.session import Purpose, Session, open_session, text_or_tokens
from tawny.pruning.visitors import Solve
from tawny.recipe.schema import Recipe
from tawny.run.place import Workplace, place_of
from tawny.run.walk import Visitor


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
) -> Searched:
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
    refuse_several("a search")
    named, given = text_or_tokens(calibration)
    recipe, settings = what_is_searched(recipe, settings, {**named, **keys})
    read = None if isinstance(source, nn.Module) else resolve(source, progress.say)
    with open_session(
        recipe,
        source,
        Purpose(
            samples=True,
            demand=partial(SearchDemand.of, settings),
            held_out=partial(_held_out, settings),
            identity={"verb": "search", "search": asdict(settings)},
            writes_checkpoint=False,
        ),
        progress,
        place=None if out is None else Workplace(place_of(out), partial(accepts_allocation, read)),
        overwrite=overwrite,
        memory=memory,
        tokenizer=tokenizer,
        calibration=given,
        alone=True,
    ) as session:
        with session.run.clock("search"):
            facts = session.run.journal.once("search", lambda: _search(session, settings))
        searched = tell(session, settings, facts, None if out is None else str(out))
        if session.place is not None:
            write(searched, session)
        return searched


def _held_out(settings: SearchSettings, job: Job, tokens: TokenisedText) -> Tensor:
    wanted, length = job.recipe.calibration, min(job.recipe.calibration.seqlen, settings.length)
    return held_out_windows(tokens, wanted.samples, wanted.seqlen, job.recipe.seed, length, settings.held_out)


def _search(session: Session, settings: SearchSettings) -> dict[str, Any]:
    """Steps 1 to 5: what is told of them, and the allocation."""
    job, run = session.job, session.run
    if job.mixtures:
        check_experts(session)
    space = space_of(job, settings.levels)
    calibration, held_out = _split(session, settings)
    samples = calibration.first(max(1, math.ceil(settings.tokens / calibration.seqlen)))
    searched = searched_windows(settings, len(held_out))
    windows, deciding = range(searched), range(searched, len(held_out))
    name_of_solver, solver = solver_of_levels(job)
    survey = surveyed(settings.families)
    asks = replace(session, samples=calibration)
    with ExitStack() as leaving:
        store = None if job.mixtures else leaving.enter_context(_level_store(session, space))
        session = leaving.enter_context(asking_output(asks, searched_factor(settings, job)))
        levelled: Levelled
        pruning: Callable[[Session, Allocation], Visitor] = Solve
        if store is None:
            pruning = partial(Cut, answers=asking_experts(session))
            solved, levelled = score_experts(
                session, space, pruning, samples=samples, held_out=held_out, survey=survey
            )
        else:
            levelled = store
            solved = solve_levels(
                session, space, store, samples=samples, held_out=held_out, solver=solver, survey=survey
            )
        kept = None if session.place is None or run.journal.folder is None else session.place.steps
        scores = Scores(None if kept is None else kept / "scores.jsonl")
        scorer = Scorer(job, levelled, held_out, solved.hidden, run.progress, scores)
        rounds = 2 + math.ceil(settings.trials / settings.offspring)
        run.progress.phase("trying allocations", rounds, "rounds")
        outcome = evolve(
            space,
            _proposals(settings, job, space, survey, solved.profile),
            scorer,
            trials=settings.trials,
            offspring=settings.offspring,
            windows=windows,
            deciding=deciding or windows,
            seed=job.recipe.seed,
            stopped=lambda: _over(settings, run.clock.elapsed),
            step=_telling(session, settings, scores, rounds),
            prove=partial(_prove, session, pruning, samples, scorer),
            finalists=settings.finalists,
        )
    repeated = repeated_tokens(held_out.seqlen, settings.repeat, begun=_begun(session))
    return {
        **facts_of(outcome, space, settings, solved, scores, held_out, deciding),
        "solver": name_of_solver,
        "levels": {
            **dict(zip(("from", "to"), space.reach, strict=True)),
            "count": len(space.levels),
            "bytes": 0 if store is None else store.bytes,
        },
        "held_out": {
            "windows": len(windows),
            "deciding": len(deciding),
            "tokens": held_out.seqlen,
            "repeated": repeated,
        },
    }


def _proposals(
    settings: SearchSettings, job: Job, space: SparsitySpace, survey: Survey, profile: Profile
) -> Iterator[Proposal]:
    """What the candidates wish for, as far as there are levels for it."""
    sparsity = job.recipe.sparsity
    for family, name, allocator in allocators_to_try(settings.families, sparsity, len(profile.span)):
        wish = allocate(allocator, survey.profile_of(family, profile), job.budget_pattern, sparsity)
        yield Proposal(name, space.within(wish))


def _prove(
    session: Session,
    pruning: Callable[[Session, Allocation], Visitor],
    samples: Samples,
    scorer: Scorer,
    allocations: Sequence[Allocation],
    windows: Sequence[int],
) -> Iterator[float]:
    """The divergence of each model that is pruned in earnest, one when it is asked for."""
    scores = scorer.scores
    unknown = sum(scores.proof(allocation) is None for allocation in allocations)
    session.run.progress.phase("pruning finalists", unknown * len(session.job.stack))
    for number, allocation in enumerate(allocations, 1):
        known = scores.proof(allocation)
        if known is None:
            by_window: list[float] = []
            known = math.inf  # a model that breaks down loses
            with suppress(NumericalError):
                name = f"{number} of {len(allocations)}"
                behind = rehearse(session, allocation, samples, scorer.samples(windows), name, pruning)
                known, by_window = scorer.judge(behind, windows)
                del behind  # its hidden states, before the next walk
            scores.prove(allocation, known, by_window)
        yield known


def _telling(
    session: Session, settings: SearchSettings, scores: Scores, rounds: int
) -> Callable[[str], None]:
    """What is told after each round: rounds end when time is up, and those that an earlier run measured took none."""
    if settings.seconds is None:
        return session.run.progress.step
    most, before, numbers = settings.seconds, scores.tokens, itertools.count(1)
    known, begun = 0, time.perf_counter()

    def step(_: str) -> None:
        nonlocal known, begun
        done, left = next(numbers), max(0.0, most - session.run.clock.elapsed)
        if scores.tokens == before:
            known, begun = done, time.perf_counter()
        else:
            left = min(left, (time.perf_counter() - begun) / (done - known) * max(0, rounds - done))
        session.run.progress.at(done, left)

    return step


@contextmanager
def _level_store(session: Session, space: SparsitySpace) -> Iterator[LevelStore]:
    """Room for the solutions beside the output; where a journal is kept, they outlive a search that was stopped."""
    journal, dtype, count = session.run.journal, level_dtype(session.job.stack), len(space.levels)
    size = space.bytes_in(dtype)
    with ExitStack() as leaving:
        folder = journal.steps(leaving)
        session.run.progress.say(
            f"the search solves each linear at {count} level{'s' * (count > 1)} from {space.told(space.low)} to "
            f"{space.told(space.high)}: {size / 1e9:.2g} GB in {folder} until it is over"
        )
        yield leaving.enter_context(LevelStore(folder / "levels", size, dtype, kept=journal.walk(WALK)[0]))


def _split(session: Session, settings: SearchSettings) -> tuple[Samples, Samples]:
    """Calibration samples, and held-out windows."""
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
    return samples, held_out.repeating(settings.repeat, begun=_begun(session))


def _begun(session: Session) -> bool:
    """Whether the windows of the text begin with BOS; tokens that were given are taken as they are."""
    return bool(session.record.text.get("bos"))


def _over(settings: SearchSettings, spent: float) -> str:
    over = settings.seconds is not None and spent > settings.seconds
    return f"the budget of {settings.budget} ended the search" if over else ""
