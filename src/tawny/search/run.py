"""The allocator `auto`: solve at several levels once, try allocations on held-out text, refine the best.

1. One walk through the dense model: statistics, what allocators measure, every linear solved at every level (levels.py).
2. Uniform, then each candidate allocator over a grid of strengths, its defaults first, then where Optuna expects more (grid.py).
3. Switches of budget between blocks and linears, generation by generation (evolution.py).
4. The last few and uniform on windows that took no part so far.
5. The best of these and uniform are pruned in earnest (rehearsal.py) and measured on more such windows; the best model's
   allocation it is.

The held-out windows are drawn, with the recipe's seed, from what the calibration windows leave of the text. Each ends with a
passage it held before, since in text of short documents it would hardly show what copying from its context a model lost. The
bound is a number of trials, so the same recipe gives the same bytes; a time budget, or a study that other machines join,
may change what is tried, and the record says so.
"""

from __future__ import annotations

__all__ = ["allocate_by_search", "write_search"]

import hashlib
import json
import math
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tawny.allocation.auto import Auto, seconds_of
from tawny.allocation.profile import Allocation, LinearInfo, Profile
from tawny.errors import NumericalError, TextError
from tawny.model.identity import code_identity, tokens_identity
from tawny.model.streams import Samples, repeated_tokens
from tawny.patterns import NM
from tawny.pruning.journal import LEVELS
from tawny.pruning.profiling import Together, allocate, block_sparsities
from tawny.record import finite
from tawny.report.pages import or_say
from tawny.search.cost import held_back, measuring, searched_windows, stand_in, store_bytes
from tawny.search.evolution import Outcome, Trial, search
from tawny.search.grid import Grid, check_study, families_for
from tawny.search.levels import LevelStore, Solved, outside_digest, solve_levels
from tawny.search.rehearsal import rehearse
from tawny.search.scores import Scores
from tawny.search.scoring import Scorer
from tawny.search.space import Space, make_space

if TYPE_CHECKING:
    from tawny.pruning.run import Run

_DRAWN_M = "5"


def allocate_by_search(run: Run) -> Allocation:
    """The allocation that a run's `auto` finds; kept in the journal, so that it is found once, and so is the way to it.

    Raises:
        TextError: nothing is left of the text to compare models on.
        MissingFeature: Optuna is not installed.
        OutputError: the disk has no room for the solutions.
    """
    found = run.journal.once("search", lambda: _search(run))
    run.journal.forget(LEVELS)
    if run.output is not None:
        shutil.rmtree(_place(run.output.work), ignore_errors=True)
    run.record.search = found["search"]
    if run.journal.walk("prune")[0] == 0:  # later, the finished blocks bring them along
        run.record.warnings += found["warnings"]
    run.record.profile = {"blocks": found["measures"]}
    infos = _infos(run)
    run.profile = Profile(infos, tuple(found["measures"]))
    run.progress.say(found["search"]["says"])
    allocation: Allocation = found["allocation"]
    return allocation


def _infos(run: Run) -> tuple[LinearInfo, ...]:
    return tuple(LinearInfo(x.name, x.shape, i) for i, linears in enumerate(run.by_block) for x in linears)


def _search(run: Run) -> dict[str, Any]:
    """Steps 1 to 5; what `run.json` says of them, and the allocation."""
    auto: Auto = run.allocator
    check_study(auto.study)
    recipe = run.recipe
    space = make_space(_infos(run), run.pattern, recipe.sparsity, auto.levels, auto.step)
    samples, held_out = _split(run, auto)
    count = len(held_out)
    searched = searched_windows(auto, count)
    windows, deciding = range(searched), range(searched, count)
    name_of_solver, solver = stand_in(auto, recipe.solver.name, run.solver)
    together = measuring(auto)
    with _level_store(run, space) as store:
        scores = _scores(run, store)
        solved = solve_levels(
            run, space, store, solver=solver, measuring=together, samples=samples, held_out=held_out
        )
        scorer = Scorer(run.stack, run.by_block, store, held_out, solved.hidden, run.progress, scores)
        run.progress.phase("trying allocations", 2 + math.ceil(auto.trials / auto.offspring), "rounds")

        def prove(allocations: Sequence[Allocation], windows: Sequence[int]) -> Iterator[float]:
            run.progress.phase("pruning finalists", len(allocations) * len(run.stack))
            for number, allocation in enumerate(allocations, 1):
                name = f"{number} of {len(allocations)}"
                known = scores.proof(allocation)
                if known is not None:
                    yield known
                    continue
                score = math.inf  # a model that breaks down loses
                with suppress(NumericalError):
                    behind = rehearse(run, allocation, samples, scorer.samples(windows), name)
                    score = scorer.judge(behind, windows)
                    del behind  # its hidden states, before the next walk
                scores.prove(allocation, score)
                yield score

        grid = _grid(run, auto, together, solved, space, _study_name(run, solved.weights, samples, held_out))
        try:
            outcome = search(
                space,
                grid,
                scorer,
                trials=auto.trials,
                offspring=auto.offspring,
                windows=windows,
                deciding=deciding or windows,
                seed=recipe.seed,
                stopped=lambda: _over(auto, run.elapsed - scores.began),
                step=run.progress.step,
                prove=prove,
                finalists=auto.finalists,
            )
        except BaseException:
            with suppress(Exception):  # the study may be what has failed
                grid.free()
            raise
    winner = outcome.winner
    allocation = space.allocation(winner.levels)
    if winner.allocation is not None:
        allocation = winner.allocation  # not rounded to levels
    pictured = _pictured(auto, space, outcome) | {"auto": allocation}
    return {
        "allocation": allocation,
        "measures": list(solved.profile.measures),
        "warnings": solved.warnings,
        "search": {
            "winner": _named(winner),
            "margin": outcome.margin,
            "says": _says(outcome, space),
            "cut_short": outcome.cut_short,
            "shared": auto.study is not None,
            "study_failed": grid.failed,
            "levels": {"from": space.sparsity(0, space.low), "to": space.sparsity(0, space.high)}
            | {"count": len(space.levels), "bytes": store.bytes},
            "held_out": {"windows": len(windows), "deciding": len(deciding), "tokens": held_out.seqlen}
            | {"repeated": repeated_tokens(held_out.seqlen, auto.repeat, begun=_begun(run))},
            "solver": name_of_solver,
            "tokens_tried": scores.tokens,
            "generations": finite(outcome.generations),
            "trials": [_row(trial) for trial in outcome.trials],
            "blocks": {name: block_sparsities(a, solved.profile) for name, a in pictured.items()},
            "outliers": [m["outlier_share"][_DRAWN_M] for m in solved.profile.measures],
        },
    }


@contextmanager
def _level_store(run: Run, space: Space) -> Iterator[LevelStore]:
    """Room for the solutions beside the output; where a journal is kept, they outlive a search that was stopped."""
    folder = Path(tempfile.mkdtemp(prefix="tawny-")) if run.output is None else run.output.work
    if run.output is None:
        run.progress.say(
            "a live model without an output keeps the solutions of its search in the temporary folder"
        )
    dtype = _dtype(run)
    size = store_bytes(space, dtype) / 1e9
    run.progress.say(
        f"the search solves each linear at {len(space.levels)} level{'s' * (len(space.levels) > 1)} from {_level(space, space.low)} to "
        f"{_level(space, space.high)}: {size:.2g} GB in {folder} until it is over"
    )
    try:
        store = LevelStore(_place(folder), space, dtype, kept=run.journal.walk(LEVELS)[0])
        try:
            yield store
        finally:
            store.close()
    finally:
        if run.output is None:
            shutil.rmtree(folder, ignore_errors=True)


def _place(work: Path) -> Path:
    return work / "search"


def _scores(run: Run, store: LevelStore) -> Scores:
    """What an earlier run of this search has measured; the time it took counts."""
    kept = run.journal.folder is not None
    scores = Scores(store.folder / "scores.jsonl" if kept else None, lambda: run.elapsed)
    committed = run.journal.state.get("seconds", {}).get("total", 0.0)
    run.started -= max(0.0, scores.reached - committed)
    run.clock.seconds["search"] = max(0.0, max(scores.reached, committed) - scores.began)
    return scores


def _grid(run: Run, auto: Auto, together: Together, solved: Solved, space: Space, name: str) -> Grid:
    """What is tried before anything is refined; every family reads its measures from the one profile."""
    recipe, profile = run.recipe, solved.profile

    def allocation_of(family: str, allocator: Any) -> Allocation:
        own = together.profile_of(family, profile) if family in together.allocators else profile
        return space.within(allocate(allocator, own, run.pattern, recipe.sparsity))

    return Grid(
        families_for(auto.families, recipe.sparsity, len(profile.span)),
        allocation_of,
        seed=recipe.seed,
        extra=min(16, auto.trials // 8),
        storage=auto.study,
        name=name,
        say=run.progress.say,
        owner=f"{socket.gethostname()}:{run.output.work.resolve()}" if run.output else uuid.uuid4().hex,
    )


def _pictured(auto: Auto, space: Space, outcome: Outcome) -> dict[str, Allocation]:
    """Uniform, and the best that was tried of each family."""
    pictured = {"uniform": space.allocation(space.uniform)}
    for family in auto.families:
        tried = [t for t in outcome.trials if t.allocation and t.name.startswith(f"{family} ")]
        if tried:
            best = min(tried, key=lambda trial: (-trial.windows, trial.score))
            pictured[best.name] = best.allocation or {}
    return pictured


def _level(space: Space, level: int) -> str:
    if isinstance(space.pattern, NM):
        return f"{space.pattern.n - level}:{space.pattern.m}"
    return f"{space.sparsity(0, level):.1%}" if space.linears else "0%"


def _dtype(run: Run) -> torch.dtype:
    """Forwards round weights to the compute dtype anyway; nothing finer than the checkpoint is kept either."""
    checkpoint = run.stack.checkpoint
    stored = run.stack.compute if checkpoint is None else checkpoint.storage_dtype
    return min(stored, run.stack.compute, key=lambda dtype: dtype.itemsize)


def _split(run: Run, auto: Auto) -> tuple[Samples, Samples]:
    """Calibration samples for the solutions, and held-out windows."""
    assert run.samples is not None
    samples = run.samples
    if run.held_out is not None:
        held_out = Samples(run.held_out)
    else:  # tokens were given: some of them are kept back while allocations are tried
        kept, length = held_back(auto, samples)
        if len(samples) < 2:
            raise TextError(
                "auto compares models on tokens held out of the calibration: give at least 2 samples"
            )
        cut = len(samples) - kept
        mask = samples.mask
        held_out = Samples(samples.tokens[cut:, :length], None if mask is None else mask[cut:])
        samples = samples.first(cut)
    return samples.first(max(1, math.ceil(auto.tokens / samples.seqlen))), held_out.repeating(
        auto.repeat, begun=_begun(run)
    )


def _begun(run: Run) -> bool:
    """Whether the windows of the text begin with BOS; tokens that were given are taken as they are."""
    return bool(run.record.text.get("bos"))


def _over(auto: Auto, spent: float) -> str:
    over = auto.budget is not None and spent > seconds_of(auto.budget)
    return f"the budget of {auto.budget} ended the search" if over else ""


def _study_name(run: Run, weights: str, samples: Samples, held_out: Samples) -> str:
    """Everything that a score depends on, and nothing else; `weights` is the hash of the blocks."""
    recipe = {key: value for key, value in run.recipe.to_mapping().items() if key != "refine"}
    allocator = {
        key: value
        for key, value in recipe["allocator"].items()
        if key not in ("trials", "offspring", "finalists", "budget", "study")
    }
    tokens = [tokens_identity(samples), tokens_identity(held_out)]
    computed = {"compute": str(run.stack.compute), **code_identity()}
    own = [run.record.parameters, weights, outside_digest(run.stack)]
    known = [{**recipe, "allocator": allocator, **computed}, tokens, *own]
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
    return f"tawny-{digest[:16]}"


# --- in words ------------------------------------------------------------------------------------------------


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
    }


def _says(outcome: Outcome, space: Space) -> str:
    """The winner and its margin over uniform, in one line."""
    winner, uniform = outcome.winner, outcome.uniform
    tail = f"; {outcome.cut_short}" if outcome.cut_short else ""
    finalists = sum(trial.proof is not None for trial in outcome.trials)
    proven = f", {finalists} of them pruned in earnest" if finalists else ""
    if len(space.levels) == 1:
        return f"auto: uniform, since a sparsity of {space.target:.1%} leaves no room for other allocations{tail}"
    if winner is uniform:
        return f"auto: uniform wins, none of {len(outcome.trials)} allocations came nearer to the dense model{proven}{tail}"
    return (
        f"auto: {_named(winner)} wins, {outcome.margin:.1%} nearer to the dense model than uniform "
        f"(divergence {winner.last_word:.4f} against {uniform.last_word:.4f} nats a token, "
        f"{len(outcome.trials)} tried{proven}){tail}"
    )


def write_search(run: Run) -> None:
    """`allocation.yaml`, which `-a file` reads, and its picture, beside the weights."""
    found, output = run.record.search, run.output
    if found is None or output is None:
        return

    def draw(name: str) -> None:
        from tawny.report.plot import plot_allocations

        plot_allocations(
            found["blocks"],
            output.partial / name,
            sparsity=run.recipe.sparsity,
            outliers=found["outliers"],
            M=_DRAWN_M,
            title=run.source,
        )

    lines = [
        f"# {found['says']}",
        "# Use it again: tawny prune MODEL -s SPARSITY -a file -o allocator.path=allocation.yaml",
        *(f"{name}: {value!r}" for name, value in run.record.allocation.items()),
    ]
    output.write_text("allocation.yaml", "\n".join(lines) + "\n")
    for name in ("allocation.png", "allocation.svg"):
        or_say(output.partial / name, partial(draw, name), run.progress)
