"""What a search asks of memory, by what its candidates and solver collect."""

from __future__ import annotations

import pytest
import torch

import tawny
from tawny.choosing.demand import SearchDemand, solver_of_levels
from tawny.choosing.settings import SearchSettings
from tawny.model.streams import Samples
from tawny.pruning.prepare import prepare
from tawny.recipe.merge import resolve_recipe
from tawny.run.memory import Load
from tawny.solvers import SOLVERS
from tests.tiny import tiny_model, tokens


def job_of(model, **keys):
    recipe = resolve_recipe(
        None, **{"sparsity": 0.6, "allocator": "uniform", "solver": "wanda", "compute": "float32", **keys}
    )
    return prepare(recipe, model, tawny.progress.silent, "cpu")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("candidates", "solver", "needed"),
    [("owl,atp", "wanda", "norms"), ("owl,lsa", "wanda", "hessian"), ("atp", "alps", "hessian")],
)
def test_statistics_are_those_that_candidates_and_solver_collect(dense, candidates, solver, needed):
    demand = SearchDemand.of(
        SearchSettings.make(candidates=candidates), job_of(dense, solver=solver), Load(16, 64, 1)
    )
    assert demand.collected == needed
    solving = demand.phases(spill=True)["levels"]
    assert (solving["statistics"] > 0) == (needed == "hessian")


def test_tokens_that_are_given_and_what_solves_the_levels_decide(dense):
    def demand(samples=(128, 2048), given=False, mask=False, solver="wanda", **settings):
        ids = tokens(*samples) if given else None
        some = None if ids is None else Samples(ids, torch.ones_like(ids) if mask else None)
        job, load = job_of(dense, solver=solver), Load(*samples, 1, some)
        return SearchDemand.of(SearchSettings.make(**settings), job, load)

    assert demand((512, 128), given=True).levels.samples == 32768 // 128
    assert demand().levels.samples == 32768 // 2048
    hidden = job_of(dense).stack.hidden_bytes
    assert demand((40, 128), given=True).held_out == 10 * 128 * hidden
    assert demand((40, 64), given=True).held_out == 10 * 64 * hidden
    whole, cut = demand((80, 4096), given=True, mask=True), demand((80, 4096), given=True)
    assert whole.held_out == 4 * cut.held_out and whole.candidates == 4 * cut.candidates

    slow = demand(solver="alps")
    assert isinstance(slow.levels.solver, SOLVERS["sparsegpt"])
    assert isinstance(slow.finals.solver, SOLVERS["alps"])
    assert any(name.startswith("finalists, ") for name in demand().phases(spill=True))
    assert not any(name.startswith("finalists") for name in demand(finalists=0).phases(spill=True))


def test_a_solver_without_a_quicker_one_keeps_its_options(dense):
    name, own = solver_of_levels(job_of(dense, solver={"name": "sparsegpt", "group": 64}))
    assert name == "sparsegpt" and own.group == 64
