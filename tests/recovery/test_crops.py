"""Models that see learn on crops of pictures; models that hear, on tensors that are given."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tawny
from tawny.errors import ModelError, TextError
from tawny.recovery.crops import crops_of
from tests.encoders import inputs_for, padded, tiny_encoder
from tests.pictures import save_pictures, save_seeing
from tests.recovery.models import SHORT, stopped

SHOWN = {
    "batch": 4,
    "tokens": 17 * 4 * 7,
    "eval_every": 3,
    "eval_windows": 4,
    "lr": 1e-2,
    "compute": "float32",
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    root = tmp_path_factory.mktemp("seen")
    dense = save_seeing(root / "dense")
    save_pictures(root / "pictures", 9)
    (root / "pictures" / "torn.png").write_bytes(b"no picture")
    data = f"images:{root / 'pictures'}"
    keys = {"sparsity": 0.5, "solver": "magnitude", "allocator": "uniform", "calibration": data}
    tawny.prune(dense, root / "pruned", **keys)
    return SimpleNamespace(root=root, dense=dense, pruned=root / "pruned", data=data)


def crops(seen, seed=0, **keys):
    settings = tawny.Recovery.make(text=seen.data, seed=seed, **SHOWN, **keys)
    return crops_of(settings, processor, lambda pixels: 17, lambda _: None)


def processor(images, return_tensors):
    return {"pixel_values": [torch.from_numpy(np.array(images.resize((32, 32)))).permute(2, 0, 1).float()]}


def test_a_crop_depends_on_its_number_alone_and_held_out_pictures_are_never_trained_on(seen):
    one, again, other = crops(seen), crops(seen), crops(seen, seed=1)
    rows = [one.rows(step) for step in range(7)]
    assert rows[1] == [4, 5, 6, 7] and one.training == 28 and len(one.held_out) == 4
    first = [one.take(some).inputs["pixel_values"] for some in rows]
    later = again.take(rows[5]).inputs["pixel_values"]
    assert torch.equal(first[5], later)
    assert not torch.equal(first[5], other.take(rows[5]).inputs["pixel_values"])
    assert not torch.equal(first[0][0], first[2][1])  # of one picture in two epochs
    held = one.take(one.held_out).inputs["pixel_values"]
    assert torch.equal(held, again.take(again.held_out).inputs["pixel_values"])
    assert set(one.measured).isdisjoint(one.files) and len(set(one.measured)) == 1
    assert len(one.about["skipped"]) == 1 and "torn.png: " in one.about["skipped"][0]


def test_what_is_measured_is_trained_under_no_other_name(seen, tmp_path):
    save_pictures(tmp_path / "all" / "some", 6)
    save_pictures(tmp_path / "all", 6, seed=1)
    text = [f"images:{tmp_path / 'all'}=0.6", f"images:{tmp_path / 'all' / 'some'}=0.4"]
    settings = tawny.Recovery.make(text=text, **SHOWN)
    made = crops_of(settings, processor, lambda pixels: 17, lambda _: None)
    trained = {path.resolve() for path in made.files}
    assert trained and not trained & {path.resolve() for path in made.measured}


def test_a_pruned_model_that_sees_comes_nearer_and_a_stopped_run_gives_the_same_bytes(seen, monkeypatch):
    monkeypatch.setattr(
        "tawny.recovery.training._PASSING_TOKENS", 2 * 4 * 17
    )  # a stop amid a walk of two steps
    keys = {"text": seen.data, **SHOWN}
    record = tawny.recover(seen.pruned, seen.dense, seen.root / "whole", **keys)
    assert record.best["loss"] < record.start["loss"] and record.zeros == record.zeros_before
    assert record.text["counted"] == ["crops", "positions"] and record.tokens == 17 * 4 * 7
    plan = tawny.plan_recovery(seen.pruned, seen.dense, **keys)
    assert (plan.tokens, plan.trained, plan.zeros) == (record.tokens, record.trained, record.zeros_before)
    out = seen.root / "again"
    stopped(monkeypatch, lambda: tawny.recover(seen.pruned, seen.dense, out, **keys), after=5)
    resumed = tawny.recover(seen.pruned, seen.dense, out, **keys)
    whole, again = (load_file(folder / "model.safetensors") for folder in (seen.root / "whole", out))
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert [entry["loss"] for entry in record.curve] == [entry["loss"] for entry in resumed.curve]


@pytest.mark.parametrize("name", ["whisper", "bert"])
def test_tensors_by_name_are_learned_from_and_padding_does_not_count(name):
    dense = tiny_encoder(name)
    pruned = copy.deepcopy(dense)
    tawny.prune(pruned, sparsity=0.5, solver="magnitude", allocator="uniform", calibration=inputs_for(dense))
    twin = copy.deepcopy(pruned)
    inputs = inputs_for(dense, 16)
    inputs = padded(inputs) if name == "bert" else inputs
    record = tawny.recover(pruned, dense, text=inputs, **SHORT)
    assert record.best["loss"] < record.start["loss"] and record.zeros == record.zeros_before
    held = {key: value[-1:] for key, value in inputs.items()}
    real = held.get("attention_mask", torch.ones(1, record.text["seqlen"])).bool()
    with torch.no_grad():
        f, g = (model(**held).last_hidden_state[real].double() for model in (twin, dense))
    lost = float(((f - g).square().sum(-1) / g.square().sum(-1)).mean())
    assert record.start["loss"] == pytest.approx(lost, rel=0.02)  # the teacher's states are kept in bfloat16


def test_more_padding_does_not_change_a_gradient():
    dense = tiny_encoder("bert")
    inputs = padded(inputs_for(dense, 16))
    more = {key: torch.cat([value, torch.zeros_like(value)], 1) for key, value in inputs.items()}
    norms = []
    for given in (inputs, more):
        pruned = copy.deepcopy(dense)
        tawny.prune(pruned, sparsity=0.5, solver="magnitude", allocator="uniform", calibration=inputs)
        record = tawny.recover(pruned, dense, text=given, **SHORT)
        norms.append(record.curve[0]["norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_what_a_model_cannot_learn_from_is_refused(seen, tmp_path):
    live = tiny_encoder("vit")
    pair = (seen.pruned, seen.dense, tmp_path / "out")
    for keys, kind, reason in (
        ({"text": "wiki"}, TextError, "'wiki' is a text, and this model sees pictures: give images:DIR"),
        (
            {"text": inputs_for(tiny_encoder("whisper"))},
            ModelError,
            "takes pixel_values, and input_features was given",
        ),
        ({"text": seen.data, "strict": True}, TextError, r"torn\.png cannot be read as a picture"),
        ({"text": {**inputs_for(live, 3)}, "batch": 4}, TextError, "2 samples are left to train on"),
    ):
        with pytest.raises(kind, match=reason):
            tawny.recover(*pair, **{**SHOWN, "tokens": 17 * 4 * 20, **keys})
    one = tmp_path / "one"
    save_pictures(one, 1)
    with pytest.raises(TextError, match="holds one picture; expected one to measure on"):
        tawny.recover(*pair, text=f"images:{one}", **SHOWN)


def test_the_command_line_recovers_what_sees(run, seen):
    out = seen.root / "said"
    keys = ["--text", seen.data, "--tokens", 17 * 8, "-o", "eval_windows=2", "-o", "compute=float32"]
    code, said, err = run("recover", seen.pruned, "--teacher", seen.dense, "--out", out, *keys)
    words = " ".join(said.split())
    assert code == 0 and "on 2 held-out crops of 17 positions of images:" in words, err
    assert "136 positions in 2 steps" in words
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Dots are measured on crops" in page and "136 positions of images:" in page
