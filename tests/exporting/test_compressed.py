"""Checkpoints of compressed-tensors: what was solved for them, as Tawny, transformers and the format's own library read it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tawny
from tawny.errors import ModelError, OutputError, RecipeError, UserError
from tawny.kinds import GPU_KINDS
from tawny.model.tensorfile import read_tensors
from tawny.report.push import push
from tests.tiny import tiny_model, tokens

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
KEYS = {"sparsity": 0.0, "solver": "sparsegpt", "calibration": tokens(4, 24)}
FAMILIES = ("llama", "qwen2", "gemma")
INPUT = torch.arange(20)[None]


@pytest.fixture(scope="module", params=FAMILIES)
def solved(request, tmp_path_factory):
    """A folder of each family, solved in groups of 32."""
    place = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, dtype=torch.bfloat16, **SHAPE)
    model.save_pretrained(place / "model")
    tawny.prune(place / "model", place / "solved", values={"kind": "w4", "group_size": 32}, **KEYS)
    return place / "solved"


@torch.no_grad()
def logits(model):
    return model(INPUT).logits.float()


def test_what_was_solved_is_what_every_reader_computes(solved, tmp_path):
    pytest.importorskip("compressed_tensors")
    report = tawny.export(solved, tmp_path / "out", "compressed-tensors")
    expected = logits(AutoModelForCausalLM.from_pretrained(solved))
    assert torch.equal(logits(tawny.load(tmp_path / "out")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)
    assert report.types["w4"] == 14 and report.bytes < report.source_bytes
    names = read_tensors(tmp_path / "out" / "model.safetensors")
    stem = "model.layers.1.mlp.down_proj.weight"
    assert names[f"{stem}_packed"].shape == (64, 16) and names[f"{stem}_scale"].shape == (64, 4)
    assert names[f"{stem}_scale"].dtype == torch.bfloat16 and stem not in names
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert settings["ignore"] == ["lm_head"]


@pytest.mark.parametrize(("kind", "group"), [("w4", -1), ("w8", 64), ("w8", 32), ("w8", -1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_grid_is_found_again(tmp_path, kind, group, dtype):
    tiny_model("llama", dtype=dtype, **SHAPE).save_pretrained(tmp_path / "model")
    tawny.prune(tmp_path / "model", tmp_path / "solved", values={"kind": kind, "group_size": group}, **KEYS)
    tawny.export(tmp_path / "solved", tmp_path / "out", "compressed-tensors")
    ours, theirs = (tawny.load(tmp_path / name).state_dict() for name in ("solved", "out"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_dense_folder_is_rounded_by_best_scales(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    tawny.export(tmp_path / "model", tmp_path / "out", "compressed-tensors", "W4")
    dense, rounded = (tawny.load(tmp_path / name).state_dict() for name in ("model", "out"))
    for name, value in dense.items():
        if name.endswith("_proj.weight"):
            W_OSJ = value.float().unflatten(1, (-1, 64 if value.shape[1] == 64 else 128))
            plain = W_OSJ.abs().amax(2, keepdim=True) / 7
            lost = ((W_OSJ / plain).round() * plain - W_OSJ).square().sum()
            assert 0 < (rounded[name] - value).float().square().sum() < lost
        else:
            assert torch.equal(rounded[name], value)
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(tawny.load(tmp_path / "out"))
    )


def test_linears_of_several_kinds_have_groups_of_their_own(tmp_path):
    pytest.importorskip("compressed_tensors")
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    (tmp_path / "kinds.yaml").write_text('allocation: {"*": 0}\nvalues: {"*": w4, "*.down_proj": w8}\n')
    tawny.prune(
        tmp_path / "model",
        tmp_path / "solved",
        **KEYS | {"allocator": str(tmp_path / "kinds.yaml"), "exclude": "*.o_proj"},
        values={"of": ["w4", "w8"], "group_size": 64},
    )
    (tmp_path / "apart.yaml").write_text('allocation: {"*": 0}\nvalues: {"*": w4, "*.up_proj": w8}\n')
    with pytest.raises(
        ModelError, match=r"gate_proj has w4 and .*up_proj w8: runtimes on GPUs multiply them"
    ):
        tawny.prune(tmp_path / "model", tmp_path / "p", **KEYS | {"allocator": str(tmp_path / "apart.yaml")})
    report = tawny.export(tmp_path / "solved", tmp_path / "out", "compressed-tensors")
    assert (report.types["w4"], report.types["w8"]) == (10, 2)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "solved"))
    assert torch.equal(logits(tawny.load(tmp_path / "out")), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), expected)


def test_a_prune_writes_what_runtimes_open(run, tmp_path):
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    given = ["-m", "magnitude", "-o", "exclude=*.o_proj"]
    code, _, err = run("prune", tmp_path / "model", "--values", "w4", "--out", tmp_path / "small", *given)
    assert code == 0, err
    assert "comparing" in err and not (tmp_path / "small.partial").exists()
    record = json.loads((tmp_path / "small" / "run.json").read_text())
    assert record["packed"]["format"] == "compressed-tensors" and record["out"] == str(tmp_path / "small")
    assert "import tawny" not in (tmp_path / "small" / "README.md").read_text()
    tawny.prune(tmp_path / "model", tmp_path / "solved", values="w4", solver="magnitude", exclude="*.o_proj")
    assert torch.equal(logits(tawny.load(tmp_path / "small")), logits(tawny.load(tmp_path / "solved")))
    assert push(tmp_path / "small", "a/b", dry_run=True).files["report.html"]
    tawny.export(tmp_path / "small", tmp_path / "again", "compressed-tensors")
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("small", "again"))
    assert first == again
    code, _, err = run("prune", tmp_path / "model", "--values", "q4_0", "--out", tmp_path / "gguf", *given)
    assert code == 0 and (tmp_path / "gguf" / "gguf.blocks").is_file(), err
    code, _, err = run(
        "prune", tmp_path / "model", "--values", "w4", "--pack", "int4", "--out", tmp_path / "p"
    )
    assert code == 2 and "w4 is a kind for GPUs, which no packed folder holds" in err


def test_a_recovery_trains_norms_and_leaves_the_grid(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    tawny.prune(tmp_path / "model", tmp_path / "solved", values="w4", **KEYS)
    keys = {"text": tokens(8, 24), "held_out": tokens(2, 24, seed=3), "tokens": 24 * 64}
    tawny.recover(tmp_path / "solved", tmp_path / "model", tmp_path / "out", train="norms", lr=0.02, **keys)
    tawny.export(tmp_path / "out", tmp_path / "small", "compressed-tensors")
    assert torch.equal(logits(tawny.load(tmp_path / "small")), logits(tawny.load(tmp_path / "out")))
    assert not torch.equal(logits(tawny.load(tmp_path / "small")), logits(tawny.load(tmp_path / "solved")))


@pytest.mark.parametrize(
    ("kind", "group", "sparsity"), [("w4", 32, 0.0), ("w4", None, 0.0), ("w4", -1, 0.5), ("w8", 64, 0.5)]
)
def test_a_recovery_trains_weights_through_the_grid_and_their_export_rounds_nothing(
    tmp_path, run, kind, group, sparsity
):
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    values = {"kind": kind, "group_size": group}
    tawny.prune(tmp_path / "model", tmp_path / "solved", values=values, **{**KEYS, "sparsity": sparsity})
    tawny.export(tmp_path / "solved", tmp_path / "served", "compressed-tensors")
    # Judged on what it trains on: whether random tokens help with others depends on how a CPU rounds.
    keys = {"text": tokens(8, 24), "held_out": tokens(8, 24), "tokens": 24 * 64}
    keys["lr"] = 0.01 if kind == "w4" else 1e-3  # a step of eight bits is a sixteenth
    made = []
    for source in ("solved", "served"):  # the integers of a served folder are what was solved
        out = tmp_path / f"{source}-out"
        record = tawny.recover(tmp_path / source, tmp_path / "model", out, **keys)
        assert record.best["kl"] < record.start["kl"] and record.best["step"] > 0
        code, _, err = run("export", out, "--to", "compressed-tensors", "--out", tmp_path / f"{source}-small")
        assert code == 0 and "rounded by best scales" not in err, err
        made.append(tawny.load(tmp_path / f"{source}-small"))
        assert torch.equal(logits(made[-1]), logits(tawny.load(out)))
    assert torch.equal(*map(logits, made))
    assert not torch.equal(logits(made[0]), logits(tawny.load(tmp_path / "solved")))
    key = "model.layers.0.mlp.down_proj.weight"
    before, after = (
        tawny.load(folder).state_dict()[key] for folder in (tmp_path / "solved", tmp_path / "solved-out")
    )
    assert not torch.equal(before, after)
    assert sparsity == 0 or bool((after[before == 0] == 0).all())


def test_a_recovery_keeps_each_linear_on_the_grid_that_a_fit_chose_for_it(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16, **SHAPE).save_pretrained(tmp_path / "model")
    (tmp_path / "kinds.yaml").write_text('allocation: {"*": 0}\nvalues: {"*": w4, "*.down_proj": w8}\n')
    values = {"of": ["w4", "w8"], "group_size": 64}
    allocation = str(tmp_path / "kinds.yaml")
    tawny.prune(tmp_path / "model", tmp_path / "solved", allocator=allocation, values=values, **KEYS)
    keys = {"text": tokens(8, 24), "held_out": tokens(2, 24, seed=3), "tokens": 24 * 64, "lr": 0.01}
    tawny.recover(tmp_path / "solved", tmp_path / "model", tmp_path / "out", **keys)
    report = tawny.export(tmp_path / "out", tmp_path / "small", "compressed-tensors")
    assert (report.types["w4"], report.types["w8"]) == (12, 2)
    assert torch.equal(logits(tawny.load(tmp_path / "small")), logits(tawny.load(tmp_path / "out")))


def test_a_width_that_no_group_divides_is_not_trained_through(tmp_path):
    model = tiny_model("llama", **{**SHAPE, "intermediate_size": 72})
    model.save_pretrained(tmp_path / "model")
    keys = {"text": tokens(8, 24), "held_out": tokens(2, 24, seed=3), "tokens": 24 * 8, "kl": 0}
    with pytest.raises(UserError, match="down_proj has 72 columns") as refused:
        tawny.recover(tmp_path / "model", None, tmp_path / "out", values="w4", control=True, **keys)
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("solver", ["magnitude", "wanda", "alps"])
def test_every_solver_ends_on_the_grid(tmp_path, solver):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path / "model")
    record = tawny.prune(
        tmp_path / "model", tmp_path / "out", **{**KEYS, "solver": solver, "sparsity": 0.3}, values="w4"
    )
    assert set(record.values.values()) == {"w4"} and record.zeros > 0
    row = tawny.load(tmp_path / "out").state_dict()["model.layers.0.mlp.down_proj.weight"][0]
    assert len(row.unique()) <= len(GPU_KINDS["w4"].grid)


@pytest.mark.parametrize(
    ("values", "keys", "error", "says"),
    [
        ({"kind": "w4", "group_size": 48}, {}, UserError, "group 48 is not possible; scales of w4 cover 32"),
        (
            {"kind": "w4", "group_size": 128},
            {},
            RecipeError,
            "q_proj has 64 columns, which 128 does not divide: give another",
        ),
        ({"of": ["w4", "int4"]}, {}, RecipeError, "w4 is a kind for GPUs, and goes with others of these"),
        ({"kind": "w4", "head": "w8"}, {}, RecipeError, "w8 is a kind for GPUs, whose runtimes read head"),
        ({"kind": "w4"}, {"refine": 2}, RecipeError, "w4 is for other runtimes"),
        ({"kind": "w4"}, {"exclude": "*.k_proj"}, ModelError, "q_proj has w4 and .*k_proj no kind: runtimes"),
    ],
)
def test_what_cannot_be_solved_is_refused(tmp_path, values, keys, error, says):
    tiny_model("llama", **SHAPE).save_pretrained(tmp_path / "model")
    with pytest.raises(error, match=says) as caught:
        tawny.prune(tmp_path / "model", tmp_path / "out", values=values, **KEYS | keys)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "args", "keys", "error", "says"),
    [
        ("llama", [], {}, UserError, "was not solved for GPUs: prune with --values w4 or w8, or give --type"),
        ("llama", ["q4_k"], {}, UserError, "--type 'q4_k' is not a kind for GPUs; choose w8 or w4"),
        ("llama", ["w4"], {"template": "a.gguf"}, UserError, "--to compressed-tensors takes no --template"),
        ("llama", ["w4"], {"out": "model"}, OutputError, "model"),
        ("mixtral", ["w4"], {}, ModelError, "experts.* is an expert of a fused tensor, and transformers"),
        ("gpt2", ["w4"], {}, ModelError, r"is stored as \[in, out\], which a compressed-tensors"),
    ],
)
def test_what_cannot_be_exported_is_refused(tmp_path, family, args, keys, error, says):
    shape = SHAPE if family != "gpt2" else {"n_embd": 64}
    tiny_model(family, **shape).save_pretrained(tmp_path / "model")
    out = tmp_path / keys.pop("out", "out")
    with pytest.raises(error, match=says) as caught:
        tawny.export(tmp_path / "model", out, "compressed-tensors", *args, **keys)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
