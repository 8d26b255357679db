from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    Qwen3VLConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import tawny
from tawny.decoding.author import Author
from tawny.errors import CheckpointError, ModelError, NumericalError, TextError
from tawny.model.skeleton import open_skeleton
from tawny.model.stack import Stack, live_stack
from tawny.model.streams import Samples, Stream
from tawny.model.structure import find_stack
from tawny.packed.opening import open_checkpoint, open_stack
from tests.encoders import inputs_for, tiny_encoder
from tests.tiny import FAMILIES, tiny_model, tokens
from tests.tokenizer import tiny_tokenizer


def recorded_outputs(model, ids, mask=None):
    """Every block's output in the model's own forward, and the logits."""
    _, blocks = find_stack(model)
    seen: list[torch.Tensor] = []
    handles = [
        b.register_forward_hook(lambda m, a, out: seen.append(out if torch.is_tensor(out) else out[0]))
        for b in blocks
    ]
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return seen, logits


def test_blocks_never_see_a_cache_even_where_the_model_has_no_argument_for_it():
    """It would grow with every call of a block, and the next call would attend to what an earlier one had made."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": 256,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 32,
            "depth": 1,
            "num_heads": 2,
            "out_hidden_size": 32,
            "deepstack_visual_indexes": [0],
        },
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    stack = live_stack(model)
    stream = Stream(stack, Samples(tokens()))
    for index in range(len(stack)):
        call = stream.call(index, 0)
        assert not any(isinstance(value, Cache) for value in (*call.args, *call.kwargs.values()))
        first = stack.forward(index, stream.hidden[0], call)
        stack.forward(index, stream.hidden[0].flip(0), call)
        assert torch.equal(first, stack.forward(index, stream.hidden[0], call))
        stream.advance(index)


MASKED = ("llama", "gemma3_text", "bloom", "opt", "gpt2")


@pytest.mark.parametrize(
    ("family", "masked"), [*((x, False) for x in FAMILIES), *((x, True) for x in MASKED)]
)
def test_streamed_blocks_equal_the_models_own_forward(family, masked, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    ids, mask, real = tokens(), None, torch.ones(4, 24, dtype=torch.bool)
    if masked:
        real[1, :5] = real[3, :11] = False
        mask = real.long()
    expected, logits = recorded_outputs(model, ids, mask)
    stack = open_stack(tmp_path, torch.float32)
    stream = Stream(stack, Samples(ids, mask), chunk_tokens=2 * ids.shape[1])
    assert len(stack) == len(expected) and len(stream) == 2
    for index, want in enumerate(expected):
        assert all(p.is_meta for p in stack.blocks[index].parameters())
        with stack.block(index):
            stream.advance(index)
        torch.testing.assert_close(torch.cat(stream.hidden)[real], want[real], rtol=1e-4, atol=1e-5)
        assert all(p.is_meta for p in stack.blocks[index].parameters())
    made = [stack.logits(ids[part], h) for part, h in zip(stream.slices, stream.hidden, strict=True)]
    torch.testing.assert_close(torch.cat(made)[real], logits[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_that_forgot_what_is_outside_its_blocks_computes_the_same(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    stack, ids = open_stack(tmp_path, torch.float32), tokens(2, 12)
    parameters = sum(p.numel() for p in stack.model.parameters())
    hidden = stack.enter(ids)
    before, first = stack.logits(ids, hidden), stack.calls(ids)[0]
    with torch.no_grad(), stack.block(0):
        given = stack.forward(0, hidden.clone(), first)
        assert stack.walks_alone(ids)
        stack.forget_outside()
        assert torch.equal(stack.forward(0, hidden.clone(), stack.calls(ids)[0]), given)
    assert all(p.is_meta for p in stack.model.parameters())
    assert sum(p.numel() for p in stack.model.parameters()) == parameters
    assert torch.equal(stack.logits(ids, hidden), before)
    stack.forget_outside()
    assert torch.equal(stack.enter(ids), hidden)
    stack.forget_outside()
    assert not any(p.is_meta for p in stack.whole().parameters())


def test_a_live_model_forgets_nothing():
    model = tiny_model("llama")
    live_stack(model).forget_outside()
    assert not any(p.is_meta for p in model.parameters())


def test_routers_compute_in_float32_as_transformers_keeps_them(tmp_path):
    keys = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    keys |= {"v_head_dim": 8}
    keys |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
    keys |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "num_key_value_heads": 4}
    tiny_model("deepseek_v3", **keys).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    stack = open_stack(tmp_path, torch.bfloat16)
    stack.load(1)
    ours, theirs = (dict(model.named_parameters()) for model in (stack.model, own))
    kinds = {name: (ours[name].dtype, value.dtype) for name, value in theirs.items() if ".layers.1." in name}
    assert all(mine is other for mine, other in kinds.values())
    assert {mine for mine, _ in kinds.values()} == {torch.bfloat16, torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tail_slice_gives_the_same_logits(family):
    ids = tokens(1, 20)
    stack = live_stack(tiny_model(family))
    stream = Stream(stack, Samples(ids))
    for index in range(len(stack)):
        stream.advance(index)
    whole = stack.logits(ids, stream.hidden[0])
    parts = [stack.logits(ids[:, s], stream.hidden[0][:, s]) for s in (slice(0, 7), slice(7, 20))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_weights_of_a_checkpoint_are_given_on_the_device_of_the_stack(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path)
    stack = open_stack(tmp_path, torch.float32)
    with stack.block(0):
        for linear in stack.linears(0):
            stored = stack.stored[linear.key]
            assert stack.look(linear).untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
            assert stack.weight(linear).untyped_storage().data_ptr() != stored.untyped_storage().data_ptr()
    stack.device = torch.device("meta")  # as another device would be
    with stack.block(0):
        for linear in stack.linears(0):
            for given in (stack.weight(linear), stack.stored_weight(linear), stack.look(linear)):
                assert given.is_meta and tuple(given.shape) == linear.shape
            assert not stack.stored[linear.key].is_meta  # what is written stays where it was read


def test_tables_that_no_file_has_lie_on_the_device_of_the_stack(tmp_path, monkeypatch):
    tiny_encoder("bert").save_pretrained(tmp_path)
    skeleton = open_skeleton(tmp_path, torch.float32)
    tables = [name for name, _ in skeleton.named_buffers()]
    assert any("position_ids" in name for name in tables)
    monkeypatch.setattr(Stack, "_load_outside", lambda _: None)  # on this device weights seem to be missing
    Stack(skeleton, open_checkpoint(tmp_path), torch.float32, "meta")
    assert all(value.is_meta for _, value in skeleton.named_buffers())


def modes(model):
    return [module.training for module in model.modules()]


def test_a_live_model_is_read_in_eval_mode_and_left_in_its_own():
    """GPT-2 drops a tenth of everything in train mode."""
    ids = tokens(8, 24)
    keys = {"sparsity": 0.5, "solver": "wanda", "allocator": "owl", "compute": "float32", "calibration": ids}
    made, losses = [], []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        model.transformer.h[1].mlp.eval()  # its owner's wish, which `train` would overrule
        before = modes(model)
        tawny.prune(model, **keys)
        losses.append(tawny.evaluate(model, ids).loss)
        losses.append(tawny.agreement(model, tiny_model("gpt2").train(training), ids).kl)
        assert modes(model) == before
        made.append(model.state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert losses[:2] == losses[2:]


def test_couplings_and_own_texts_of_a_model_in_training_are_those_of_eval_mode():
    """Two forwards that drop different numbers would prove no coupling, and another text would be written."""
    keys = {"sparsity": 0.2, "pattern": "channels+heads", "allocator": "uniform", "solver": "magnitude"}
    made = []
    for training in (False, True):
        model = tiny_model("gpt2").train(training)
        tawny.prune(model, **keys)
        written = Author(lambda model=model: model, tiny_tokenizer(), None, 0, 0)._documents(40, 2)
        made.append((model.state_dict(), written))
        assert model.training == training
    assert all(torch.equal(made[0][0][name], made[1][0][name]) for name in made[0][0])
    assert made[0][1] == made[1][1]


def test_an_error_says_what_it_leaves_of_a_live_model():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NumericalError) as caught:
        tawny.prune(model, sparsity=0.5, solver="wanda", allocator="uniform", calibration=tokens())
    assert any("linears of the live model are pruned already" in note for note in caught.value.__notes__)


def test_a_live_model_with_adapters_is_refused():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match="adapters of peft"):
        tawny.prune(adapted, sparsity=0.5, calibration=tokens())


def test_inputs_that_are_no_tensors_are_refused():
    model = tiny_encoder("vit")
    inputs = inputs_for(model, 4)
    for broken in (
        {name: value.tolist() for name, value in inputs.items()},
        {name: value.numpy() for name, value in inputs.items()},
    ):
        with pytest.raises(TextError, match=r'expected a torch tensor.*return_tensors="pt"'):
            tawny.prune(model, sparsity=0.5, calibration=broken)


def test_a_live_model_gets_its_mode_back_when_a_run_fails(monkeypatch):
    model = tiny_model("gpt2").train()
    model.transformer.h[1].mlp.eval()
    model.transformer.h[2].mlp.c_fc.weight.data[0, 0] = torch.nan
    before = modes(model)
    with pytest.raises(NumericalError):
        tawny.prune(model, sparsity=0.5, solver="wanda", allocator="owl", calibration=tokens())
    assert True in before and modes(model) == before


def test_blocks_that_share_weights_are_refused_with_both_names():
    def one_mlp(layers):
        layers[1].mlp = layers[0].mlp

    def one_block(layers):
        layers[2] = layers[0]

    def one_weight(layers):
        layers[1].self_attn.q_proj.weight = layers[1].self_attn.o_proj.weight

    def one_norm(layers):
        layers[1].input_layernorm.weight = layers[0].post_attention_layernorm.weight

    for share, first, second in (
        (one_mlp, "layers.0.mlp.gate_proj.weight", "layers.1.mlp.gate_proj.weight"),
        (one_block, "layers.0.self_attn.q_proj.weight", "layers.2.self_attn.q_proj.weight"),
        (one_weight, "layers.1.self_attn.q_proj.weight", "layers.1.self_attn.o_proj.weight"),
        (one_norm, "layers.0.post_attention_layernorm.weight", "layers.1.input_layernorm.weight"),
    ):
        model = tiny_model("llama")
        share(model.model.layers)
        with pytest.raises(ModelError, match=f"model.{first} and model.{second} are one parameter") as error:
            tawny.prune(model, sparsity=0.5, solver="magnitude", allocator="uniform")
        assert "\n" not in str(error.value) and "deepcopy" in str(error.value)


def test_a_shared_block_copied_as_the_error_says_and_a_tied_head_are_pruned():
    model = tiny_model("qwen2")
    model.model.layers[2].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    record = tawny.prune(model, sparsity=0.5, solver="magnitude", allocator="uniform")
    assert record.zeros >= record.prunable // 2
    assert model.lm_head.weight is model.model.embed_tokens.weight


T5 = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 32}


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="encoder-decoder, whose decoder takes two streams"):
        open_stack(tmp_path)


def test_a_model_that_does_not_compute_in_sixteen_bits_says_what_to_try(tmp_path):
    tiny_model("xlstm", num_heads=4, num_blocks=3, chunk_size=8).save_pretrained(tmp_path / "dense")
    keys = {"sparsity": 0.5, "allocator": "uniform", "solver": "wanda", "calibration": tokens()}
    with pytest.raises(ModelError, match=r"does not compute in bfloat16 \(.*\); try compute=float32$"):
        tawny.prune(tmp_path / "dense", tmp_path / "out", compute="bfloat16", **keys)
    record = tawny.prune(tmp_path / "dense", tmp_path / "out", compute="float32", **keys)
    assert record.sparsity == pytest.approx(0.5, abs=0.01)


def test_a_truncated_shard_is_one_clear_error(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        open_stack(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path):
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        open_stack(tmp_path)
