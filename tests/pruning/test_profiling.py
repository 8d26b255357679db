"""A profile for several allocators at once is what each would have measured alone."""

from __future__ import annotations

import copy
import re

import pytest
import torch

import tawny
from tawny.allocation import Alpha, LinearInfo
from tawny.cli.profile import SPARSITY
from tawny.errors import Interrupted, RecipeError
from tawny.model.stack import live_stack
from tawny.progress import Silent
from tawny.pruning import plan as plan_module
from tawny.run.journal import Journal
from tests.encoders import tiny_encoder
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer


def test_several_allocators_are_measured_in_one_walk():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    names = ["owl", "dlp", "lsa", "er", "uniform", "blend"]
    calls = []
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    tawny.profile(model, allocators=["lsa"], sparsity=0.6, **data)
    once = len(calls)
    together = tawny.profile(model, allocators=names, sparsity=0.6, **data)
    assert list(together.allocations) == names and len(calls) == 2 * once > 0
    hook.remove()
    for name in names:
        alone = tawny.profile(model, allocators=[name], sparsity=0.6, **data).allocations[name]
        assert alone == together.allocations[name]
        assert sum(alone) / len(alone) == pytest.approx(0.6, abs=1e-3)
    assert together.allocations["owl"] != together.allocations["dlp"]


def test_the_recipes_own_allocator_keeps_its_options():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    wide = tawny.profile(
        model, allocators=["owl"], sparsity=0.6, allocator="owl", **{"allocator.lambda": 0.2}, **data
    )
    usual = tawny.profile(model, allocators=["owl"], sparsity=0.6, **data)
    assert max(wide.allocations["owl"]) > max(usual.allocations["owl"])


def test_the_default_rows_show_what_a_pattern_makes_of_owl():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    report = tawny.profile(model, pattern="2:4", **data)
    named = tawny.profile(model, pattern="2:4", allocators=["owl"], **data)
    assert report.sparsity == 0.5 and len(report.allocations) == 4
    assert {value % 0.25 for row in report.allocations.values() for value in row} == {0.0}
    assert report.allocations["owl M=5"] == named.allocations["owl"]
    assert tawny.profile(model, pattern="3:8", **data).sparsity == 0.625


def test_a_profile_has_the_sparsity_of_the_command_line_where_none_is_given():
    assert tawny.profile(tiny_model("llama"), calibration=tokens()).sparsity == SPARSITY


@pytest.mark.parametrize("pattern", ["blocks", "heads", "channels+heads"])
@pytest.mark.parametrize("allocators", [(), ("owl", "uniform")])
def test_a_pattern_of_whole_parts_shows_the_sparsities_of_single_weights(pattern, allocators):
    class Says(Silent):
        said = ""

        def say(self, text: str) -> None:
            self.said += text

    progress, model = Says(), tiny_model("llama")
    keys = {"sparsity": 0.7, "allocators": allocators, "calibration": tokens(), "progress": progress}
    report = tawny.profile(model, pattern=pattern, **keys)
    assert progress.said.count(f"as for single weights, not as whole {pattern}") == 1
    for shares in report.allocations.values():
        assert sum(shares) / len(shares) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("M", [0, -1, float("nan"), float("inf")])
def test_a_multiple_that_nothing_is_above_is_refused_before_the_model_is_opened(M):
    with pytest.raises(RecipeError, match=r"^M is .* positive"):
        tawny.profile("/no/such/folder", Ms=(5, M))


def file_of(tmp_path, model, numbers):
    """An allocation file that gives each linear what `numbers` has for the end of its name."""
    record = tawny.prune(copy.deepcopy(model), sparsity=0.5, **KEYS)
    lines = [f"{x.name}: {numbers.get(x.name.rpartition('.')[2], 0.5)}" for x in record.linears]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return {**KEYS, "allocator": "file", "allocator.path": str(path)}


KEYS = {"allocator": "uniform", "solver": "magnitude", "compute": "float32"}


def test_a_file_gives_each_linear_its_own_n(tmp_path):
    model = tiny_model("llama")
    numbers = {
        "q_proj": 0.75,
        "o_proj": 0.25,
        "k_proj": 0,
        "v_proj": 0.5,
        "gate_proj": 0.25,
        "down_proj": 0.75,
    }
    keys = file_of(tmp_path, model, numbers)
    record = tawny.prune(model, pattern="2:4", **keys, **{"allocator.tolerance": 0.1})
    assert {x.name.rpartition(".")[2]: x.target for x in record.linears} == {**numbers, "up_proj": 0.5}
    assert all(abs(x.sparsity - x.target) < 1e-9 for x in record.linears if x.target)
    assert record.warnings == []


def test_a_file_whose_numbers_are_no_whole_n_is_refused_by_linear(tmp_path):
    model = tiny_model("llama")
    before = [parameter.clone() for parameter in model.parameters()]
    for numbers in ({"q_proj": 0.55, "o_proj": 0.45}, {"q_proj": 1, "o_proj": 0}):
        keys = file_of(tmp_path, model, numbers)
        with pytest.raises(
            RecipeError, match=r"layers\.0\.self_attn\.q_proj is given sparsity .*0\.75 \(1 of 4\)"
        ):
            tawny.prune(model, pattern="2:4", **keys)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("allocator", "said"),
    [
        ({"allocator": "er"}, True),
        ({"allocator": "lsa", "allocator.granularity": "linear"}, True),
        ({"allocator": "owl", "allocator.granularity": "module"}, True),
        ({"allocator": "owl", "allocator.lambda": 0.3}, False),
        ({"allocator": "atp"}, False),
        ({"allocator": "dlp"}, False),
        ({"allocator": "blend"}, False),
        ({"allocator": "uniform"}, False),
    ],
)
def test_what_n_of_m_averages_over_a_block_is_said(allocator, said):
    record = tawny.prune(tiny_model("llama"), pattern="3:8", calibration=tokens(), **{**KEYS, **allocator})
    by_block = [{x.target for x in record.linears if x.block == block} for block in range(3)]
    assert [len(targets) for targets in by_block] == [1, 1, 1]
    told = [line for line in record.warnings if not line.startswith("every block keeps 3:8")]
    assert len(told) == said
    if said:
        assert re.match(r"3:8 gives .* one n of 8.* differs in [23] of 3 blocks, by up to 0\.\d", told[0])
    free = tawny.prune(tiny_model("llama"), sparsity=0.625, calibration=tokens(), **{**KEYS, **allocator})
    assert free.warnings == []


def test_it_is_said_where_blocks_differ_by_less_than_one_n():
    keys = {**KEYS, "calibration": tokens(), "allocator": "owl"}
    for pattern, spread, same in (("2:4", 0.08, True), ("4:8", 0.3, False)):
        record = tawny.prune(tiny_model("llama"), pattern=pattern, **{**keys, "allocator.lambda": spread})
        assert (len({x.target for x in record.linears}) == 1) == same
        told = [f"every block keeps {pattern}: what the allocator gave them differs by less than one n of 4"]
        assert record.warnings == told * same


def test_a_plan_says_what_n_of_m_averages_over_a_block(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    keys = {**KEYS, "pattern": "3:8", "calibration": "wiki"}
    assert any("one n of 8" in note for note in tawny.plan(tmp_path, **{**keys, "allocator": "er"}).notes)
    notes = tawny.plan(tmp_path, **{**keys, "allocator": "atp"}).notes
    assert all(note.startswith("every block keeps 3:8") for note in notes)


@pytest.mark.parametrize("pattern", ["heads", "channels", "2:4"])
def test_a_plan_counts_what_its_allocation_removes(tmp_path, pattern):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    keys = {"pattern": pattern, "allocator": "uniform", "solver": "magnitude"}
    keys |= {} if ":" in pattern else {"sparsity": 0.3}
    planned = tawny.plan(tmp_path / "dense", **keys)
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", **keys)
    assert planned.removed == record.zeros


def test_a_plan_of_blocks_counts_whole_ones_and_says_that_it_is_about(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    planned = tawny.plan(tmp_path / "dense", sparsity=0.4, pattern="blocks", calibration="wiki")
    assert planned.removed == planned.prunable // 3
    assert "about so many weights are removed: whole blocks go" in planned.notes
    owl = tawny.plan(tmp_path / "dense", sparsity=0.4, pattern="heads", allocator="owl", calibration="wiki")
    assert any("about" in note and "whole heads go" in note for note in owl.notes)


def test_it_is_said_once_though_a_run_is_stopped_and_resumed(tmp_path, monkeypatch):
    class Stops(Silent):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    tiny_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(Journal, "due", lambda self: self.folder is not None)
    keys = {**KEYS, "allocator": "er", "pattern": "2:4"}
    with pytest.raises(Interrupted, match="kept"):
        tawny.prune(tmp_path / "dense", tmp_path / "out", progress=Stops(), **keys)
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", **keys)
    assert record.resumed == 1 and len(record.warnings) == 1 and "one n of 4" in record.warnings[0]


def test_an_unknown_allocator_names_its_neighbour():
    with pytest.raises(RecipeError, match="did you mean 'dlp'"):
        tawny.profile(tiny_model("llama"), allocators=["dlpp"], calibration=tokens())


def test_a_plan_counts_what_an_allocator_measures_beside_statistics(tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    monkeypatch.setattr(plan_module, "measured_speed", lambda dtype: 1e6)
    options = {"sparsity": 0.5, "solver": "magnitude", "calibration": "wiki"}
    planned = {
        name: tawny.plan(tmp_path / "dense", allocator=name, **options)
        for name in ("uniform", "alpha", "blend")
    }
    linears = [LinearInfo(x["name"], tuple(x["shape"]), x["block"]) for x in planned["alpha"].linears]
    seconds = {name: plan.seconds["profile"] for name, plan in planned.items()}
    assert seconds["uniform"] == 0
    assert seconds["alpha"] == seconds["blend"] == pytest.approx(Alpha().work(linears) / 1e6, abs=0.06)


def test_an_encoder_that_is_not_pruned_uniformly_is_warned_of():
    said = {}
    for model in (tiny_encoder("bert"), tiny_model("llama")):
        for allocator in ("atp", "uniform"):
            pruned = copy.deepcopy(model)
            record = tawny.prune(pruned, sparsity=0.5, solver="magnitude", allocator=allocator)
            said[type(model).__name__, allocator] = record.warnings
    encoder = said.pop(("BertModel", "atp"))
    assert len(encoder) == 1 and "trial on encoders: try -a uniform" in encoder[0]
    assert list(said.values()) == [[], [], []]


def test_fewer_tokens_than_a_linear_has_inputs_are_warned_of():
    said = {}
    for solver in ("sparsegpt", "wanda"):
        for count in (47, 48):
            model = tiny_model("llama", intermediate_size=48)
            keys = {"sparsity": 0.5, "solver": solver, "allocator": "uniform"}
            said[solver, count] = tawny.prune(model, calibration=tokens(1, count), **keys).warnings
    (line,) = said.pop(("sparsegpt", 47))
    assert "47 calibration tokens are fewer than the 48 inputs of model.layers.0.mlp.down_proj" in line
    assert not any(said.values())


def test_a_plan_counts_the_experts_that_a_token_goes_to(monkeypatch):
    """Two of four: their weights and their Hessians; of what all tokens see nothing less."""
    model = tiny_model("mixtral")
    stack = live_stack(model)
    experts = sum(x.numel for i in range(len(stack)) for x in stack.linears(i) if x.expert is not None)
    every = sum(p.numel() for block in stack.blocks for p in block.parameters() if p.dim() > 1)
    monkeypatch.setattr(plan_module, "measured_speed", lambda _: 1.0)
    halved = plan_module.forward_seconds(stack)
    model.config.num_experts_per_tok = 4
    assert halved / plan_module.forward_seconds(stack) == pytest.approx(
        (every - experts / 2) / every, rel=1e-6
    )


def test_curves_ask_the_output_where_the_solver_does_not():
    model, data = tiny_model("llama"), {"calibration": tokens()}
    report = tawny.profile(model, allocators=["curves", "blend"], sparsity=0.6, **data)
    assert sum(report.allocations["curves"]) / len(model.model.layers) == pytest.approx(0.6, abs=1e-3)
    record = tawny.prune(model, allocator="curves", solver="wanda", output="none", sparsity=0.6, **data)
    assert record.sparsity == pytest.approx(0.6, abs=1e-3) and "backward" in record.seconds
    linears = {name: value for name, value in record.allocation.items() if ".layers.0." in name}
    assert len(set(linears.values())) > 1
