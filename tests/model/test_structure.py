"""Which blocks and linears a model turns out to have, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tawny
from tawny.errors import ModelError
from tawny.model.linears import linears_of
from tawny.model.stack import live_stack
from tests.tiny import BAMBA, tiny_model, tokens

LFM2 = {"layer_types": ["conv", "full_attention", "conv"]}
GRIFFIN = {"block_types": ["recurrent", "recurrent", "attention"]}
MIXED = {
    "lfm2": LFM2 | {"block_ff_dim": 48, "block_multiple_of": 8},
    "mamba": {"state_size": 8, "time_step_rank": 4, "conv_kernel": 4},
    "recurrent_gemma": GRIFFIN | {"lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "bamba": BAMBA,
}


def check_streamed(model, ids):
    """Blocks that run one by one give the logits of the model's own forward."""
    stack = live_stack(model)
    with torch.no_grad():
        hidden = stack.enter(ids)
        for index, call in enumerate(stack.calls(ids)):
            hidden = stack.forward(index, hidden, call)
        own = model(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(stack.logits(ids, hidden), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "there", "not_there"),
    [
        ("lfm2", {"conv.in_proj", "conv.out_proj"}, {"conv.conv"}),
        ("mamba", {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}, {"mixer.dt_proj"}),
        ("recurrent_gemma", {"temporal_block.linear_x", "temporal_block.linear_out"}, {"rg_lru"}),
        ("mixtral", {"mlp.experts.gate_up_proj.3"}, {"mlp.gate"}),
    ],
)
def test_a_convolution_is_no_expert_and_what_lies_beside_it_no_router(family, there, not_there):
    stack = live_stack(tiny_model(family, **MIXED.get(family, {})))
    found = {linear.name.removeprefix(f"{stack.name(0)}.") for linear in stack.linears(0)}
    assert there <= found
    assert not any(f".{no}." in f".{name}." for name in found for no in not_there)


@pytest.mark.parametrize("family", MIXED)
@pytest.mark.parametrize("solver", ["wanda", "sparsegpt"])
def test_blocks_of_two_kinds_are_pruned_as_they_run(family, solver):
    model, ids = tiny_model(family, **MIXED[family]), tokens(4, 24)
    check_streamed(model, ids)
    record = tawny.prune(model, sparsity=0.5, solver=solver, allocator="uniform", calibration=ids)
    assert record.sparsity == pytest.approx(0.5, abs=0.01)


def test_blocks_that_run_twice_are_refused():
    model = tiny_model("llama")
    once = model.model.forward

    def twice(input_ids=None, inputs_embeds=None, **rest):
        return once(inputs_embeds=once(input_ids=input_ids, **rest).last_hidden_state, **rest)

    model.model.forward = twice
    with pytest.raises(ModelError, match="run more than once a forward"):
        tawny.prune(model, sparsity=0.5, calibration=tokens(2, 16))


def test_blocks_between_which_something_happens_are_refused():
    model = tiny_model("llama")

    class Halving(type(model.model.layers[1])):
        def __call__(self, hidden_states, *args, **rest):
            return super().__call__(hidden_states / 2, *args, **rest)

    for layer in model.model.layers:
        layer.__class__ = Halving
    with pytest.raises(ModelError, match="straight from block to block"):
        tawny.prune(model, sparsity=0.5, calibration=tokens(2, 16))


def gemma4(shared):
    return tiny_model(
        "gemma4_text",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_kv_shared_layers=shared,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=8,
        sliding_window=8,
        global_head_dim=16,
    )


def test_blocks_that_need_what_earlier_ones_left_are_refused():
    with pytest.raises(ModelError, match="hand each other more than hidden states"):
        tawny.prune(gemma4(2), sparsity=0.5, calibration=tokens(2, 16))


def test_what_a_block_leaves_and_nobody_reads_is_no_harm():
    model, ids = gemma4(0), tokens(3, 16)
    check_streamed(model, ids)
    assert tawny.prune(model, sparsity=0.5, calibration=ids).sparsity == pytest.approx(0.5, abs=0.01)


def test_a_model_that_does_not_say_which_its_head_is_is_pruned():
    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, **given):
            return self.inner(**given)

    ids = tokens(2, 16)
    record = tawny.prune(Wrapped(tiny_model("llama")), sparsity=0.5, calibration=ids)
    assert record.zeros == tawny.prune(tiny_model("llama"), sparsity=0.5, calibration=ids).zeros


def test_a_linear_beside_a_matrix_is_no_step_size():
    class Mixer(nn.Module):
        def __init__(self, convolved):
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 8)
            self.A_log = nn.Parameter(torch.zeros(8, 4))
            if convolved:
                self.conv = nn.Conv1d(8, 8, 3, groups=8)

    found = [[x.name for x in linears_of(Mixer(convolved), "m")] for convolved in (False, True)]
    assert found == [["m.up", "m.down"], ["m.down"]]


def test_a_list_that_is_a_small_part_of_the_model_is_no_stack():
    model = tiny_model("llama")
    for layer in model.model.layers[1:]:
        layer.__class__ = type("Other", (type(layer),), {})
    model.model.layers[0].mlp.extra = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    with pytest.raises(ModelError, match="holds 128 of its 23,168 linear weights"):
        tawny.prune(model, sparsity=0.5, calibration=tokens(2, 16))


@pytest.mark.parametrize("how", ["pruning", "weight norm"])
def test_a_weight_that_is_computed_is_refused(how):
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.up_proj
    if how == "pruning":
        prune.l1_unstructured(linear, "weight", 0.3)
    else:
        nn.utils.parametrizations.weight_norm(linear)
    ids = tokens(2, 16)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is computed anew"):
        tawny.prune(model, sparsity=0.5, calibration=ids)
    # To be read, or left alone, it may be made by anything.
    assert tawny.profile(model, sparsity=0.5, allocators=["owl"], calibration=ids)
    assert tawny.prune(model, sparsity=0.5, calibration=ids, exclude=["layers.1.mlp.up_proj"]).zeros
