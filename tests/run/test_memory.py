from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import tawny
from tawny.allocation.alpha import Alpha
from tawny.allocation.blend import Blend
from tawny.allocation.dlp import Dlp
from tawny.allocation.owl import Owl
from tawny.errors import RecipeError
from tawny.model.linears import linears_of
from tawny.model.streams import OnDisk, Samples, Stream
from tawny.packed.opening import open_stack
from tawny.pruning import session as session_module
from tawny.pruning.prepare import demand_of, prepare
from tawny.pruning.visitors import Solve
from tawny.recipe.merge import resolve_recipe
from tawny.run import journal as journal_module
from tawny.run.memory import Load, parse_size, peak, place, sharing_inputs
from tawny.solvers.sparsegpt import SparseGPT
from tests.run.test_journal import PressesCtrlC, files
from tests.tiny import tiny_model, tokens

OPTIONS = {"sparsity": 0.6, "solver": "sparsegpt", "allocator": "owl"}


@pytest.fixture
def dense(tmp_path):
    tiny_model("llama", dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("6GB", 6e9),
        ("6 gb", 6e9),
        ("2.5g", 2.5e9),
        ("800MB", 8e8),
        ("1GiB", 2**30),
        ("4096", 4096),
        (5, 5),
        (6e9, 6e9),
    ],
)
def test_sizes_are_read_as_they_are_written(given, size):
    assert parse_size(given) == size


@pytest.mark.parametrize(
    "given", ["6XB", "much", "", "0", "-1GB", "9" * 400 + "GB", 0, -5, float("nan"), True]
)
def test_what_is_no_size_says_so(given):
    with pytest.raises(RecipeError, match="write for example 6GB"):
        parse_size(given)


def test_hidden_states_on_disk_are_those_in_memory(dense, tmp_path):
    stack = open_stack(dense, torch.bfloat16)
    samples = Samples(tokens(5, 24))
    kept = Stream(stack, samples, chunk_tokens=48)
    spilt = Stream(stack, samples, chunk_tokens=48, spill=tmp_path / "stream")
    assert isinstance(spilt.hidden, OnDisk)
    for index in range(len(stack)):
        with torch.no_grad(), stack.block(index):
            kept.advance(index)
            spilt.advance(index)
        assert kept.depth == spilt.depth == index + 1
        assert all(torch.equal(a, b) for a, b in zip(kept.hidden, spilt.hidden, strict=True))
        assert len(list(tmp_path.glob("stream*"))) == 1
    spilt.save(tmp_path / "saved")
    kept.save(tmp_path / "other")
    assert (tmp_path / "saved").read_bytes() == (tmp_path / "other").read_bytes()
    again = Stream(stack, samples, 48, depth=3, saved=tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(kept.hidden, again.hidden, strict=True))


def test_the_bytes_do_not_depend_on_the_budget(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SHARE", float("inf"))
    options = {**OPTIONS, "calibration": tokens(200, 24)}
    rich = tawny.prune(dense, tmp_path / "rich", memory="64GB", **options)
    assert rich.memory["hidden_states"] == "memory"
    place = session_module.place_in_memory

    def tight(demand, budget, free):
        return place(demand, peak(demand, spill=True)[0], free)

    monkeypatch.setattr(session_module, "place_in_memory", tight)
    poor = tawny.prune(dense, tmp_path / "poor", memory="1GB", **options)
    assert poor.memory["hidden_states"] == "disk"
    assert files(tmp_path / "rich") == files(tmp_path / "poor")
    # And a run that was stopped under one budget goes on under another.
    with pytest.raises(tawny.TawnyError, match="kept"):
        tawny.prune(dense, tmp_path / "mixed", progress=PressesCtrlC(5), **options)
    monkeypatch.undo()
    assert tawny.prune(dense, tmp_path / "mixed", memory="64GB", **options).resumed == 1
    assert files(tmp_path / "rich") == files(tmp_path / "mixed")


def test_a_budget_that_cannot_hold_is_refused_before_any_work_with_the_smallest_that_can(dense, tmp_path):
    for call in (
        lambda **k: tawny.plan(dense, **k, **text_of(tmp_path)),
        lambda **k: tawny.prune(dense, tmp_path / "out", **k, calibration=tokens()),
    ):
        with pytest.raises(
            RecipeError, match=r"memory 10 MB cannot hold.*at least \d+(\.\d+)? [GM]B"
        ) as caught:
            call(memory="10MB", **OPTIONS)
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "out.partial").exists()


def text_of(folder):
    (folder / "text.txt").write_text("word " * 100)
    return {"calibration.text": str(folder / "text.txt")}


def test_a_plan_refuses_samples_longer_than_the_model_reads(tmp_path):
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    for ask in (tawny.plan, lambda folder, **keys: tawny.prune(folder, tmp_path / "out", **keys)):
        with pytest.raises(RecipeError, match="is more than the model's context of"):
            ask(tmp_path / "dense", sparsity=0.5, seqlen=100_000, text="wiki")


def test_a_plan_says_where_hidden_states_go(dense, tmp_path):
    made = tawny.plan(dense, memory="64GB", **text_of(tmp_path), **OPTIONS)
    assert made.hidden_states == "memory" and made.memory["smallest"] <= made.memory["peak"]
    assert made.disk["hidden_states"] == 128 * 2048 * 32 * open_stack(dense).compute.itemsize


def test_inputs_are_guessed_by_module():
    groups = sharing_inputs(linears_of(tiny_model("llama").model.layers[0], "b"))
    assert [[x.name.rpartition(".")[2] for x in group] for group in groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    groups = sharing_inputs(linears_of(tiny_model("gpt2").transformer.h[0], "b"))
    assert [group[0].shape[1] for group in groups] == [32, 32, 32, 128]


def first_block(folder, **keys):
    """The opened model, and what pruning its first block alone would ask of memory."""
    recipe = resolve_recipe(None, **{"sparsity": 0.5, "allocator": "uniform", "compute": "float32", **keys})
    job = prepare(recipe, folder, tawny.progress.silent, "cpu")
    job = replace(job, by_block=job.by_block[:1])
    return job.stack, demand_of(job, Load(recipe.calibration.samples, recipe.calibration.seqlen, 0))


@pytest.mark.parametrize(
    ("bytes_of", "statistics", "solver"),
    [
        ({}, 3 * 4 * 32**2 + 4 * 48**2, 0),
        ({(32, 48): 10**6}, 4 * 48**2, 10**6),  # down_proj, the last
        ({(48, 32): 10**6}, 4 * 32**2 + 4 * 48**2, 10**6),  # gate_proj and up_proj
    ],
)
def test_hessians_of_linears_that_are_solved_are_not_counted(dense, bytes_of, statistics, solver):
    class Takes(SparseGPT):
        def workspace(self, out: int, width: int, output: str = "none") -> int:
            return bytes_of.get((out, width), 0)

    _, demand = first_block(dense, solver="sparsegpt", compute="bfloat16")
    demand = replace(demand, solver=Takes())
    parts = demand.phases(spill=True)["solve"]
    assert (parts["statistics"], parts["solver"]) == (statistics, solver)


@pytest.mark.parametrize(
    ("family", "changes", "least"),
    [
        ("mistral", {"sliding_window": 16}, 5 * 512**2),
        ("mistral", {"sliding_window": 512}, 0),
        ("falcon", {"multi_query": True, "num_attention_heads": 8}, 4 * 8 * 512**2),
    ],
)
def test_masks_of_a_window_and_scores_of_one_key_head_are_counted(tmp_path, family, changes, least):
    tiny_model(family, **changes).save_pretrained(tmp_path / "dense")
    stack, demand = first_block(tmp_path / "dense", solver="wanda", seqlen=512)
    plain = 2048 * (4 * stack.hidden_bytes + max(x.shape[1] for x in stack.linears(0)) * 16)
    extra = demand.phases(spill=True)["observe"]["forward"] - plain
    assert extra >= 4 * least and (extra == 0) == (least == 0)


def test_states_of_every_token_are_counted(tmp_path):
    """transformers makes three of them in float32 where no kernel does."""
    forward = {}
    for state in (8, 24):
        folder = tmp_path / str(state)
        tiny_model("mamba", state_size=state, time_step_rank=4, conv_kernel=4).save_pretrained(folder)
        stack, demand = first_block(folder, solver="wanda", seqlen=512)
        forward[state] = demand.phases(spill=True)["observe"]["forward"]
    assert forward[24] - forward[8] >= 3 * 4 * stack.config.intermediate_size * 16 * 2048


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # with a head of its own, and with one that is tied
def test_embedding_and_head_are_no_part_of_the_walks(tmp_path, monkeypatch, family):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    stack, demand = first_block(tmp_path / "dense", allocator="owl", solver="sparsegpt", seqlen=24)
    phases = demand.phases(spill=False)
    outside = sum(p.numel() for p in stack.model.get_input_embeddings().parameters())
    for name, parts in phases.items():
        assert (parts["embeddings"] > outside) == (name in ("text", "read", "embed")), name
    here, visit = [], Solve.visit

    def visited(self, block):
        here.append([p for p in block.stack.model.parameters() if not p.is_meta])
        visit(self, block)

    monkeypatch.setattr(Solve, "visit", visited)
    tawny.prune(tmp_path / "dense", tmp_path / "out", **OPTIONS, calibration=tokens())
    names = {linear.name for linear in linears_of(stack.blocks[0], stack.name(0))}
    assert here and all(len(some) == len(here[0]) >= len(names) for some in here)
    assert all(len(p) != 256 for some in here for p in some)  # words


def test_a_mask_or_data_that_blocks_are_called_with_keeps_the_embedding(dense):
    ids = tokens()
    recipe = resolve_recipe(None, sparsity=0.5, allocator="uniform")
    job = prepare(recipe, dense, tawny.progress.silent, "cpu")
    assert demand_of(job, Load(*ids.shape, 0, given=Samples(ids))).alone
    assert not demand_of(job, Load(*ids.shape, 0, given=Samples(ids, torch.ones_like(ids)))).alone


def test_what_an_allocator_takes_is_counted_for_its_block():
    shapes = [(64, 32), (32, 64), (64, 64)]
    whole = sum(out * width for out, width in shapes)
    owl, official = Owl(), Owl(compat="official")
    assert owl.workspace(shapes) == 16 * 64**2
    assert official.workspace(shapes) == owl.workspace(shapes) + 8 * whole
    assert Blend(of="dlp,alpha").workspace(shapes) == max(Dlp().workspace(shapes), Alpha().workspace(shapes))


def test_scores_of_eager_attention_are_counted(tmp_path):
    tiny_model("bloom", n_head=4).save_pretrained(tmp_path / "dense")
    stack, demand = first_block(tmp_path / "dense", solver="wanda", seqlen=512, **{"refine.epochs": 1})
    eager = demand.phases(spill=True)
    stack.config._attn_implementation = "sdpa"
    fused = demand.phases(spill=True)
    scores = 4 * 4 * 4 * 512**2  # samples in one forward, heads, float32
    assert eager["observe"]["forward"] - fused["observe"]["forward"] == 3 * scores
    assert eager["refine"]["refine"] - fused["refine"]["refine"] == 3 * scores


_MEASURE = """
import json, sys, torch
from tests.tiny import tiny_model, tokens
import tawny
torch.set_num_threads(1)
keys = json.loads(sys.argv[5])
verb = tawny.prune if "allocator" in keys else tawny.search
record = verb(sys.argv[1], sys.argv[2], calibration=tokens(64, 64), compute="float32", sparsity=0.5,
              solver=sys.argv[3], memory=sys.argv[4], **keys)
print(json.dumps([record.memory, record.peak_memory]))
"""


_TIGHT = """
import json, sys, torch
from tests.tiny import tokens
import tawny
from tawny.machine import resident_memory
torch.set_num_threads(1)
budget = resident_memory() + 400_000_000
record = tawny.prune(sys.argv[1], sys.argv[2], calibration=tokens(512, 256), memory=budget, sparsity=0.5,
                     allocator="uniform", solver="wanda", compute="float32")
print(json.dumps([record.memory["hidden_states"], record.peak_memory, budget]))
"""


def test_a_tight_budget_is_kept(tmp_path):
    """Hidden states of 537 MB, a budget of 400 beside the interpreter."""
    tiny_model("llama", hidden_size=1024, num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    command = [sys.executable, "-c", _TIGHT, tmp_path / "dense", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    where, peak, budget = json.loads(done.stdout.splitlines()[-1])
    assert where == "disk" and peak <= budget


WIDE = {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 1, "vocab_size": 60_000}
EXPERTS = {"hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 1, "num_experts": 64}


UNIFORM = {"allocator": "uniform"}
SEARCHED = {"search.finalists": 0, "search.trials": 8, "search.levels": 3, "search.candidates": "owl,atp"}


@pytest.mark.parametrize(
    ("family", "keys", "solver", "allocator"),
    [
        ("llama", WIDE, "sparsegpt", UNIFORM),
        pytest.param(  # fused when read, parted when written
            "qwen3_moe",
            {**EXPERTS, "mlp_only_layers": []},
            "wanda",
            UNIFORM,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "llama",
            {**WIDE, "vocab_size": 120_000, "tie_word_embeddings": False},
            "wanda",
            SEARCHED,
            marks=pytest.mark.slow,
        ),
        *(pytest.param("llama", WIDE, x, UNIFORM, marks=pytest.mark.slow) for x in ("wanda", "alps")),
    ],
)
def test_the_estimate_is_what_is_measured(tmp_path, family, keys, solver, allocator):
    tiny_model(family, **keys).save_pretrained(tmp_path / "dense")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            _MEASURE,
            tmp_path / "dense",
            tmp_path / ("out" if allocator is UNIFORM else "out.yaml"),
            solver,
            "4GB",
            json.dumps(allocator),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    memory, peak = json.loads(done.stdout.splitlines()[-1])
    own = memory["parts"]["interpreter"]
    assert memory["estimate"] - own == pytest.approx(peak - own, rel=0.2), (memory, peak)


@pytest.mark.parametrize(("factors", "hint"), [(10**9, "-o output=rows"), (10**6, "fewer --samples")])
def test_a_budget_that_is_too_small_says_what_to_ask_less_of(factors, hint):
    class Asks:
        def phases(self, *, spill):
            return {"solve": {"interpreter": 4 * 10**8, "solver": 10**8, "block": 10**7, "factors": factors}}

    with pytest.raises(RecipeError, match=hint):
        place(Asks(), 10**6)
