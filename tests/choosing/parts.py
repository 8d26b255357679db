"""The parts of a search on a tiny live model, put together by hand."""

from __future__ import annotations

import torch

import tawny
from tawny.allocation.joint import Joint, Survey
from tawny.choosing.member_space import SparsitySpace, space_of
from tawny.choosing.solving import LevelStore, Solved, solve_levels
from tawny.model.streams import Samples
from tawny.pruning.prepare import Job, prepare
from tawny.pruning.session import Session
from tawny.recipe.merge import resolve_recipe
from tawny.record import Record
from tawny.run.journal import Journal
from tawny.run.ranks import Ranks
from tawny.run.run import Clock, Run
from tests.tiny import tokens


def solved_levels(
    model,
    folder,
    *,
    sparsity=0.5,
    pattern="unstructured",
    count=5,
    solver="wanda",
    candidates=None,
    windows=4,
    values=None,
) -> tuple[Job, SparsitySpace, LevelStore, Samples, Solved]:
    """All blocks at the levels of a search."""
    keys = {"sparsity": sparsity, "pattern": pattern, "solver": solver, "values": values}
    recipe = resolve_recipe(allocator="uniform", **keys)
    job = prepare(recipe, model, tawny.progress.silent, "cpu")
    space = space_of(job, count)
    store = LevelStore(folder, space.bytes_in(torch.float32), torch.float32)
    samples, held_out = Samples(tokens(4, 24)), Samples(tokens(windows, 16, seed=9))
    session = Session(
        run=Run(Journal(None), Ranks(alone=True), tawny.progress.silent, Clock()),
        job=job,
        samples=samples,
        held_out=None,
        place=None,
        output=None,
        record=Record(),
    )
    with torch.no_grad():
        solved = solve_levels(
            session,
            space,
            store,
            solver=job.solver,
            survey=Survey(Joint(candidates or {}), (5.0,)),
            samples=samples,
            held_out=held_out,
        )
    return job, space, store, held_out, solved
