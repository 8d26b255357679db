"""What a run is given is told apart, and refused before there is work to lose."""

from __future__ import annotations

import copy
import json

import pytest
import torch

import tawny
from tawny.errors import Interrupted, ModelError, OutputError, RecipeError, TextError
from tests.run.test_journal import PressesCtrlC
from tests.tiny import tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

KEYS = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda"}


def test_a_path_is_that_of_a_text(tmp_path):
    (tmp_path / "t.txt").write_text("The owl hunts at night. " * 40)
    read = {"samples": 2, "seqlen": 16, "tokenizer": tiny_tokenizer()}
    record = tawny.prune(tiny_model("llama"), calibration=tmp_path / "t.txt", **read, **KEYS)
    assert record.text["name"] == str(tmp_path / "t.txt")
    report = tawny.profile(tiny_model("llama"), calibration=tmp_path / "t.txt", **read)
    assert report.text["name"] == str(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (tokens().tolist(), "calibration is a list; expected a torch tensor"),
        (tokens().numpy(), "calibration is a ndarray; expected a torch tensor"),
        ((tokens(), tokens().tolist()), "attention mask is a list; expected a torch tensor"),
        ((tokens(),), r"a tuple of 1; expected \(tokens, attention mask\)"),
        (tokens() > 9, r"\[4, 24\] torch.bool; expected integer tokens"),
        (tokens().to(torch.complex64), "torch.complex64; expected integer tokens"),
        (tokens() + 10_000, "the model has 256 words, ids 0 to 255: tokenise it with the model's own"),
        (tokens() - 10_000, "ids 0 to 255"),
    ],
)
def test_what_are_no_tokens_of_the_model_are_refused(given, said):
    with pytest.raises(TextError, match=said):
        tawny.prune(tiny_model("llama"), calibration=given, **KEYS)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32])
def test_tokens_may_be_any_integers(kind):
    made = []
    for given in (tokens(), tokens().to(kind)):
        model = tiny_model("llama")
        tawny.prune(model, calibration=given, **KEYS)
        made.append([*model.state_dict().values(), torch.tensor(tawny.evaluate(model, given).loss)])
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_a_tokenizer_that_knows_more_than_the_model_is_told_of(tmp_path):
    tiny_model("llama", vocab_size=60).save_pretrained(tmp_path / "small")
    tiny_model("llama").save_pretrained(tmp_path / "large")
    for name in ("small", "large"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "t.txt").write_text("zzz The owl hunts at night. " * 40)
    said = "the model has 60 words, ids 0 to 59"
    with pytest.raises(TextError, match=said):
        tawny.prune(
            tmp_path / "small", tmp_path / "out", calibration=tmp_path / "t.txt", samples=2, seqlen=8, **KEYS
        )
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(TextError, match=said):
        tawny.evaluate(tmp_path / "small", tmp_path / "t.txt", seqlen=64)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("dtype", "bfloat16", "dtype is bfloat16 and the live model is float32"),
        ("compute", "bfloat16", "compute is bfloat16 and the live model is float32"),
        ("device", "cuda", "device is cuda and the live model is on cpu"),
    ],
)
def test_keys_that_a_live_model_would_ignore_are_refused(key, value, said):
    with pytest.raises(RecipeError, match=said):
        tawny.prune(tiny_model("llama"), calibration=tokens(), **KEYS, **{key: value})


def test_a_live_model_says_what_it_is_stored_as(tmp_path):
    own = {"dtype": "float32", "compute": "float32"}
    record = tawny.prune(tiny_model("llama"), tmp_path / "out", calibration=tokens(), **KEYS, **own)
    assert record.storage == record.compute == "float32"
    assert json.loads((tmp_path / "out" / "run.json").read_text())["storage"] == "float32"


def test_a_live_model_that_cannot_be_saved_is_refused_before_it_is_changed(tmp_path):
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    model.generation_config.temperature = 0.5  # transformers saves it with do_sample only
    teacher = {"teacher": tiny_model("llama", seed=1), "text": tokens()}
    for job, keys in ((tawny.prune, {"calibration": tokens(), **KEYS}), (tawny.recover, teacher)):
        with pytest.raises(ModelError, match=r"cannot be saved: .*temperature.*generation_config") as caught:
            job(model, out=tmp_path / "out", **keys)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert tawny.prune(model, calibration=tokens(), **KEYS).zeros
    model.generation_config.do_sample = True
    tawny.prune(model, tmp_path / "out", calibration=tokens(), **KEYS)
    assert (tmp_path / "out" / "generation_config.json").is_file()


def test_a_live_model_that_was_stopped_is_said_to_be_changed():
    model = tiny_model("llama")
    with pytest.raises(Interrupted, match="7 linears of the live model are pruned already"):
        tawny.prune(model, calibration=tokens(), progress=PressesCtrlC(1), **KEYS)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).any()
    with pytest.raises(Interrupted, match="source is untouched"):
        tawny.profile(tiny_model("llama"), calibration=tokens(), progress=PressesCtrlC(1))


def test_a_live_model_does_not_throw_away_what_another_run_has_finished(tmp_path, monkeypatch):
    from tawny.run import journal

    monkeypatch.setattr(journal, "SHARE", float("inf"))
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    with pytest.raises(Interrupted, match="are kept"):
        tawny.prune(tmp_path / "dense", out, calibration=tokens(), progress=PressesCtrlC(2), **KEYS)
    with pytest.raises(OutputError, match="holds an unfinished run: repeat its command to go on with it"):
        tawny.prune(tiny_model("llama"), out, calibration=tokens(), **KEYS)
    assert tawny.prune(tmp_path / "dense", out, calibration=tokens(), **KEYS).resumed == 1
    tawny.prune(tiny_model("llama"), out, calibration=tokens(), overwrite=True, **KEYS)


def test_a_plan_refuses_a_packed_model_as_pruning_does(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tawny.prune(tmp_path / "dense", tmp_path / "out", calibration=tokens(), **KEYS)
    tawny.pack(tmp_path / "out", tmp_path / "packed")
    for ask in (tawny.plan, lambda source, **keys: tawny.prune(source, tmp_path / "again", **keys)):
        with pytest.raises(ModelError, match="is packed"):
            ask(tmp_path / "packed", sparsity=0.5, solver="magnitude")


def test_a_plan_counts_the_bytes_of_each_tensor(tmp_path):
    model = tiny_model("llama").to(torch.bfloat16)
    model.lm_head.weight.data = model.lm_head.weight.data.float()
    model.save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.5, "solver": "magnitude", "allocator": "uniform"}
    for more in ({}, {"dtype": "float16"}):
        planned = tawny.plan(tmp_path / "dense", **keys, **more).disk["checkpoint"]
        made = tawny.prune(tmp_path / "dense", tmp_path / "out", overwrite=True, **keys, **more)
        assert planned == pytest.approx(made.bytes, rel=0.03)  # headers are not counted


def test_a_plan_counts_the_dense_stream_of_refining(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    (tmp_path / "t.txt").write_text("word " * 100)
    keys = {**KEYS, "calibration.text": str(tmp_path / "t.txt")}
    plain, refined = (tawny.plan(tmp_path / "dense", **keys, **{"refine.epochs": n}).disk for n in (0, 1))
    assert refined["hidden_states"] == 2 * plain["hidden_states"] and refined["peak"] > plain["peak"]
    packed = tawny.plan(tmp_path / "dense", **{**keys, "values": "int4"})  # both folders, for a while
    assert packed.disk["peak"] >= 2 * packed.disk["checkpoint"] and any(
        "packs this" in x for x in packed.notes
    )
