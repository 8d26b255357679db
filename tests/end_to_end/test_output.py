"""A prune that asks the model's output first: what becomes of it, how it is continued, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import tawny
from tawny.errors import Interrupted, ModelError, RecipeError
from tawny.progress import Silent
from tawny.pruning import session
from tawny.recipe.merge import resolve_recipe
from tawny.run import journal
from tests.tiny import tiny_model, tokens

KEYS = {"sparsity": 0.6, "allocator": "uniform", "calibration": tokens(6, 24)}


class StopsIn(Silent):
    """Ctrl-C after some steps of a phase."""

    def __init__(self, phase, steps):
        self.stops, self.left, self.now = phase, steps, ""

    def phase(self, name, total, unit="blocks"):
        self.now = name

    def step(self, text):
        if self.now == self.stops:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize(("solver", "factor"), [("sparsegpt", "rows"), ("alps", "rows"), ("alps", "whole")])
def test_a_run_that_was_stopped_gives_the_bytes_of_one_that_was_not(
    solver, factor, dense, tmp_path, monkeypatch
):
    monkeypatch.setattr(journal, "SHARE", float("inf"))  # every block is committed
    keys = {**KEYS, "solver": solver, "output": factor}
    tawny.prune(dense, tmp_path / "whole", **keys)
    for phase in ("asking the output: backward", "pruning"):
        with pytest.raises(Interrupted, match="kept"):
            tawny.prune(dense, tmp_path / "stopped", progress=StopsIn(phase, 1), **keys)
    record = tawny.prune(dense, tmp_path / "stopped", **keys)
    assert record.resumed == 2
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not (tmp_path / "stopped.partial").exists()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2"])
def test_what_is_asked_changes_the_mask_and_keeps_the_budget(family):
    zeros = {}
    for factor in ("none", "rows", "whole"):
        model = tiny_model(family)
        record = tawny.prune(model, solver="alps", output=factor, **KEYS)
        assert record.sparsity == pytest.approx(0.6, abs=1e-4)
        zeros[factor] = torch.cat([(p == 0).flatten() for p in model.parameters()])
    assert not torch.equal(zeros["none"], zeros["rows"]) and not torch.equal(zeros["rows"], zeros["whole"])


def test_hidden_states_on_disk_change_nothing(dense, tmp_path, monkeypatch):
    keys = {**KEYS, "solver": "alps"}
    tawny.prune(dense, tmp_path / "memory", **keys)
    place = session.place_in_memory
    monkeypatch.setattr(session, "place_in_memory", lambda *given: replace(place(*given), spill=True))
    assert tawny.prune(dense, tmp_path / "disk", **keys).memory["hidden_states"] == "disk"
    one, other = weights(tmp_path / "memory"), weights(tmp_path / "disk")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_default_asks_for_the_whole_factor_and_a_named_solver_for_its_own():
    assert resolve_recipe(sparsity=0.6).output.factor == "whole"
    assert resolve_recipe(sparsity=0.6, solver="sparsegpt").output.factor == "none"
    assert resolve_recipe(resolve_recipe(sparsity=0.6), solver="wanda").output.factor == "none"
    assert resolve_recipe(sparsity=0.6, compat="official", solver="alps").output.factor == "none"
    assert resolve_recipe(values="int4").output.factor == "none"
    assert resolve_recipe(sparsity=0.6, solver="sparsegpt", output="rows").output.factor == "rows"


def test_a_recipe_of_version_1_asks_nothing():
    mapping = resolve_recipe(sparsity=0.6).to_mapping()
    assert mapping["version"] == 2 and mapping["output"] == {"factor": "whole", "tokens": 16384}
    del mapping["output"]
    assert resolve_recipe({**mapping, "version": 1}).output.factor == "none"
    assert resolve_recipe({**mapping, "order": "block"}) == resolve_recipe(mapping)
    with pytest.raises(RecipeError, match="version 3 of recipes is unknown"):
        resolve_recipe({**mapping, "version": 3})


def test_more_than_a_solver_makes_use_of_is_refused():
    with pytest.raises(
        RecipeError, match="output whole is more than solver sparsegpt makes use of: expected none or rows"
    ):
        resolve_recipe(sparsity=0.6, solver="sparsegpt", output="whole")


def test_a_live_model_without_gradients_is_refused_in_one_line():
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(ModelError, match="output=none"):
        tawny.prune(model, solver="sparsegpt", output="rows", **KEYS)


def test_a_plan_counts_the_walk_back(dense):
    keys = {"sparsity": 0.6, "solver": "alps", "text": "wiki"}
    asked, plain = (tawny.plan(dense, output=factor, **keys) for factor in ("whole", "none"))
    assert "output" in asked.seconds and "output" not in plain.seconds
    assert asked.disk["peak"] > plain.disk["peak"]
    assert json.loads(json.dumps(asked.to_dict()))["recipe"]["output"]["factor"] == "whole"
