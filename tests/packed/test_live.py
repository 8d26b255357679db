from __future__ import annotations

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

import tawny
from tawny.errors import ModelError, NumericalError, UserError
from tawny.kernels import native
from tawny.model.linears import is_plain, linears_of
from tawny.model.structure import find_stack
from tawny.packed.embedding import PackedEmbedding
from tawny.packed.linear import DenseLinear, PackedLinear
from tests.tiny import FAMILIES, tiny_model, tokens


def pruned(family: str, sparsity: float = 0.6, **changes):
    model = tiny_model(family, **changes)
    path, blocks = find_stack(model)
    with torch.no_grad():
        for index, block in enumerate(blocks):
            for linear in linears_of(block, f"{path}.{index}"):
                weight = linear.view(getattr(linear.module, linear.parameter).data)
                weight[weight.abs() < weight.abs().flatten().quantile(sparsity)] = 0
    return model


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def greedy(model, prompt: torch.Tensor, count: int = 12) -> torch.Tensor:
    return model.generate(prompt, max_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_the_dense_one_computes(family):
    dense = pruned(family)
    packed = tawny.pack_model(deepcopy(dense), "f32")
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    for ids in (tokens(2, 24), tokens(1, 1)):
        torch.testing.assert_close(logits(packed, ids), logits(dense, ids), atol=2e-4, rtol=2e-4)


def test_a_model_that_cannot_be_packed_whole_is_not_saved_half(tmp_path):
    model = pruned("llama")
    model.model.layers[-1].mlp.down_proj.weight.data[0, 0] = 1e6
    with pytest.raises(NumericalError, match=r"20 linears of the model are packed already: load it anew"):
        tawny.pack_model(model, "f16")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "half")
    headless = pruned("llama")
    headless.lm_head = torch.nn.Identity()
    with pytest.raises(UserError, match="has no linear head"):
        tawny.pack_model(headless, "bf16", head="int8")
    assert not any(isinstance(module, PackedLinear) for module in headless.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_gives_the_tokens_of_the_dense_model_up_to_ties(family):
    dense = pruned(family).bfloat16()
    packed = tawny.pack_model(deepcopy(dense), "bf16")
    prompt = tokens(1, 8)
    ours, theirs = greedy(packed, prompt)[0], greedy(dense, prompt)[0]
    if not torch.equal(ours, theirs):  # the two may part where the dense model itself is undecided
        at = int((ours != theirs).nonzero()[0])
        last = logits(dense, theirs[None, :at])[0, -1].float()
        assert last.max() - last[ours[at]] <= 0.02 * last.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_a_packed_head_serves_a_tied_embedding_and_another_has_rows_of_its_own(family, tied):
    dense = pruned(family, tie_word_embeddings=tied)
    packed = tawny.pack_model(deepcopy(dense), "f32", head="int8")
    head, embedding = packed.get_output_embeddings(), packed.get_input_embeddings()
    assert isinstance(head, PackedLinear) and head.kind == "int8"
    assert isinstance(embedding, PackedEmbedding)
    rows = embedding.__dict__["head"]
    assert (rows is head) == tied and rows.kind == "int8"
    ids = tokens(2, 24)
    # the same model with the same rounded matrices, dense
    with torch.no_grad():
        dense.get_output_embeddings().weight.copy_(head.dense(torch.float32))
        dense.get_input_embeddings().weight.copy_(rows.dense(torch.float32))
    assert torch.equal(embedding(ids), dense.get_input_embeddings()(ids))
    torch.testing.assert_close(logits(packed, ids), logits(dense, ids), atol=2e-2, rtol=2e-3)


def test_the_embedding_follows_the_models_type_and_its_copies():
    packed = tawny.pack_model(pruned("qwen2"), "bf16", head="int8")
    ids = tokens(1, 4)
    assert packed.get_input_embeddings()(ids).dtype is torch.float32
    packed.to(torch.bfloat16)
    assert packed.get_input_embeddings()(ids).dtype is torch.bfloat16
    twin = deepcopy(packed)
    assert twin.get_input_embeddings().__dict__["head"] is twin.get_output_embeddings()
    assert torch.equal(logits(twin, ids), logits(packed, ids))
    twin.tie_weights()
    assert torch.equal(logits(twin, ids), logits(packed, ids))
    with pytest.raises(IndexError, match="token ids"):
        packed.get_input_embeddings()(torch.tensor([[300]]))


def test_rows_come_out_alike_with_and_without_compiled_kernels():
    packed = tawny.pack_model(pruned("qwen2"), "bf16", head="int8")
    embedding, ids = packed.get_input_embeddings(), tokens(2, 9)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embedding.to(dtype)
        ours = embedding(ids)
        with native.force("torch"):
            assert torch.equal(embedding(ids), ours)


def test_a_linear_with_too_few_zeros_stays_dense_and_keeps_its_tensor():
    model = pruned("llama", sparsity=0.0)
    before = model.model.layers[0].mlp.up_proj.weight
    tawny.pack_model(model, "bf16")
    linear = model.model.layers[0].mlp.up_proj
    assert isinstance(linear, DenseLinear) and linear.weight is before
    assert isinstance(model.lm_head, DenseLinear)


def test_a_tied_head_that_stays_dense_stays_tied():
    packed = tawny.pack_model(pruned("qwen2"), "bf16")
    assert packed.lm_head.weight is packed.model.embed_tokens.weight
    assert isinstance(packed.lm_head, DenseLinear)


class Doubling(torch.nn.Linear):
    """A subclass that does more than its name says."""

    def forward(self, x):
        return 2 * super().forward(x)


class Reordered(torch.nn.Linear):
    """A subclass whose own forward is the same product (as Falcon's)."""

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("kind", ["class", "hook", "pre-hook", "forward", "pruning"])
def test_a_linear_that_does_more_than_multiply_stays_as_it_is(kind):
    model = pruned("llama")
    owner, ids = model.model.layers[1].mlp, tokens(1, 8)
    old = owner.up_proj
    if kind == "class":
        old.__class__ = Doubling
    elif kind == "hook":
        old.register_forward_hook(lambda module, args, output: output * 2)
    elif kind == "pre-hook":
        old.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    elif kind == "forward":
        old.forward = lambda x: 2 * torch.nn.functional.linear(x, old.weight)
    else:
        from torch.nn.utils import prune

        prune.l1_unstructured(old, "weight", 0.02)
    owner.gate_proj.__class__ = Reordered
    expected = logits(model, ids)
    tawny.pack_model(model, "f32")
    assert owner.up_proj is old and isinstance(owner.gate_proj, PackedLinear)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-3)


def test_a_head_that_does_more_than_multiply_is_kept_and_not_packed():
    model, ids = pruned("llama"), tokens(1, 8)
    model.lm_head.__class__ = Doubling
    with pytest.raises(UserError, match="a Doubling, does more than multiply by its weight"):
        tawny.pack_model(model, "f32", head="f32")
    expected = logits(model, ids)
    torch.testing.assert_close(logits(tawny.pack_model(model, "f32"), ids), expected, rtol=1e-3, atol=1e-3)


def test_what_is_plain_is_found_out_without_weights():
    class Grouped(torch.nn.Linear):
        def forward(self, x):
            return torch.cat([x, x], -1)

    assert not is_plain(Grouped(8, 16)) and is_plain(Reordered(8, 16)) and is_plain(torch.nn.Linear(8, 16))
    assert not is_plain(Doubling(8, 16, device="meta")) and is_plain(Reordered(8, 16, device="meta"))


def test_a_packed_linear_tells_the_type_of_its_model(tmp_path):
    """Some models look at `linear.weight.dtype`."""
    model = tawny.pack_model(pruned("llama").to(torch.bfloat16), "int8", head="int8")
    proj = model.model.layers[0].self_attn.q_proj
    assert proj.weight.dtype is torch.bfloat16 is model.lm_head.weight.dtype
    assert model.float().model.layers[0].self_attn.q_proj.weight.dtype is torch.float32
    pruned("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    tawny.pack(tmp_path / "dense", tmp_path / "packed", "bf16")
    loaded = tawny.load(tmp_path / "packed")
    assert loaded.model.layers[0].self_attn.q_proj.weight.dtype is torch.bfloat16
    assert not any(name.endswith("q_proj.weight") for name in loaded.state_dict())


def test_routers_are_not_packed():
    model = tawny.pack_model(pruned("qwen3_moe"), "bf16")
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    assert gates and not any(isinstance(gate, PackedLinear) for gate in gates)


def test_saving_a_packed_model_the_plain_way_is_refused(tmp_path):
    packed = tawny.pack_model(pruned("llama"), "bf16")
    with pytest.raises(ValueError, match="tawny"):
        packed.save_pretrained(tmp_path / "x")


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(UserError, match="int7"):
        tawny.pack_model(tiny_model("llama"), "int7")
    with pytest.raises(UserError, match="group"):
        tawny.pack_model(tiny_model("llama"), "bf16", group=128)
    with pytest.raises(ModelError, match="blocks"):
        tawny.pack_model(nn.Linear(4, 4))
    with pytest.raises(UserError, match=r"not torch\.float8_e4m3fn; dequantise it first"):
        tawny.pack_model(tiny_model("llama").to(torch.float8_e4m3fn), "bf16")
    with pytest.raises(ModelError, match="meta"):
        tawny.pack_model(tiny_model("llama").to("meta"))


@pytest.mark.parametrize("sparsity", [0.6, 0.0])
def test_a_packed_model_is_not_packed_again(sparsity):
    model = tawny.pack_model(pruned("llama", sparsity), "bf16")
    said = model.hf_quantizer.quantization_config.values
    for again in ({"values": "int8"}, {"head": "int8"}):
        with pytest.raises(ModelError, match=r"packed already; .* load it again and pack it once"):
            tawny.pack_model(model, **again)
    assert model.hf_quantizer.quantization_config.values == said == "bf16"


def test_a_packed_live_model_is_evaluated_like_any_other():
    dense = pruned("llama")
    packed = tawny.pack_model(deepcopy(dense), "f32")
    windows = tokens(2, 32)
    ours, theirs = tawny.evaluate(packed, windows), tawny.evaluate(dense, windows)
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)


def test_a_packed_model_compiles_whole():
    packed = tawny.pack_model(pruned("qwen2"), "f32", head="int8")
    ids = tokens(1, 6)
    expected = logits(packed, ids)
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_a_packed_model_is_pickled_whole(family):
    packed = tawny.pack_model(pruned(family, tie_word_embeddings=True), "f32", head="int8")
    twin = pickle.loads(pickle.dumps(packed))
    embedding = twin.get_input_embeddings()
    assert type(embedding) is type(packed.get_input_embeddings())
    assert embedding.__dict__["head"] is twin.get_output_embeddings()
    ids = tokens(1, 6)
    assert torch.equal(logits(twin, ids), logits(packed, ids))


def test_the_refusal_to_save_says_what_to_use(tmp_path, caplog):
    packed = tawny.pack_model(pruned("llama"), "bf16")
    with pytest.raises(ValueError, match="logger"):
        packed.save_pretrained(tmp_path / "x")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("tawny")]
    assert "tawny.pack" in line and "tawny unpack" in line and "\n" not in line
