"""Block reconstruction: zeros stay, nothing it should not touch moves, held-out samples never get worse."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import Interrupted, ModelError, RecipeError, TextError
from tawny.model.checkpoint import Checkpoint
from tawny.packed import format
from tawny.progress import Silent
from tawny.pruning import plan as plan_module
from tawny.pruning import refine as refining
from tawny.recipe.merge import resolve_recipe
from tawny.recipe.schema import Recipe, Refinement
from tawny.run import journal
from tests.end_to_end.test_prune import prunable
from tests.tiny import tiny_model, tokens

KEYS = {"sparsity": 0.6, "allocator": "uniform", "solver": "wanda", "compute": "float32"}
TRAINING = {"refine.epochs": 2, "refine.batch": 2, "refine.lr": 0.003}


def parameters(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def pruned(family="llama", dtype=torch.float32, **keys):
    model = tiny_model(family, dtype=dtype)
    record = tawny.prune(model, **KEYS | {"calibration": tokens(16, 24)} | keys)
    return model, record


def lost_of(got, wanted, held):
    """Squared error over the target's, mean over the tokens of these samples; channels with more than the usual energy count as
    much less as they have more."""
    tokens = wanted.flatten(0, 1)
    share = (tokens.square() / tokens.square().sum(-1, keepdim=True)).mean(0)
    counts = torch.tensor([1 / max(float(own), float(share.median())) for own in share])
    shares = [
        ((g - w).square() @ counts) / w.square().sum() / (share @ counts)
        for g, w in zip(got[held].flatten(0, 1), wanted[held].flatten(0, 1), strict=True)
    ]
    return float(torch.stack(shares).mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma3_text"])
def test_survivors_norms_and_biases_move_and_nothing_else_does(family):
    dense = parameters(tiny_model(family))
    before, _ = pruned(family, **{"refine.epochs": 0})
    after, record = pruned(family, **TRAINING)
    first = "h.0." if family == "gpt2" else "layers.0."
    old, new = prunable(before), prunable(after)
    for name in old:
        assert torch.equal(old[name] == 0, new[name] == 0) or first not in name, name
    assert record.refined[0]["best_epoch"] > 0
    moved = {name for name in old if first in name and not torch.equal(old[name], new[name])}
    assert moved == {name for name in old if first in name}
    also = {name for made in record.refined for name in made["also"]}
    for name, value in after.named_parameters():
        if name.removesuffix(".weight") in new:
            continue
        assert (name in also) == (not torch.equal(value, dense[name])), name
        assert name not in also or value.dim() == 1
    assert also
    assert abs(record.sparsity - 0.6) < 0.01
    assert sum(int((w == 0).sum()) for w in new.values()) == record.zeros


@pytest.mark.parametrize("fails", [False, True])
def test_a_live_model_stays_as_trainable_as_its_owner_left_it(fails, monkeypatch):
    model = tiny_model("llama")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    found = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    keys = KEYS | TRAINING | {"calibration": tokens(16, 24), "exclude": ["*.o_proj", "layers.1.mlp.*"]}
    if fails:
        monkeypatch.setattr(refining, "_schedule", lambda number, total: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
        tawny.prune(model, **keys)
    for number, (parameter, (flag, grad)) in enumerate(zip(model.parameters(), found, strict=True)):
        assert parameter.requires_grad == flag and parameter.grad is grad
        assert grad is None or torch.equal(grad, torch.full_like(grad, number))


def test_what_is_trained_lies_where_the_forwards_run():
    """Another device, for which meta stands here, has the forwards; a norm was read on the CPU."""
    leaf = torch.nn.Parameter(torch.ones(4, device="meta"), requires_grad=False)
    entry = refining._Trained("norm", leaf, torch.ones(4), torch.ones(4), masked=False, dtype=None)
    leaf.sum().backward()
    entry.step(0.1, 1)
    for tensor in (entry.master, entry.gradient, entry.adam.first, entry.adam.second, entry.best):
        assert tensor.is_meta
    entry.close()


def test_modules_of_one_block_may_share_a_norm():
    model = tiny_model("llama")
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight = layer.input_layernorm.weight
    record = tawny.prune(model, **KEYS | TRAINING | {"calibration": tokens(16, 24)})
    assert record.refined[0]["best_epoch"] > 0
    assert sum("layernorm" in name for name in record.refined[0]["also"]) == 1


def test_losses_are_of_what_will_be_written(tmp_path):
    """Of the first block, fed by what no dtype changes: embeddings that float16 holds."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.half().float()
    model.save_pretrained(tmp_path / "dense")
    ids, lost = tokens(16, 24), {}
    keys = KEYS | TRAINING | {"calibration": ids, "calibration.samples": 16}
    _, held = refining.holds_out(16, Refinement(), 0)

    def behind(folder):
        read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        caught = []
        read.model.layers[0].register_forward_hook(
            lambda module, args, out: caught.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        with torch.no_grad():
            read(ids)
        return caught[0]

    for dtype in (None, "float16"):
        out = tmp_path / str(dtype)
        record = tawny.prune(tmp_path / "dense", out, dtype=dtype, **keys)
        lost[dtype] = record.refined[0]["after"]
        assert lost[dtype] == pytest.approx(lost_of(behind(out), behind(tmp_path / "dense"), held), rel=1e-5)
    assert lost["float16"] != pytest.approx(lost[None], rel=1e-5)  # or else this would show nothing


def test_held_out_samples_never_get_worse_and_data_do_what_they_say():
    _, record = pruned(**TRAINING)
    assert [made["block"] for made in record.refined] == [0, 1, 2]
    for made in record.refined:
        assert made["after"] <= made["before"] and made["epochs"] == len(made["losses"]) == 2
        assert made["after"] == min([made["before"], *made["losses"]])
    assert sum(made["after"] for made in record.refined) < 0.98 * sum(
        made["before"] for made in record.refined
    )


def test_where_no_epoch_helps_every_bit_stays():
    before, _ = pruned()
    after, record = pruned(
        **{"refine.epochs": 5, "refine.lr": 1.0, "refine.patience": 2}
    )  # far too long steps
    assert not any(loss < made["before"] for made in record.refined for loss in made["losses"]), "raise lr"
    assert not any(made["best_epoch"] for made in record.refined)
    assert all(made["epochs"] == 2 and "no better" in made["stopped"] for made in record.refined)
    assert all(made["also"] == [] and made["after"] == made["before"] for made in record.refined)
    was = parameters(before)
    assert all(torch.equal(was[name], value) for name, value in after.named_parameters())


def test_the_pruned_block_behind_pruned_blocks_aims_at_the_dense_one_behind_dense_blocks():
    ids = tokens(16, 24)
    dense = tiny_model("llama")
    wanted = dense(ids, output_hidden_states=True).hidden_states[2].detach()
    after, record = pruned(**TRAINING)
    got = after(ids, output_hidden_states=True).hidden_states[2].detach()
    _, held = refining.holds_out(16, Refinement(), 0)
    assert lost_of(got, wanted, held) == pytest.approx(record.refined[1]["after"], rel=1e-4)


def test_a_token_of_massive_activations_does_not_drown_all_others():
    """One neuron answers to one token, as in real models; its strength must not change what the others learn."""
    ids = tokens(16, 24)
    ids[:, 0] = 3
    ids[:, 1:][ids[:, 1:] == 3] = 4

    def lost(size, **keys):
        model = tiny_model("llama")
        embedding, block = model.get_input_embeddings().weight.data, model.model.layers[0]
        direction = embedding[3] / embedding[3].norm()
        others = torch.arange(len(embedding)) != 3
        embedding[others] -= torch.outer(embedding[others] @ direction, direction)
        attended = block.self_attn.o_proj.weight.data
        attended -= torch.outer(direction, direction @ attended)
        for linear in (block.mlp.gate_proj, block.mlp.up_proj):
            linear.weight.data[0] = direction
        block.mlp.down_proj.weight.data[:, 0] *= size
        wanted = model(ids, output_hidden_states=True).hidden_states[1].detach()
        tawny.prune(model, **KEYS | {"calibration": ids, "exclude": ["*.self_attn.*"]} | keys)
        got = model(ids, output_hidden_states=True).hidden_states[1].detach()
        _, held = refining.holds_out(16, Refinement(), 0)
        return lost_of(got[:, 1:], wanted[:, 1:], held)

    gain = [1 - lost(size, **TRAINING) / lost(size) for size in (1.0, 100.0)]
    assert gain[0] > 0.02 and gain[1] > 0.7 * gain[0]


def test_a_folder_and_a_live_model_are_refined_alike_and_twice_alike(tmp_path):
    keys = KEYS | TRAINING | {"calibration": tokens(16, 24), "solver": "sparsegpt"}
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "dense")
    for out in ("a", "b"):
        tawny.prune(tmp_path / "dense", tmp_path / out, **keys)
    a, b = (tmp_path / out / "model.safetensors" for out in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()
    tawny.prune(model, **keys)
    checkpoint = Checkpoint(tmp_path / "a")
    written = checkpoint.read(checkpoint.files)
    assert all(torch.equal(value, written[name]) for name, value in model.named_parameters())
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["recipe"]["refine"]["epochs"] == 2
    assert any(name.endswith("input_layernorm.weight") for made in run["refined"] for name in made["also"])
    card = (tmp_path / "a" / "README.md").read_text()
    better = sum(made["best_epoch"] > 0 for made in run["refined"])
    assert better and f"which helped in {better} of {len(run['refined'])} blocks" in card
    assert "norms and biases, which were trained" in card


def test_the_result_is_rounded_to_the_storage_of_the_checkpoint(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    record = tawny.prune(
        tmp_path / "dense", tmp_path / "out", **KEYS | TRAINING | {"calibration": tokens(16, 24)}
    )
    assert set(Checkpoint(tmp_path / "out").dtypes.values()) == {"BF16"}
    assert any(made["best_epoch"] for made in record.refined)
    # What was measured is what was stored.
    from transformers import AutoModelForCausalLM

    ids = tokens(16, 24)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    got, wanted = (m(ids, output_hidden_states=True).hidden_states[2].detach() for m in (opened, dense))
    _, held = refining.holds_out(16, Refinement(), 0)
    assert lost_of(got, wanted, held) == pytest.approx(record.refined[1]["after"], rel=1e-4)


def test_bfloat16_forwards_train_float32_masters():
    model, record = pruned(dtype=torch.bfloat16, compute="bfloat16", **TRAINING)
    assert record.compute == "bfloat16"
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())
    assert sum(made["after"] for made in record.refined) < sum(made["before"] for made in record.refined)


def test_a_loss_that_is_not_finite_keeps_the_best_and_says_so(monkeypatch):
    descend = refining._Pairs.descend
    calls = []

    def breaks(self, chosen, scale):
        calls.append(self.index)
        return math.nan if self.index == 1 and calls.count(1) == 9 else descend(self, chosen, scale)

    monkeypatch.setattr(refining._Pairs, "descend", breaks)
    model, record = pruned(**TRAINING)
    assert record.refined[1]["stopped"] == "the loss is not finite in epoch 2"
    assert record.refined[1]["epochs"] == 1
    assert any("layers.1" in text and "epoch 1 was kept" in text for text in record.warnings)
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


def test_padding_counts_neither_in_the_loss_nor_in_the_gradient():
    ids = tokens(8, 24)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    other = ids.clone()
    other[:, :6] = 7  # other padding, same text
    made = [
        pruned(solver="magnitude", calibration=(padded, mask), **TRAINING)[1].refined
        for padded in (ids, other)
    ]
    for a, b in zip(*made, strict=True):
        assert a["before"] == pytest.approx(b["before"]) and a["losses"] == pytest.approx(b["losses"])


def test_a_solver_that_sees_no_data_can_be_refined_and_excluded_blocks_are_left_alone():
    model, record = pruned(solver="magnitude", exclude=["layers.1.*", "*.o_proj"], **TRAINING)
    dense = parameters(tiny_model("llama"))
    assert [made["block"] for made in record.refined] == [0, 2]
    for name, value in model.named_parameters():
        if "layers.1." in name or "o_proj" in name:
            assert torch.equal(value, dense[name]), name


def test_one_sample_is_refused(tmp_path):
    with pytest.raises(TextError, match="at least 2"):
        pruned(calibration=tokens(1, 24), **TRAINING)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(TextError, match="at least 2"):
        tawny.plan(tmp_path / "dense", sparsity=0.5, samples=1, seqlen=24, **TRAINING)


def test_the_section_has_one_meaning_however_it_is_spelled():
    wanted = resolve_recipe(sparsity=0.5, **{"refine.epochs": 3})
    assert wanted.refine == Refinement(epochs=3)
    for spelled in (
        resolve_recipe({"sparsity": 0.5, "refine": 3}),
        resolve_recipe({"sparsity": 0.5, "refine": {"epochs": 3}}),
        resolve_recipe({"sparsity": 0.5}, ["refine=3"]),
        resolve_recipe({"sparsity": 0.5}, ["epochs=3"]),
        Recipe.from_mapping(wanted.to_mapping()),
    ):
        assert spelled == wanted
    for wrong in ({"epochs": -1}, {"lr": 0}, {"holdout": 1.0}, {"patience": 0}, {"speed": 3}):
        with pytest.raises(RecipeError, match="refine"):
            resolve_recipe({"sparsity": 0.5, "refine": {"epochs": 1} | wrong})


def test_a_plan_counts_what_refining_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(plan_module, "measured_speed", lambda dtype: 1e6)
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text("words " * 120)
    keys = KEYS | {"calibration.text": str(tmp_path / "text.txt"), "samples": 4, "seqlen": 24}
    without, with_it = (tawny.plan(tmp_path / "dense", **keys, **{"refine.epochs": n}) for n in (0, 4))
    block = max(entry["parameters"] for entry in with_it.blocks)
    assert (
        "refine" not in without.memory and with_it.memory["refine"] > 16 * block
    )  # it is the largest phase here
    assert with_it.memory["peak"] >= without.memory["peak"]
    # One forward and four epochs of three, beside the two of the walk.
    assert with_it.seconds["refine"] == pytest.approx(6.5 * with_it.seconds["forward"], rel=0.1)
    assert "refine" not in without.seconds


def test_a_stopped_run_goes_on_with_both_streams(tmp_path, monkeypatch):
    class PressesCtrlC(Silent):
        def step(self, text: str) -> None:
            if text == "model.layers.1":
                raise KeyboardInterrupt

    monkeypatch.setattr(journal, "SHARE", float("inf"))  # every block is committed
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    keys = KEYS | TRAINING | {"calibration": tokens(8, 24)}
    whole = tawny.prune(tmp_path / "dense", tmp_path / "whole", **keys)
    with pytest.raises(Interrupted):
        tawny.prune(tmp_path / "dense", tmp_path / "out", progress=PressesCtrlC(), **keys)
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", **keys)
    assert record.resumed == 1
    a, b = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert a.read_bytes() == b.read_bytes()
    assert [made["losses"] for made in record.refined] == [made["losses"] for made in whole.refined]


def test_the_summary_says_what_was_refined_and_how_much_it_helped():
    from tawny.cli.prune import record_tables

    _, record = pruned(refit=True, **TRAINING)
    facts = record_tables(record.to_dict())[-1]
    cells = [cell for row in facts.rows for cell in row]
    assert any("uniform + wanda + refit + 2 epochs a block" in cell for cell in cells)
    assert any("of 3 blocks" in cell and "held-out loss is left" in cell for cell in cells)


def test_experts_are_left_to_recovery():
    with pytest.raises(ModelError, match=r"is an expert of a fused tensor.*`tawny recover`"):
        pruned("mixtral", **TRAINING)


@pytest.mark.parametrize(("family", "sparsity"), [("llama", 0.5), ("gpt2", 0.5), ("llama", 0.0)])
def test_a_block_of_few_bits_is_trained_through_its_grid(family, sparsity):
    keys = {"values": {"kind": "int4", "group_size": 32}, "sparsity": sparsity}
    before, _ = pruned(family, **keys)
    after, record = pruned(family, **keys, **TRAINING | {"refine.lr": 0.001})
    old, new = prunable(before), prunable(after)
    assert record.refined[0]["best_epoch"] > 0 and record.refined[0]["after"] < record.refined[0]["before"]
    assert any(not torch.equal(old[name], new[name]) for name in old)
    for name, weight in new.items():
        packed = format.pack(weight, "int4", 32, whole=not sparsity)
        assert torch.equal(format.unpack(packed, weight.dtype), weight), name
        assert int((weight == 0).sum()) >= round(sparsity * weight.numel())  # 0 is a level, too
    assert record.zeros == round(sparsity * record.prunable)
