"""`tawny.fit` to a compressed-tensors checkpoint."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import RecipeError, UserError
from tawny.model.checkpoint import file_bytes
from tests.tiny import tiny_model, tokens

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
KEYS = {
    "solver": "sparsegpt",
    "calibration": tokens(24, 24),
    "fit.windows": 2,
    "fit.deciding": 4,
    "to": "compressed-tensors",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "dense"
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def fitted(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("fitted") / "small"
    return tawny.fit(model, out, bits=8.5, **KEYS), out


def test_a_folder_is_of_the_size_that_was_asked_for(fitted):
    told, out = fitted
    assert file_bytes(out) == told.bytes <= told.budget
    assert told.bytes > 0.9 * told.budget
    assert not out.with_name("small.partial").exists()


def test_linears_that_runtimes_fuse_have_one_kind(fitted):
    told, out = fitted
    kinds = {name: chosen["kind"] for name, chosen in told.linears.items()}
    assert len({*kinds.values()}) > 1
    for block in (f"model.layers.{i}" for i in range(2)):
        assert len({kinds[f"{block}.self_attn.{x}_proj"] for x in "qkv"}) == 1
        assert kinds[f"{block}.mlp.gate_proj"] == kinds[f"{block}.mlp.up_proj"]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    ignored = {name for name, kind in kinds.items() if kind == "bf16"} | {"lm_head"}
    assert {*settings["ignore"]} == ignored


def test_every_reader_computes_what_was_judged(fitted, model):
    pytest.importorskip("compressed_tensors")
    told, out = fitted
    with torch.no_grad():
        one, two = (
            each(torch.arange(20)[None]).logits
            for each in (tawny.load(out), AutoModelForCausalLM.from_pretrained(out))
        )
    assert torch.equal(one, two)
    row = next(x for x in told.finalists if x["name"] == told.winner)
    agreed = tawny.agreement(out, model, tokens(6, 24, seed=5), compute="float32")
    assert agreed.kl < 4 * row["kl"] + 0.05
    assert "SGLang" in (out / "README.md").read_text() and (out / "report.html").is_file()


def test_kinds_may_be_restricted_and_nothing_is_measured_again(fitted, model, tmp_path, monkeypatch):
    from tawny.choosing import fit as module

    monkeypatch.setattr(module, "measure", None)
    told = tawny.fit(model, tmp_path / "s", bits=8.5, measured=fitted[1], **KEYS, kinds="w4,w8")
    assert {each["kind"] for each in told.linears.values()} == {"w4", "w8"}
    forms = tawny.inspect(tmp_path / "s").stored
    assert all(f"int{bits}, groups of" in forms for bits in (4, 8)) and " and " in forms
    told = tawny.fit(model, tmp_path / "large", bits=13, measured=fitted[1], **KEYS)
    assert "bf16" in {each["kind"] for each in told.linears.values()} and told.bytes <= told.budget


@pytest.mark.parametrize(
    ("keys", "error", "says"),
    [
        ({"kinds": "w4,int4"}, RecipeError, "--kinds names 'int4'.*kinds for GPUs.*are bf16, w8, w4"),
        ({"bits": 1.0}, RecipeError, "cannot be made as small as .*give --size"),
        (
            {"bits": 32.0},
            RecipeError,
            r"takes [\d,]+ bytes with nothing rounded.* ask for less, or name the kinds",
        ),
        (
            {"template": "a.gguf"},
            RecipeError,
            "--template belongs to --to gguf: leave it out with --to compressed-tensors",
        ),
        ({"bits": None, "speed": 5}, RecipeError, "speed and ram are those of Tawny's own decoder"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(model, tmp_path, keys, error, says):
    with pytest.raises(error, match=says) as caught:
        tawny.fit(model, tmp_path / "out", **{"bits": 8.0, **KEYS, **keys})
    assert isinstance(caught.value, UserError) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
