"""Experts that are packed in the place of a fused parameter."""

from __future__ import annotations

import json
import pickle
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import tawny
from tawny.decoding import whole
from tawny.decoding.decoder import Decoder
from tawny.decoding.swapped import kernels
from tawny.errors import CheckpointError, ModelError
from tawny.kernels import native
from tawny.model.checkpoint import Checkpoint, Unit
from tawny.model.linears import linears_of
from tawny.packed import format
from tawny.packed.expert_loop import run_experts
from tawny.packed.experts import PackedExpert, PackedExperts
from tawny.packed.folder import PackedCheckpoint, PackedFolder
from tawny.packed.linear import PackedLinear
from tawny.packed.places import places_of
from tawny.progress import Silent
from tests.packed.test_folder import bytes_of, copy, edit_config, edit_index, put, renamed
from tests.packed.test_live import greedy, logits, pruned
from tests.reference import packed_folder
from tests.tiny import tokens

_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Fused as [experts, out, in] and stored apart, or as [experts, in, out] and stored as they are; run by transformers or not.
MIXTURES = {
    "mixtral": {},
    "qwen3_moe": {},
    "gpt_oss": _FOUR,
    "llama4_text": {
        **_FOUR,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 24,
    },
    "nemotron_h": {
        # Attention first: transformers 5.25 asks the first layer of the cache how long it is, and experts have no such layer.
        "layers_block_type": ["attention", "moe", "moe"],
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "n_groups": 1,
    },
}


def mixture(family: str, **changes):
    return pruned(family, **MIXTURES[family], **changes)


def saved(folder: Path, family: str, **changes) -> Path:
    mixture(family, **changes).save_pretrained(folder)
    return folder


def packed_experts(model) -> dict[str, PackedExperts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedExperts)}


@pytest.fixture(scope="module")
def packed_mixtral(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mixtral")
    tawny.pack(saved(base / "dense", "mixtral"), base / "packed", "f32")
    return base / "packed"


@pytest.fixture(scope="module")
def packed_gpt_oss(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("gpt_oss")
    tawny.pack(saved(base / "dense", "gpt_oss"), base / "packed", "f32")
    return base / "packed"


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_packed_and_compute_what_the_dense_ones_do(family):
    dense = mixture(family)
    fused = {name for name, value in dense.named_parameters() if value.dim() == 3 and "experts" in name}
    packed = tawny.pack_model(deepcopy(dense), "f32")
    assert set(packed_experts(packed)) == fused
    assert not fused & {name for name, _ in packed.named_parameters()}
    for ids in (tokens(2, 24), tokens(1, 1)):
        torch.testing.assert_close(logits(packed, ids), logits(dense, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_that_leave_their_masks_out_compute_the_same_bits(family, monkeypatch):
    level = next((name for name in native.available() if name not in (*native.EXPANDING, "torch")), None)
    if level is None:
        pytest.skip("needs a compiled kernel that does not expand")
    packed = tawny.pack_model(mixture(family), "int8")
    ids = tokens(1, 24)
    with native.force(level):
        with kernels(packed):
            expected = logits(packed, ids)
        monkeypatch.setattr(whole, "_SAMPLE", 1)
        monkeypatch.setattr(whole, "WORTH", 1e9)
        whole._decided.clear()
        with kernels(packed):
            inside = [module for module in packed.modules() if isinstance(module, PackedExpert)]
            assert inside and all(module.masks is None for module in inside)
            assert torch.equal(logits(packed, ids), expected)
    assert all(module.masks is not None for module in packed.modules() if isinstance(module, PackedExpert))


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_go_through_a_folder_and_come_back_bit_for_bit(family, tmp_path):
    dense = saved(tmp_path / "dense", family)
    report = tawny.pack(dense, tmp_path / "packed", "f32")
    assert not report.untouched and report.bytes < 0.8 * report.source_bytes
    model = tawny.load(tmp_path / "packed")
    live = tawny.pack_model(AutoModelForCausalLM.from_pretrained(dense).eval(), "f32")
    assert set(model.state_dict()) == set(live.state_dict())
    mine, theirs = packed_experts(model), packed_experts(live)
    assert list(mine) == list(theirs)
    for name, experts in mine.items():
        for read, made in zip(experts, theirs[name], strict=True):
            assert read.transposed == made.transposed and read.shape == made.shape
            assert torch.equal(read.masks, made.masks) and torch.equal(read.values, made.values)
    ids = tokens(1, 8)
    torch.testing.assert_close(logits(model, ids), logits(live, ids), atol=1e-5, rtol=1e-5)
    assert torch.equal(greedy(model, ids, 4), greedy(live, ids, 4))
    assert tawny.unpack(tmp_path / "packed", tmp_path / "again").exact
    assert bytes_of(tmp_path / "again") == bytes_of(dense)


@pytest.mark.parametrize("values,group", [("bf16", None), ("int8", None), ("int8", 128)])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_reader_written_from_the_specification_alone_finds_each_expert(family, values, group, tmp_path):
    dense = saved(tmp_path / "dense", family, num_hidden_layers=1)
    tawny.pack(dense, tmp_path / "packed", values, group)
    checkpoint, index = PackedCheckpoint(tmp_path / "packed"), PackedFolder(tmp_path / "packed")
    found = dict(packed_folder.read(tmp_path / "packed"))
    assert len(found) == 4 + 4 * (3 if family == "mixtral" else 2)
    for name, rows in found.items():
        source, _, place = name.partition("[")
        expected = checkpoint.read([source])[source].float()
        expected = expected[int(place[:-1])] if place else expected
        expected = expected.T if index.made[source][0].transposed else expected
        assert torch.equal(torch.tensor(rows), expected), name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_folders_with_packed_experts_are_inspected_and_evaluated_as_the_dense_ones(family, tmp_path):
    dense = saved(tmp_path / "dense", family)
    tawny.pack(dense, tmp_path / "packed", "f32")
    ours, theirs = tawny.inspect(tmp_path / "packed"), tawny.inspect(dense)
    assert ours.linears == theirs.linears and ours.sparsity == theirs.sparsity
    windows = tokens(2, 32)
    assert tawny.evaluate(tmp_path / "packed", windows).loss == tawny.evaluate(dense, windows).loss
    live = [tawny.evaluate(tawny.load(tmp_path / name), windows).loss for name in ("packed", "dense")]
    assert live[0] == pytest.approx(live[1], rel=1e-4)


def random_experts(transposed: bool, count: int = 3) -> tuple[PackedExperts, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    W_EOI = torch.randn(count, 12, 20, generator=generator)
    W_EOI[W_EOI.abs() < 0.7] = 0
    made = PackedExperts([format.pack(W_OI, "f32") for W_OI in W_EOI], transposed, torch.float32)
    return made, W_EOI.transpose(1, 2).contiguous() if transposed else W_EOI


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_a_slice_multiplies_as_a_slice_of_the_fused_parameter_does():
    x, bias = torch.randn(5, 20), torch.randn(12)
    experts, fused = random_experts(transposed=False)
    for number in (1, torch.tensor(1), -2):
        close(nn.functional.linear(x, experts[number]), x @ fused[1].T)
    close(nn.functional.linear(x, experts[2], bias), x @ fused[2].T + bias)
    close(nn.functional.linear(x, experts[2], bias=bias), x @ fused[2].T + bias)
    experts, fused = random_experts(transposed=True)
    for product in (
        x @ experts[1],
        torch.matmul(x, experts[1]),
        torch.mm(x, experts[1]),
        x.matmul(experts[1]),
    ):
        close(product, x @ fused[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_no_such_product_gets_the_dense_weight(transposed):
    experts, fused = random_experts(transposed)
    assert experts.shape == fused.shape and experts.size(1) == fused.size(1) and experts.dim() == fused.dim()
    assert experts.dtype is fused.dtype and experts.device == fused.device and len(experts) == len(fused)
    assert torch.equal(experts.as_stored(), fused)
    assert torch.equal(experts[torch.tensor([2, 0])], fused[[2, 0]]) and torch.equal(experts[1:], fused[1:])
    assert torch.equal(torch.einsum("eab->ab", experts), torch.einsum("eab->ab", fused))
    assert torch.equal(torch.mul(experts[1], 2), fused[1] * 2)
    assert torch.equal(experts.transpose(1, 2), fused.transpose(1, 2)) and experts.numel() == fused.numel()
    assert torch.equal(experts[0].T, fused[0].T) and not hasattr(experts, "unknown")
    with pytest.raises(IndexError):
        experts[3]
    x = torch.randn(3, 5, fused.shape[1])
    close(torch.bmm(x, experts), torch.bmm(x, fused))
    wide = torch.randn(5, fused.shape[2])
    if not transposed:  # not the way this parameter is stored, and computed all the same
        close(torch.ones(2, 12) @ experts[0], torch.ones(2, 12) @ fused[0])
    else:
        close(nn.functional.linear(wide, experts[0]), nn.functional.linear(wide, fused[0]))


def test_experts_that_no_token_was_routed_to_are_not_multiplied(monkeypatch):
    experts, fused = random_experts(transposed=True)
    x = torch.randn(3, 4, 20)
    x[1] = 0
    x[2, :3] = 0
    called: list[int] = []
    forward = PackedLinear.forward

    def counted(self, x):
        called.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(PackedLinear, "forward", counted)
    close(torch.bmm(x, experts), torch.bmm(x, fused))
    assert called == [4, 1]
    model = tawny.pack_model(mixture("mixtral"), "f32")
    called.clear()
    logits(model, tokens(1, 1))
    assert len(called) == 3 * (4 + 2 * 2)  # a block: q, k, v, o, and two experts of two weights


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_tawnys_way_to_run_experts_is_that_of_the_models_own_loop(family):
    model = tawny.pack_model(mixture(family), "f32")
    assert model.config._experts_implementation == "tawny" and "tawny" in ALL_EXPERTS_FUNCTIONS
    for ids in (tokens(1, 1), tokens(2, 24)):
        model.config._experts_implementation = "tawny"
        ours = logits(model, ids)
        model.config._experts_implementation = "eager"
        close(ours, logits(model, ids))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_dense_experts_decode_by_tawny_and_are_given_back(family):
    model = mixture(family)
    before, ids = model.config._experts_implementation, tokens(1, 9)
    with torch.inference_mode():
        expected = logits(model, ids)[0, -1]
        with kernels(model):
            assert model.config._experts_implementation == "tawny"
            decoder = Decoder(model, 9)
            decoder.prefill(ids[0, :-1])
            close(decoder.step(int(ids[0, -1])), expected)
    assert model.config._experts_implementation == before != "tawny"
    elsewhere = mixture(family).to("meta")
    with kernels(elsewhere):
        assert elsewhere.config._experts_implementation == before


def module_with(experts: int, **attributes):
    """What transformers' decorator makes of a module of experts, as far as `run_experts` looks."""
    module = nn.Module()
    generator = torch.Generator().manual_seed(3)
    for name, shape in (("up_proj", (experts, 6, 4)), ("down_proj", (experts, 4, 6))):
        setattr(module, name, nn.Parameter(torch.randn(shape, generator=generator)))
    module.act_fn = nn.functional.silu
    plain = {"has_gate": False, "has_bias": False, "is_transposed": False, "has_post_expert_norm": False}
    for name, value in (plain | {"num_experts": experts} | attributes).items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("count", [1, 3])
def test_tokens_that_go_nowhere_and_norms_behind_experts(count):
    module = module_with(3, has_post_expert_norm=True, post_expert_norm=nn.functional.normalize)
    x, weights = torch.randn(count, 4), torch.rand(count, 2)
    numbers = torch.tensor([[1, 3], [3, 3], [0, 2]])[:count]  # three is none of 0, 1, 2
    expected = torch.zeros(count, 4)
    for token in range(count):
        for place, expert in enumerate(numbers[token].tolist()):
            if expert < 3:
                y = nn.functional.silu(x[token] @ module.up_proj[expert].T) @ module.down_proj[expert].T
                expected[token] += nn.functional.normalize(y[None])[0] * weights[token, place]
    with torch.no_grad():
        close(run_experts(module, x, numbers, weights), expected)
        assert not run_experts(module, x[:1], numbers[:1, :0], weights[:1, :0]).any()


def test_packed_experts_of_a_module_that_does_not_say_enough_run_by_its_own_loop():
    dense = mixture("mixtral")
    for block in dense.model.layers:
        del block.mlp.experts.has_post_expert_norm  # as in versions that know of none
    with kernels(dense):
        assert dense.config._experts_implementation not in ("tawny", "eager")
    packed = tawny.pack_model(deepcopy(dense), "f32")
    assert packed.config._experts_implementation == "eager"
    ids = tokens(2, 24)
    dense.config._experts_implementation = "eager"
    torch.testing.assert_close(logits(packed, ids), logits(dense, ids), atol=2e-4, rtol=2e-4)


def test_experts_partly_packed_run_as_well():
    dense = mixture("mixtral")
    for block in dense.model.layers:
        fused = block.mlp.experts.down_proj.data
        fused[fused == 0] = 0.1
    packed = tawny.pack_model(deepcopy(dense), "f32")
    assert {name.rpartition(".")[2] for name in packed_experts(packed)} == {"gate_up_proj"}
    for ids in (tokens(2, 24), tokens(1, 1)):
        torch.testing.assert_close(logits(packed, ids), logits(dense, ids), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_a_packed_mixture_survives_copies_pickles_and_gradients(family):
    dense = mixture(family)
    packed = tawny.pack_model(deepcopy(dense), "f32")
    ids = tokens(1, 6)
    expected = logits(packed, ids)
    ALL_EXPERTS_FUNCTIONS._global_mapping.pop("tawny", None)
    for twin in (pickle.loads(pickle.dumps(packed)), deepcopy(packed)):
        assert torch.equal(logits(twin, ids), expected)
    gradients = []
    packed(input_ids=ids)  # with gradients on, and none wanted
    for model in (packed, dense.requires_grad_(False)):
        x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)


def test_few_zeros_leave_all_experts_of_a_parameter_dense(tmp_path):
    said: list[str] = []

    class Progress(Silent):
        def say(self, text):
            said.append(text)

    dense = saved(tmp_path / "dense", "mixtral", sparsity=0.02)
    report = tawny.pack(dense, tmp_path / "packed", "bf16", progress=Progress())
    experts = [form for form in report.linears if "experts" in form.name]
    assert len(experts) == 24 and {form.form for form in experts} == {"dense"}
    assert all("too few" in form.why for form in experts)
    assert any("left dense because their zeros are too few" in line for line in said)
    method = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert method["linears"] == {"packed": report.packed, "dense": report.dense}
    assert not packed_experts(tawny.load(tmp_path / "packed"))
    assert not packed_experts(tawny.pack_model(mixture("mixtral", sparsity=0.02), "bf16"))
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(dense)


def test_experts_of_a_parameter_may_have_kinds_of_their_own(tmp_path):
    dense = saved(tmp_path / "dense", "mixtral")
    keys = {"sparsity": 0, "allocator": "owl", "solver": "sparsegpt", "calibration": tokens(8, 16)}
    values = {"mean": 4.5, "of": ["int8", "int4"]}
    tawny.prune(dense, tmp_path / "solved", values=values, **keys)
    tawny.pack(tmp_path / "solved", tmp_path / "packed")
    folder = PackedFolder(tmp_path / "packed")
    kinds = [{entry.values for entry in entries} for entries in folder.experts.values()]
    assert {"int8", "int4"} in kinds
    ids = tokens(1, 8)
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "solved")
    found, expected = (logits(tawny.load(tmp_path / name), ids) for name in ("packed", "solved"))
    assert (found - expected).norm() < 0.05 * expected.norm()  # activations are rounded for integers


def test_an_expert_without_zeros_is_packed_whole_beside_others(tmp_path):
    model = mixture("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[2] += 1
    model.save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed", "f32")
    folder = PackedFolder(tmp_path / "packed")
    entry = folder.linears["model.layers.0.mlp.experts.gate_up_proj.2"]
    assert "masks" not in entry.wanted() and entry.rows == (48, 48)
    ids = tokens(1, 8)
    torch.testing.assert_close(
        logits(tawny.load(tmp_path / "packed"), ids), logits(model, ids), atol=2e-4, rtol=2e-4
    )


def test_a_layout_that_is_not_just_put_together_stays_as_it_is(tmp_path, monkeypatch):
    """Weights decide, not names: here the conversion does something to them."""
    dense = saved(tmp_path / "dense", "mixtral")
    convert = Checkpoint.convert

    def twice(self, unit, stored, model):
        return {name: value * 2 for name, value in convert(self, unit, stored, model).items()}

    monkeypatch.setattr(Checkpoint, "convert", twice)
    report = tawny.pack(dense, tmp_path / "packed", "f32")
    assert len(report.untouched) == 6 and all("experts" in name for name in report.untouched)
    monkeypatch.undo()
    tawny.unpack(tmp_path / "packed", tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(dense)


EXPERT = "model.layers.1.mlp.experts.gate_up_proj.2"


OTHER = EXPERT.replace(".2", ".3")


def index_of(value):
    def change(index):
        del index["linears"][EXPERT]["rows"]
        index["linears"][EXPERT]["index"] = value

    return change


def source_of_another_expert(index):
    index["linears"][EXPERT]["sources"] = index["linears"][OTHER]["sources"]


def swapped(key):
    def change(index):
        one, other = index["linears"][EXPERT], index["linears"][OTHER]
        one[key], other[key] = other[key], one[key]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        *(
            put(value, "linears", EXPERT, "rows")
            for value in ([96], [40, 56], [48, 48.0], [0, 96], [48, 48, 0], "48", 5)
        ),
        *(index_of(value) for value in (0, 2, -1, "2", None)),
        *(renamed(EXPERT, EXPERT.replace(".2", other)) for other in (".two", ".7")),
        source_of_another_expert,
    ],
)
def test_a_damaged_index_of_experts_is_refused_in_one_line(damage, packed_mixtral, tmp_path):
    folder = copy(packed_mixtral, tmp_path / "x")
    edit_index(folder, damage)
    for read in (
        lambda: tawny.load(folder, verify=False),
        lambda: AutoModelForCausalLM.from_pretrained(folder),
        lambda: tawny.unpack(folder, tmp_path / "y"),
        lambda: tawny.inspect(folder),
    ):
        with pytest.raises(CheckpointError, match=r"pack the model again|copy or pack it again") as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        *(put(value, "linears", EXPERT, "index") for value in (0, 4, -1, "2", 2.0, True, None)),
        put([48, 16], "linears", EXPERT, "rows"),
        swapped("index"),
    ],
)
def test_a_damaged_place_among_experts_is_refused_in_one_line(damage, packed_gpt_oss, tmp_path):
    folder = copy(packed_gpt_oss, tmp_path / "x")
    edit_index(folder, damage)
    for read in (tawny.load, tawny.inspect, lambda folder: tawny.unpack(folder, tmp_path / "y")):
        with pytest.raises(CheckpointError, match=r"pack the model again|copy or pack it again") as caught:
            read(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "damage", [swapped("sources"), put(lambda both: both[::-1], "linears", EXPERT, "sources")]
)
def test_experts_out_of_the_order_of_their_sources_are_refused_where_a_model_is_known(
    damage, packed_mixtral, tmp_path
):
    folder = copy(packed_mixtral, tmp_path / "x")
    edit_index(folder, damage)
    for load in (tawny.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="not in the order of their sources"):
            load(folder)


def test_sources_in_any_order_and_nan_are_put_together():
    linears = [
        x for x in linears_of(mixture("mixtral").model.layers[0], "b") if x.parameter == "gate_up_proj"
    ]
    fused = torch.randn(4, 96, 32)
    fused[1, 5, 5] = float("nan")
    stored = {
        f"{e}.{name}": part for e in range(4) for name, part in zip("gu", fused[e].split(48), strict=True)
    }
    sources = [f"{e}.{name}" for name in "ug" for e in range(4)]
    unit = Unit(sources, ["b.gate_up_proj"], patterns=[source[-1] for source in sources])
    places = places_of(unit, stored, fused, linears)
    assert [place.sources for place in places] == [[f"{e}.g", f"{e}.u"] for e in range(4)]
    assert {place.rows for place in places} == {(48, 48)}
    assert places_of(unit, stored, fused + 1, linears) is None
    assert places_of(unit, stored, fused, linears[::-1]) is None
    assert places_of(unit, stored | {"3.u": stored["3.u"].half()}, fused, linears) is None


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "qwen2_moe", "mixtral"])
def test_a_packed_live_model_is_not_pruned(family):
    keys = {"num_experts": 4, "moe_topk": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    model = tawny.pack_model(pruned(family, **({} if family == "mixtral" else keys)), "f32")
    before = deepcopy(model.state_dict())
    for use in (partial(tawny.prune, sparsity=0.5, solver="magnitude", allocator="uniform"), tawny.profile):
        with pytest.raises(ModelError, match="is packed"):
            use(model, calibration=tokens(2, 8))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_of_another_model_are_refused_by_name(packed_mixtral, tmp_path):
    folder = copy(packed_mixtral, tmp_path / "x")
    experts = "model.layers.1.mlp.experts."
    edit_index(folder, renamed(f"{experts}gate_up_proj", f"{experts}gates_proj"))
    for load in (tawny.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"gates_proj|gate_up_proj"):
            load(folder)
    fewer = copy(packed_mixtral, tmp_path / "y")
    edit_config(fewer, put(3, "num_local_experts"))
    with pytest.raises(CheckpointError):
        tawny.load(fewer)


def test_an_expert_is_a_packed_linear_that_is_moved_and_shown_like_one():
    experts, fused = random_experts(transposed=False)
    half = experts.to(torch.float16)
    assert half[0].values.dtype is torch.float32 and half.dtype is torch.float16
    assert isinstance(half[0], PackedExpert) and "in_features=20" in repr(half)
    assert torch.equal(half.as_stored(), fused.half())
