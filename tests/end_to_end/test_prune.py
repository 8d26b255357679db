from __future__ import annotations

import copy
import errno
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tawny
from tawny.allocation import ALLOCATORS
from tawny.calibration.windows import sample_windows, tokenise
from tawny.errors import Interrupted, ModelError, NumericalError, OutputError, PatternError, RecipeError
from tawny.model.checkpoint import Checkpoint
from tawny.model.linears import linears_of
from tawny.model.skeleton import read_config
from tawny.model.structure import find_stack
from tawny.progress import Silent
from tawny.run import writer
from tawny.solvers import SOLVERS
from tests.reference import official_flow
from tests.tiny import FAMILIES, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer

PLAIN = {"sparsity": 0.5, "allocator": "uniform", "solver": "magnitude"}
_WIDTHS = {"hidden_size": 32, "intermediate_size": 24}
# Families whose experts are stored [experts, in, out], with four of them.
TRANSPOSED = {
    "gpt_oss": {**_WIDTHS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "aria_text": {**_WIDTHS, "moe_num_experts": 4, "moe_topk": 2},
    "llama4_text": {
        **_WIDTHS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 24,
    },
}


def prunable(model):
    """Every prunable weight by the name of its linear, `[out, in]`."""
    path, blocks = find_stack(model)
    return {
        linear.name: linear.view(getattr(linear.module, linear.parameter).detach())
        for index, block in enumerate(blocks)
        for linear in linears_of(block, f"{path}.{index}")
    }


def pruned(family, **keys):
    """The prunable weights of a tiny model after a prune."""
    model = tiny_model(family)
    tawny.prune(model, **keys)
    return prunable(model)


def same(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[x], others[x]) for x in weights)


@pytest.fixture
def dense(tmp_path):
    """A folder with a tiny LLaMA."""
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


# Every pair of solver and pattern, with allocators in turn.
PATTERNS = ["unstructured", "row", "matrix", "2:4", "3:8"]
TURNS = itertools.cycle(name for name in ALLOCATORS if name != "file")
CASES = [
    (allocator, *pair) for pair, allocator in zip(itertools.product(SOLVERS, PATTERNS), TURNS, strict=False)
]


@pytest.mark.parametrize(("allocator", "solver", "pattern"), CASES)
def test_every_allocator_solver_and_pattern_meets_its_budget(allocator, solver, pattern):
    model = tiny_model("llama")
    sparsity = {"2:4": 0.5, "3:8": 0.625}.get(pattern, 0.55)
    keys = {"sparsity": sparsity, "allocator": allocator, "solver": solver, "pattern": pattern}
    record = tawny.prune(model, compute="float32", calibration=tokens(), **keys)
    weights = prunable(model)
    total = sum(w.numel() for w in weights.values())
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    assert record.prunable == total and record.zeros == zeros
    if ":" in pattern:
        _n, m = map(int, pattern.split(":"))
        sizes = [sum(weights[x.name].numel() for x in record.linears if x.block == b) for b in range(3)]
        assert abs(zeros - sparsity * total) <= max(sizes) / m
        for entry in record.linears:
            kept, m = map(int, entry.pattern.split(":"))
            groups = weights[entry.name].reshape(entry.shape[0], -1, m)
            assert int((groups != 0).sum(-1).max()) <= kept
    else:
        assert abs(zeros - sparsity * total) <= len(weights)
        for entry in record.linears:
            assert abs(entry.zeros - entry.target * entry.shape[0] * entry.shape[1]) <= 1
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert all(entry.error >= 0 for entry in record.linears)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_folder_opens_in_plain_transformers_and_only_pruned_linears_changed(family, tmp_path):
    dense = tiny_model(family, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.5, "solver": "sparsegpt", "calibration": tokens(), "compute": "float32"}
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", **keys)
    before, after = Checkpoint(tmp_path / "dense"), Checkpoint(tmp_path / "out")
    assert before.shapes == after.shapes and before.dtypes == after.dtypes
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert opened.dtype == torch.bfloat16
    tied = opened.get_output_embeddings().weight is opened.get_input_embeddings().weight
    assert tied == (dense.get_output_embeddings().weight is dense.get_input_embeddings().weight)
    weights = prunable(opened)
    assert sum(int((w == 0).sum()) for w in weights.values()) == record.zeros
    assert abs(record.sparsity - 0.5) < 0.01
    parameters = set(weights)
    for name, value in dense.named_parameters():
        owner = name.removesuffix(".weight")
        if owner not in parameters and not any(p.startswith(name + ".") for p in parameters):
            assert torch.equal(opened.get_parameter(name), value), name
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["sparsity"] == record.sparsity and len(run["linears"]) == len(weights)
    assert not (tmp_path / "out.partial").exists()


def test_a_live_model_and_its_folder_are_pruned_alike(tmp_path):
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path / "dense")
    options = {"sparsity": 0.6, "solver": "sparsegpt", "compute": "float32", "calibration": tokens()}
    tawny.prune(tmp_path / "dense", tmp_path / "out", **options)
    tawny.prune(model, **options)
    assert same(prunable(model), prunable(AutoModelForCausalLM.from_pretrained(tmp_path / "out")))


def test_the_same_recipe_writes_the_same_bytes(products, dense, tmp_path):
    for out in ("a", "b"):
        tawny.prune(dense, tmp_path / out, sparsity=0.6, calibration=tokens())
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_official_compat_gives_the_ratios_and_masks_of_the_slow_restatement():
    ids = tokens(6, 32)
    dense = tiny_model("llama", num_hidden_layers=4)
    expected = copy.deepcopy(dense)
    _, blocks = find_stack(expected)
    shares = official_flow.outlier_shares(expected, blocks, ids, 5)
    ratios = official_flow.owl_ratios(shares, 0.08, 0.7)
    official_flow.prune_wanda(expected, blocks, ids, ratios)
    keys = {"sparsity": 0.7, "solver": "wanda", "compat": "official", "compute": "float32"}
    keys |= {"allocator": "owl", "allocator.M": 5, "allocator.lambda": 0.08}
    record = tawny.prune(dense, calibration=ids, **keys)
    assert len(set(ratios)) >= 3
    for entry in record.linears:
        assert entry.target == pytest.approx(ratios[entry.block], abs=1e-9)
    assert same(prunable(dense), prunable(expected))


def test_lambda_zero_is_uniform():
    keys = {"sparsity": 0.6, "solver": "wanda", "compute": "float32", "calibration": tokens()}
    level = pruned("llama", allocator="owl", **keys, **{"allocator.lambda": 0})
    assert same(level, pruned("llama", allocator="uniform", **keys))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_are_pruned_one_by_one_and_routers_never(family):
    model = tiny_model(family)
    routers = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("gate.weight")}
    assert routers
    record = tawny.prune(model, sparsity=0.5, solver="sparsegpt", compute="float32", calibration=tokens())
    experts = [entry for entry in record.linears if ".experts." in entry.name]
    assert experts and all(abs(entry.sparsity - entry.target) < 0.01 for entry in experts)
    assert all(torch.equal(model.get_parameter(n), p) for n, p in routers.items())
    # Each expert saw other tokens, so the errors differ.
    assert len({entry.error for entry in experts}) == len(experts)


def test_include_and_exclude_restrict_what_is_pruned():
    model = tiny_model("llama")
    record = tawny.prune(model, **PLAIN, include=["*.mlp.*"], exclude=["layers.1.*"])
    assert {entry.name for entry in record.linears} == {
        f"model.layers.{i}.mlp.{p}_proj" for i in (0, 2) for p in ("gate", "up", "down")
    }
    assert record.sparsity == pytest.approx(0.5, abs=1e-3)
    assert int((model.model.layers[1].mlp.up_proj.weight == 0).sum()) == 0


def test_the_tokenizer_of_a_live_model_is_written_beside_it(tmp_path):
    keys = {"sparsity": 0.5, "solver": "wanda", "calibration.samples": 2, "calibration.seqlen": 16}
    (tmp_path / "a.txt").write_text("the quick brown fox " * 20)
    given, out = tiny_tokenizer(), tmp_path / "out"
    tawny.prune(tiny_model("llama"), out, **keys, calibration=tmp_path / "a.txt", tokenizer=given)
    assert AutoTokenizer.from_pretrained(out)("fox")["input_ids"] == given("fox")["input_ids"]
    assert "AutoTokenizer" in (out / "README.md").read_text()
    record = tawny.prune(tiny_model("llama"), tmp_path / "alone", **PLAIN)  # nobody gave one
    assert record.opens == ["AutoModelForCausalLM"]
    assert "AutoTokenizer" not in (tmp_path / "alone" / "README.md").read_text()


def test_an_include_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ModelError, match=r"'\*\.nothing' matches none of 21 linears"):
        tawny.prune(tiny_model("llama"), **PLAIN, include=["*.nothing"])


def test_an_m_that_does_not_divide_a_width_names_the_linears():
    with pytest.raises(PatternError, match=r"q_proj.*32"):
        tawny.prune(tiny_model("llama"), **PLAIN | {"pattern": "3:5", "sparsity": 0.4})


def test_an_m_that_does_not_fit_the_columns_of_a_scale_is_refused_before_the_work(tmp_path):
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path / "dense")
    keys = {"solver": "sparsegpt", "pattern": "3:6", "sparsity": 0.5, "include": "*.down_proj"}
    words = "pattern is 3:6; expected an m that divides 32, the columns that share a scale"
    with pytest.raises(RecipeError, match=words):
        tawny.plan(tmp_path / "dense", **keys, values="int4")
    with pytest.raises(RecipeError, match=words):  # no text is read for it
        tawny.prune(tmp_path / "dense", tmp_path / "out", **keys, values="int4", calibration="none.txt")
    record = tawny.prune(
        tmp_path / "dense", tmp_path / "out", **keys, values="int8", calibration=tokens(4, 24)
    )
    assert record.sparsity == pytest.approx(0.5)  # a scale a row goes with any m


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_nan_weight_names_its_linear(solver, tmp_path):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(NumericalError, match=r"layers\.1"):
        tawny.prune(tmp_path / "dense", tmp_path / "out", sparsity=0.5, solver=solver, calibration=tokens())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_finished_folder_is_refused_and_replaced_only_when_asked(dense, tmp_path):
    out, more = tmp_path / "out", PLAIN | {"sparsity": 0.6}
    tawny.prune(dense, out, **PLAIN)
    with pytest.raises(OutputError, match="exists"):
        tawny.prune(dense, out, **more)
    record = tawny.prune(dense, out, overwrite=True, **more)
    assert json.loads((out / "run.json").read_text())["zeros"] == record.zeros
    with pytest.raises(OutputError, match="source is never overwritten"):
        tawny.prune(out, out, overwrite=True, **more)


def test_a_folder_that_is_no_checkpoint_is_never_replaced(dense, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not a checkpoint folder"):
        tawny.prune(dense, tmp_path / "precious", overwrite=True, **PLAIN)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_path_without_out_is_refused(dense):
    with pytest.raises(RecipeError, match="needs a folder"):
        tawny.prune(dense, **PLAIN)


def test_ctrl_c_leaves_nothing_that_looks_finished(dense, tmp_path):
    class PressesCtrlC(Silent):
        def step(self, text: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="source is untouched"):
        tawny.prune(dense, tmp_path / "out", **PLAIN, progress=PressesCtrlC())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_one_clear_line(dense, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "write_tensors", full)
    with pytest.raises(OutputError, match="disk is full"):
        tawny.prune(dense, tmp_path / "out", **PLAIN)
    assert not (tmp_path / "out").exists()


def test_sharded_checkpoints_keep_every_tensor(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "dense", max_shard_size="60KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    tawny.prune(tmp_path / "dense", tmp_path / "out", **PLAIN)
    assert Checkpoint(tmp_path / "dense").shapes == Checkpoint(tmp_path / "out").shapes


def test_storage_dtype_can_be_asked_for(dense, tmp_path):
    tawny.prune(dense, tmp_path / "out", **PLAIN, dtype="bfloat16")
    assert set(Checkpoint(tmp_path / "out").dtypes.values()) == {"BF16"}
    assert read_config(tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_number_that_the_storage_dtype_cannot_hold_is_refused(tmp_path, name):
    model = tiny_model("llama")
    model.get_parameter(name).data.view(-1)[3] = -70000.0
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(
        NumericalError, match=rf"^{name} \[.*\] holds -7e\+04, which is infinity in float16; choose"
    ):
        tawny.prune(tmp_path / "dense", tmp_path / "out", **PLAIN, dtype="float16")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    model.get_parameter(name).data.view(-1)[3] = 6e4
    model.save_pretrained(tmp_path / "dense")
    tawny.prune(tmp_path / "dense", tmp_path / "out", **PLAIN, dtype="float16")


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_samples_longer_than_a_table_of_positions_are_refused(family, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "dense")
    words = "^seqlen 129 is more than the model's context of 128; give --seqlen 128$"
    with pytest.raises(RecipeError, match=words):
        tawny.prune(model, sparsity=0.5, calibration=tokens(2, 129))
    missing = {"calibration": "none.txt", "calibration.seqlen": 129}
    with pytest.raises(RecipeError, match=words):  # before the text is read
        tawny.prune(tmp_path / "dense", tmp_path / "out", sparsity=0.5, **missing)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    tawny.prune(tiny_model("llama"), sparsity=0.5, solver="wanda", calibration=tokens(2, 200))


@pytest.mark.parametrize("family", ["llama", "mixtral", "qwen3_moe", *TRANSPOSED])
def test_padding_does_not_count_in_statistics(family):
    ids = tokens(4, 24)
    mask = torch.ones_like(ids)
    mask[:, :6] = 0
    other = ids.clone()
    other[:, :6] = 7  # other padding, same text
    made = []
    for padded in (ids, other):
        # An activation rounds its last rows otherwise than whole vectors of them, and padding moves rows about among
        # those of an expert; in float64 that is lost before statistics are taken in float32.
        model = tiny_model(family, dtype=torch.float64, **TRANSPOSED.get(family, {}))
        keys = {"sparsity": 0.6, "allocator": "uniform", "solver": "sparsegpt"}
        tawny.prune(model, calibration=(padded, mask), **keys)
        made.append(model.state_dict())
    assert same(*made)


def test_one_expert_may_be_pruned_that_no_token_reaches():
    for expert in range(4):
        model = tiny_model("mixtral")
        keys = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda"}
        record = tawny.prune(model, include=[f"experts.*.{expert}"], calibration=tokens(3, 2), **keys)
        assert record.sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("family", TRANSPOSED)
def test_experts_that_are_stored_the_other_way_keep_n_of_m_inputs(family):
    gate_up, down = (48, 32), (32, 24)  # (out, in)
    model = tiny_model(family, **TRANSPOSED[family])
    record = tawny.prune(model, pattern="2:4", allocator="uniform", solver="magnitude", include=["experts.*"])
    assert {entry.shape for entry in record.linears} == {gate_up, down}
    for name, weight in model.named_parameters():
        if weight.dim() == 3:
            groups = weight.transpose(1, 2).reshape(-1, 4)
            assert ((groups != 0).sum(1) == 2).all(), name


def test_samples_begin_as_the_tokenizer_begins_a_text_but_not_as_the_papers_do(dense, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The owl hunts at night. " * 20)
    tokenizer = tiny_tokenizer(begins=True)
    tokenizer.save_pretrained(dense)
    keys = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda", "compute": "float32"}
    read = {"calibration": str(text), "samples": 4, "seqlen": 16}

    def written(name, **more):
        record = tawny.prune(dense, tmp_path / name, **keys, **more)
        return record, load_file(tmp_path / name / "model.safetensors")

    record, weights = written("begun", **read)
    assert record.text["bos"] is True
    begun = tokenise(text.read_text(), tokenizer)
    assert same(weights, written("given", calibration=sample_windows(begun, 4, 16, 0))[1])
    papers, others = written("papers", **read, bos=False)
    assert papers.text["bos"] is False
    whole = tokenise(text.read_text(), tokenizer, bos=False)
    assert same(others, written("whole", calibration=sample_windows(whole, 4, 16, 0))[1])
    assert not same(others, weights)
    assert written("official", **read, compat="official")[0].text["bos"] is False
