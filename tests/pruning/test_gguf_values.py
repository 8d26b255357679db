from __future__ import annotations

import gguf
import pytest
import torch

import tawny
from tawny.errors import Interrupted, RecipeError, UserError
from tawny.gguf_kinds import ENCODED, GGUF_KINDS
from tawny.model.tensorfile import read_tensors
from tawny.pruning.packing import prune_and_pack
from tawny.recipe.merge import resolve_recipe
from tests.run.test_journal import PressesCtrlC
from tests.tiny import tiny_model, tokens

KEYS = {"sparsity": 0.0, "solver": "sparsegpt", "calibration": tokens(4, 24)}


@pytest.fixture
def folder(tmp_path):
    tiny_model("llama", intermediate_size=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_holds_what_was_solved_for_gguf(tmp_path, folder):
    record = tawny.prune(folder, tmp_path / "out", values="q4_k", **KEYS)
    model = tawny.load(tmp_path / "out")
    weights = {name.removesuffix(".weight"): value for name, value in model.named_parameters()}
    encoded = read_tensors(tmp_path / "out" / ENCODED)
    assert len(encoded) == len(record.linears) == len(record.values)
    assert any("get q5_0: q4_k has blocks of 256 columns" in line for line in record.warnings)
    for key, rows in encoded.items():
        name, _, kind = key.rpartition(".")
        assert record.values[name] == kind
        values = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[GGUF_KINDS[kind].type])
        assert torch.equal(torch.from_numpy(values.copy()), weights[name].detach())


def test_a_live_model_leaves_what_was_solved_too(tmp_path):
    model = tiny_model("llama", intermediate_size=64)
    tawny.prune(model, tmp_path / "out", values="q4_0", **KEYS)
    weights = dict(model.named_parameters())
    encoded = read_tensors(tmp_path / "out" / ENCODED)
    for key, rows in encoded.items():
        values = gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType.Q4_0)
        assert torch.equal(
            torch.from_numpy(values.copy()), weights[f"{key.removesuffix('.q4_0')}.weight"].detach()
        )
    assert encoded


@pytest.mark.parametrize("tied", [True, False])
def test_head_and_embedding_get_the_types_that_they_are_asked_for(tmp_path, tied):
    tiny_model("llama", intermediate_size=64, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    ends = {"head": "q8_0"} if tied else {"head": "q8_0", "embedding": "q5_k"}
    tawny.prune(tmp_path / "model", tmp_path / "out", **KEYS, values={"kind": "q4_0", **ends})
    model, encoded = tawny.load(tmp_path / "out"), read_tensors(tmp_path / "out" / ENCODED)
    named = {"lm_head.weight.q8_0": model.lm_head, "model.embed_tokens.weight.q5_1": model.model.embed_tokens}
    if tied:
        named = {"model.embed_tokens.weight.q8_0": model.lm_head}
    assert {key for key in encoded if key.rpartition(".")[0].endswith("weight")} == set(named)
    for key, module in named.items():
        type = gguf.GGMLQuantizationType[GGUF_KINDS[key.rpartition(".")[2]].type]
        values = torch.from_numpy(gguf.dequantize(encoded[key].numpy(), type).copy())
        assert torch.equal(values, module.weight.detach())


def test_a_run_that_was_stopped_gives_the_same_bytes(tmp_path, folder):
    tawny.prune(folder, tmp_path / "whole", values="q4_0", **KEYS)
    with pytest.raises(Interrupted):
        tawny.prune(folder, tmp_path / "out", values="q4_0", progress=PressesCtrlC(2), **KEYS)
    tawny.prune(folder, tmp_path / "out", values="q4_0", **KEYS)
    assert (tmp_path / "out" / ENCODED).read_bytes() == (tmp_path / "whole" / ENCODED).read_bytes()


def test_a_width_that_no_type_takes_is_refused(tmp_path):
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path / "model")
    with pytest.raises(
        RecipeError, match=r"mlp.down_proj has 48 columns, and types of GGUF files take multiples of 32"
    ):
        tawny.prune(tmp_path / "model", tmp_path / "out", values="q4_0", **KEYS)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"values": "q4_k", "sparsity": 0.5},
            "q4_k values hold no zeros.*choose q8_0, q6_k, q5_0, q4_0 or q3_k",
        ),
        ({"values": "q4_0", "refine": 2}, "refine trains the grids of packed folders"),
        (
            {"values": {"of": ["q4_0", "q5_0"], "mean": 5}},
            "q4_0 is a type of GGUF files, and goes with others",
        ),
        ({"values": {"of": ["q4_0", "int4"]}}, "q4_0 is a type of GGUF files, and goes with others"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path, folder, keys, says):
    with pytest.raises(RecipeError, match=says):
        tawny.prune(folder, tmp_path / "out", **{**KEYS, **keys})


@pytest.mark.parametrize("values", ["q4_0", {"kind": "int4", "head": "q4_0"}])
def test_no_packed_folder_is_made_of_it(tmp_path, folder, values):
    with pytest.raises(UserError, match="q4_0 is a type of GGUF files, which no packed folder holds"):
        prune_and_pack(folder, tmp_path / "out", recipe=resolve_recipe(values=values, sparsity=0.0))
    assert not (tmp_path / "out").exists()
