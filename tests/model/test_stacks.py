"""Models of several stacks: walked one stack after another, beside slow twins that run the whole model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

import tawny
from tawny.errors import Interrupted, ModelError
from tawny.model.couplings import find_couplings
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import find_blocks
from tawny.progress import Silent
from tawny.pruning import session as session_module
from tawny.run import journal as journal_module
from tests.encoders import inputs_for, tiny_encoder
from tests.reference import official_flow

NAMES = {
    name: [f"encoder.{path}" for path in paths]
    for name, paths in {
        "swin": ("layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"),
        "convnext": ("stages.0.layers.0", "stages.0.layers.1", "stages.1.layers.0", "stages.1.layers.1"),
    }.items()
}


@pytest.mark.parametrize("name", NAMES)
def test_what_enters_each_block_is_what_the_models_own_forward_gives_it(name):
    model = tiny_encoder(name)
    inputs = inputs_for(model)
    blocks = find_blocks(model)
    assert blocks.names == NAMES[name] and blocks.starts == [0, 2]
    seen: list[torch.Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0])) for block in blocks.modules
    ]
    with torch.no_grad():
        own = model(**inputs)[0]
    for handle in handles:
        handle.remove()
    stack = live_stack(model)
    stream = Stream(stack, Samples(inputs, seqlen=64), chunk_tokens=2 * 64)
    assert len(stream) == 3
    for index, expected in enumerate(seen):
        flat = expected if expected.dim() == 3 else expected.flatten(2).transpose(1, 2)
        torch.testing.assert_close(torch.cat(stream.hidden), flat)
        stream.advance(index)
    made = stack.output(inputs, torch.cat(stream.hidden))[0]
    torch.testing.assert_close(made, own)


@pytest.mark.parametrize("name", NAMES)
def test_pruning_gives_the_ratios_and_masks_of_whole_forwards(name):
    dense = tiny_encoder(name)
    inputs = inputs_for(dense)
    twin = copy.deepcopy(dense)
    blocks = find_blocks(twin).modules
    shares = official_flow.outlier_shares(twin, blocks, inputs, 5)
    ratios = official_flow.owl_ratios(shares, 0.08, 0.7)
    official_flow.prune_wanda(twin, blocks, inputs, ratios)
    keys = {"sparsity": 0.7, "solver": "wanda", "compat": "official", "allocator": "owl"}
    record = tawny.prune(dense, calibration=inputs, **keys, **{"allocator.M": 5, "allocator.lambda": 0.08})
    assert len(set(ratios)) >= 3
    assert [entry.target for entry in record.linears] == pytest.approx(
        [ratios[entry.block] for entry in record.linears], abs=1e-9
    )
    expected = dict(twin.named_parameters())
    assert all(torch.equal(value, expected[key]) for key, value in dense.named_parameters())


class Stopping(Silent):
    """Ctrl-C after so many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def step(self, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("name", "spill"), [("swin", True), ("convnext", False)])
def test_a_resumed_run_gives_the_bytes_of_an_uninterrupted_one(name, spill, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))  # every block is committed
    placing = session_module.place_in_memory
    monkeypatch.setattr(
        session_module, "place_in_memory", lambda *given: replace(placing(*given), spill=spill)
    )
    model = tiny_encoder(name)
    model.save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.6, "solver": "sparsegpt", "allocator": "owl"}
    keys["calibration"] = inputs_for(model)
    tawny.prune(tmp_path / "dense", tmp_path / "whole", **keys)
    stopped = 0
    while not (tmp_path / "out").exists():
        try:
            record = tawny.prune(tmp_path / "dense", tmp_path / "out", progress=Stopping(2), **keys)
        except Interrupted:
            stopped += 1
    assert stopped == record.resumed == 2  # within a stack and between the two
    made, whole = (tmp_path / out / "model.safetensors" for out in ("out", "whole"))
    assert made.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "keys",
    [
        {"pattern": "2:4", "solver": "sparsegpt"},
        {"pattern": "channels"},
        {"pattern": "blocks", "solver": "influence"},
        {"solver": "wanda", "refine.epochs": 2},
        {"solver": "ria", "allocator": "alpha"},
    ],
    ids=["2:4", "channels", "blocks", "refine", "alpha"],
)
def test_patterns_and_what_follows_the_solve_work_across_stacks(name, keys):
    model = tiny_encoder(name)
    inputs = inputs_for(model)
    between = {k: v.clone() for k, v in model.named_parameters() if not find_blocks(model).hold(k)}
    record = tawny.prune(model, sparsity=0.5, calibration=inputs, **keys)
    assert record.sparsity == pytest.approx(0.5, abs=0.31 if keys.get("pattern") == "blocks" else 0.02)
    assert all(torch.equal(model.get_parameter(k), v) for k, v in between.items())
    assert len(record.refined) == (4 if "refine.epochs" in keys else 0)
    assert any(entry["after"] < entry["before"] for entry in record.refined) or not record.refined
    assert all(model.get_parameter(k).grad is None for k in between)
    assert bool(model(**inputs)[0].isfinite().all())


def test_a_block_at_the_end_of_a_stack_leaves_and_its_stack_goes_on():
    model = tiny_encoder("convnext")
    model.encoder.stages[0].layers[1].layer_scale_parameter.data *= 1e-3  # it does next to nothing
    inputs = inputs_for(model)
    record = tawny.prune(model, sparsity=0.1, calibration=inputs, pattern="blocks", solver="influence")
    assert {x.block for x in record.linears if x.sparsity == 1} == {1}
    stack = live_stack(model)
    hidden = stack.enter(inputs)
    call = stack.calls(inputs)[1]
    torch.testing.assert_close(stack.forward(1, hidden, call), stack.onward(hidden, call))


def test_channels_of_maps_are_no_heads():
    kinds = [[c.kind for c in some] for some in find_couplings(live_stack(tiny_encoder("convnext")))]
    assert kinds == [["channels"]] * 4


def test_memory_is_counted_by_the_positions_of_each_stack():
    model = tiny_encoder("convnext")
    stack = live_stack(model)
    stack.enter(inputs_for(model))
    assert [stack.positions_at(index) for index in range(4)] == [1, 1, 0.25, 0.25]
    assert stack.hidden_bytes == 16 * 4  # 32 numbers at a quarter of the positions are less


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("swin", "embeddings.patch_embeddings.projection, encoder.layers.*.downsample.reduction"),
        ("convnext", "encoder.stages.*.layers.*.dwconv (4), encoder.stages.*.downsampling_layer.*"),
    ],
)
def test_what_stays_dense_is_named(name, said, tmp_path):
    model = tiny_encoder(name)
    model.save_pretrained(tmp_path)
    record = tawny.prune(model, sparsity=0.5, solver="magnitude", allocator="uniform")
    assert said in record.warnings[0]
    assert tawny.inspect(tmp_path).dense == record.warnings[:1]


def run_through(stages, features, order, more=lambda made: 0.0):
    """The stages of a ConvNeXt by hand; `more` of what the first block gives is added in front of the second stack."""
    first = features
    for number, stage in enumerate(stages):
        for layer in stage.downsampling_layer:
            features = layer(features)
        features = features + (more(first) if number else 0.0)
        for place, layer in enumerate(order(stage.layers)):
            features = layer(features)
            first = features if number == place == 0 else first
    return BaseModelOutput(last_hidden_state=features)


@pytest.mark.parametrize(
    ("order", "more", "said"),
    [
        (list, lambda made: 0 * made.mean(), None),
        (list, torch.mean, "depends on more than the last hidden states of the one before it"),
        (reversed, lambda made: 0 * made.mean(), "does not pass hidden states straight from block to block"),
    ],
)
def test_stacks_whose_order_cannot_be_proven_are_refused_in_one_line(order, more, said):
    model = tiny_encoder("convnext")
    stages = model.encoder.stages
    model.encoder.forward = lambda features, **_: run_through(stages, features, order, more)
    if said is None:
        assert tawny.prune(model, sparsity=0.5, calibration=inputs_for(model)).zeros
        return
    with pytest.raises(ModelError, match=said) as error:
        tawny.prune(model, sparsity=0.5, calibration=inputs_for(model))
    assert "\n" not in str(error.value)


def test_a_head_that_reads_several_stacks_is_pruned_but_not_compared():
    model = tiny_encoder("swin, maps")
    inputs = inputs_for(model)
    dense = copy.deepcopy(model)
    assert tawny.prune(model, sparsity=0.5, calibration=inputs).sparsity == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ModelError, match="depends on more than its last block") as error:
        tawny.features(model, dense, Samples(inputs, seqlen=64))
    assert "\n" not in str(error.value)


def test_widths_of_several_stacks_cannot_be_cut(tmp_path):
    model = tiny_encoder("swin")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ModelError, match="is a model of several stacks"):
        tawny.slim(tmp_path / "dense", tmp_path / "slim")
