"""`tawny search -p experts`: blocks are tried without experts, finalists are cut in earnest, and prune takes the file."""

from __future__ import annotations

import random

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import tawny
from tawny.allocation.profile import LinearInfo
from tawny.choosing.member_space import make_member_space
from tawny.errors import Interrupted, RecipeError, UserError
from tawny.progress import Silent
from tests.pruning.test_experts import saved
from tests.reference.experts import logits_without
from tests.tiny import tokens

TEXT = tokens(8, 24, seed=5)
PRUNING = {"pattern": "experts", "sparsity": 0.375, "compute": "float32"}
FEW = {
    "search.trials": 12,
    "search.offspring": 4,
    "search.levels": 3,
    "search.windows": 2,
    "search.repeat": 0,
}
FEW |= {"search.candidates": "owl,atp"}


def search(folder, out, **changes):
    return tawny.search(folder, out, **{**PRUNING, "calibration": TEXT, **FEW, **changes})


def kl(p_logits, q_logits):
    p, q = (logits.double().log_softmax(-1) for logits in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 2, 4]), st.floats(0.1, 0.7), st.integers(0, 10**6))
def test_moves_keep_the_budget_and_what_routers_need(blocks, groups, target, seed):
    infos = tuple(
        LinearInfo(f"b{block}.experts.down.{n}", (8, 6), block, coupling=f"b{block}.experts", members=16)
        for block in range(blocks)
        for n in range(16)
    )
    limits = {f"b{block}.experts": (groups, 4) for block in range(blocks)}
    try:
        space = make_member_space(infos, target, 7, limits)
    except RecipeError as error:
        assert "removes no whole expert" in str(error) and target * 16 <= groups
        return
    uniform = space.allocation(space.uniform)
    chance, levels = random.Random(seed), space.uniform
    for _ in range(20):
        levels = space.mutated(levels, chance)
        allocation = space.allocation(levels)
        assert sum(allocation.values()) == pytest.approx(sum(uniform.values()))
        for block in range(blocks):
            (share,) = {allocation[x.name] for x in infos if x.block == block}
            removed = share * 16
            assert removed == pytest.approx(round(removed)) and round(removed) % groups == 0
            assert 0 <= round(removed) <= 12


@pytest.mark.parametrize(
    ("family", "solver"), [("mixtral", "reap"), ("qwen3_moe", "fisher"), ("deepseek_v3", "reap")]
)
def test_the_proof_is_the_divergence_of_what_prune_makes_of_the_file(family, solver, tmp_path):
    model = saved(family, tmp_path / "dense")
    # DeepSeek loses 4 of 16 experts at once, of which 8 stay: there is room for nothing but uniform.
    keys = {"solver": solver, "sparsity": 0.25 if family == "deepseek_v3" else 0.375}
    found = search(tmp_path / "dense", tmp_path / "a.yaml", **keys)
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == found.allocation
    assert "-p experts" in (tmp_path / "a.yaml").read_text()
    record = tawny.prune(
        tmp_path / "dense",
        tmp_path / "cut",
        **{**PRUNING, **keys, "sparsity": sum(found.allocation.values()) / len(found.allocation)},
        allocator=str(tmp_path / "a.yaml"),
        calibration=TEXT[:6],
    )
    for one in record.experts:
        shares = {x for name, x in found.allocation.items() if name.startswith(one["name"])}
        assert shares == {len(one["removed"]) / (len(one["removed"]) + len(one["kept"]))}
    decided = TEXT[7:]
    gone = {one["block"]: one["removed"] for one in record.experts}
    with torch.no_grad():
        expected = kl(model(decided).logits, logits_without(model, gone, decided))
    (proof,) = {t["proof"] for t in found.trials if t["name"] == found.winner and t["proof"] is not None} or {
        None
    }
    if proof is None:
        assert family == "deepseek_v3" and len(found.trials) == 1
        return
    assert proof == pytest.approx(expected, rel=1e-3)
    # Scores are those of blocks that are cut uniformly, so there a trial is what is cut in earnest.
    uniform = next(trial for trial in found.trials if trial["name"] == "uniform")
    assert uniform["verdict"] == pytest.approx(uniform["proof"], rel=1e-4)
    assert found.margin >= 0 and len({t["divergence"] for t in found.trials}) > 2


class Stops(Silent):
    """Ctrl-C at the second step of a phase."""

    def __init__(self, phase):
        self.stop, self.name, self.seen = phase, "", 0

    def phase(self, name, total, unit="blocks"):
        self.name, self.seen = name, 0

    def step(self, text):
        self.seen += 1
        if (self.name, self.seen) == (self.stop, 2):
            raise KeyboardInterrupt


@pytest.mark.parametrize("phase", ["scoring experts", "trying allocations", "pruning finalists"])
def test_a_stopped_search_goes_on_to_the_same(phase, tmp_path, monkeypatch):
    saved("mixtral", tmp_path / "dense")
    monkeypatch.setattr("tawny.run.journal.SHARE", 1e9)
    whole = search(tmp_path / "dense", tmp_path / "whole.yaml", solver="fisher")
    with pytest.raises(Interrupted):
        search(tmp_path / "dense", tmp_path / "a.yaml", solver="fisher", progress=Stops(phase))
    found = search(tmp_path / "dense", tmp_path / "a.yaml", solver="fisher")
    assert found.resumed and found.allocation == whole.allocation and found.trials == whole.trials


def test_what_cannot_be_searched_is_refused_in_one_line(tmp_path):
    saved("mixtral", tmp_path / "dense")
    with pytest.raises(UserError, match="fewer than 2 of 8 experts"):
        search(tmp_path / "dense", tmp_path / "a.yaml", sparsity=0.8)
    assert not (tmp_path / "a.yaml").exists()


def test_a_plan_says_what_a_search_over_experts_takes(tmp_path):
    saved("mixtral", tmp_path / "dense")
    plan = tawny.plan_search(
        tmp_path / "dense", **PRUNING, **FEW, calibration="self", **{"calibration.seqlen": 32}
    )
    assert plan.solver == "reap" and plan.disk["peak"] == 0 and plan.memory["peak"] > 0
    assert plan.levels["from"] < 0.375 < plan.levels["to"]
    assert torch.isfinite(torch.tensor(list(plan.seconds.values()))).all()
