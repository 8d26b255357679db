from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from tawny.decoding import decoder, whole
from tawny.decoding.decoder import Decoder, _rounded_once_more
from tawny.decoding.step import Step
from tawny.decoding.swapped import kernels
from tawny.errors import UserError
from tawny.kernels import native
from tawny.model.source import packaged_gguf, resolve
from tawny.model.structure import find_stack
from tawny.packed.linear import DenseLinear, PackedLinear, pack_linear
from tawny.packed.live import pack_model
from tests.decoding.greedy import compare, greedy, prune
from tests.tiny import BAMBA, tiny_model, tokens

LEVELS = [name for name in native.available() if name != "torch"]
compiled = pytest.mark.skipif(
    not LEVELS or not hasattr(native.library(), "tawny_step"), reason="needs the compiled kernels"
)


def packed(model, values="bf16"):
    """A copy with every linear of its blocks packed."""
    made = copy.deepcopy(model)
    for module in list(find_stack(made)[1].modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, pack_linear(child, values))
    return made


def logits(model, quick, ids, more=6):
    """Of each token after a prompt, and the path that made the last."""
    with torch.inference_mode(), kernels(model):
        decoder = Decoder(model, len(ids), quick)
        decoder.prefill(ids[:-more])
        made = [decoder.step(int(token)).float().clone() for token in ids[-more:]]
    return torch.stack(made), decoder.path


@compiled
@pytest.mark.parametrize("pays", [True, False])
def test_masks_are_left_out_where_that_is_faster_and_come_back(monkeypatch, pays):
    """The same bits either way; the model is as it was afterwards, and a second text converts nothing again."""
    model = tiny_model("llama").eval()
    prune(model)
    masked = packed(model, "int4")
    ids = tokens(1, 20)[0]
    expected, _ = logits(masked, None, ids)  # too small a model for whole weights to pay
    before = dict(masked.named_modules())
    held = dict(masked.named_buffers())
    twin = copy.deepcopy(masked)
    monkeypatch.setattr(whole, "_SAMPLE", 1)
    monkeypatch.setattr(whole, "WORTH", 1e9 if pays else 0.0)
    pays = pays and native.kernel_name() not in native.EXPANDING
    with kernels(twin):
        inside = [m for m in twin.modules() if isinstance(m, PackedLinear)]
        assert all((m.masks is None and m.kind == "int8") == pays for m in inside)
    with kernels(twin):
        assert [m for m in twin.modules() if isinstance(m, PackedLinear)] == inside
    found, path = logits(twin, None, ids)
    assert path == "blocks" and torch.equal(found, expected)
    assert dict(twin.named_modules()).keys() == before.keys()
    assert all(torch.equal(buffer, held[name]) for name, buffer in twin.named_buffers())


@pytest.mark.parametrize(("free", "exchanged"), [(9, {"int3", "int4"}), (2, {"int3"}), (1, set())])
def test_each_kind_loses_its_masks_where_they_are_slower_and_memory_suffices(monkeypatch, free, exchanged):
    """By an injected pace: masked int3 takes four times as long as whole, int4 twice, int8 half as long."""
    level = next((name for name in LEVELS if name not in native.EXPANDING), None)
    if level is None:
        pytest.skip("needs a compiled kernel that does not expand")
    stack = find_stack(prune(tiny_model("llama")).eval())[1]
    linear = next(module for module in stack.modules() if isinstance(module, nn.Linear))
    made = nn.ModuleList(pack_linear(linear, kind) for kind in ("int8", "int4", "int3"))
    pace = {"int3": 4.0, "int4": 2.0, "int8": 0.5}
    monkeypatch.setattr(
        whole, "_seconds", lambda weights: [1.0 if w.masks is None else pace[w.kind.name] for w in weights]
    )
    monkeypatch.setattr(whole, "_SAMPLE", 1)
    monkeypatch.setattr(whole, "free_memory", lambda: free * linear.weight.numel())
    with native.force(level):
        assert {linear.kind for linear in whole.exchanged(made)} == exchanged


def test_nothing_is_exchanged_where_no_kernel_is_chosen(monkeypatch):
    monkeypatch.setattr(whole, "_SAMPLE", 1)
    with native.force("torch"):
        assert whole.exchanged(packed(prune(tiny_model("llama")), "int8")) == {}


@compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_call_a_token_gives_the_models_own_logits(level, dtype):
    ids = tokens(1, 20)[0]
    for family, changes in (
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 64, "hidden_size": 72, "intermediate_size": 200}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 16}),
        ("mixtral", {}),
        ("qwen3_moe", {"mlp_only_layers": [0]}),
    ):
        if ("mix" in family or "moe" in family) and dtype != torch.float32:
            continue  # in 16 bits, two experts of so small a model are often as likely as each other
        model = tiny_model(family, dtype=dtype, **changes)
        with native.force(level):
            quick, path = logits(model, None, ids)
            own, slow = logits(model, False, ids)
        assert (path, slow) == ("blocks", "model"), (family, changes)
        bound = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
        assert (quick - own).norm() <= bound * own.norm(), (family, changes)


@compiled
@pytest.mark.parametrize("values", ["bf16", "f32", "int8"])
def test_packed_linears_run_in_the_one_call_too(products, values):
    ids = tokens(1, 20)[0]
    dtype = torch.float32 if values == "f32" else torch.bfloat16
    model = packed(prune(tiny_model("llama", dtype=dtype)), values)
    (quick, path), (own, _) = logits(model, None, ids), logits(model, False, ids)
    assert path == "blocks" and (quick - own).norm() <= 0.06 * own.norm()


@compiled
@pytest.mark.parametrize("values", ["f32", "int4"])
def test_packed_experts_run_in_the_one_call_too(values):
    ids, model = tokens(1, 20)[0], tiny_model("mixtral", hidden_size=64, intermediate_size=128)
    for name, weight in model.named_parameters():
        if "experts" in name:
            weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.7] = 0
    model = pack_model(model, values)
    (quick, path), (own, _) = logits(model, None, ids), logits(model, False, ids)
    assert path == "blocks" and (quick - own).norm() <= 1e-3 * own.norm()


@compiled
def test_threads_do_not_change_a_bit_of_the_one_call():
    model = packed(prune(tiny_model("llama", hidden_size=256, head_dim=64, intermediate_size=512)), "f32")
    ids = tokens(1, 60)[0]
    alone, path = logits(model, None, ids)
    torch.set_num_threads(2)
    try:
        shared, _ = logits(model, None, ids)
    finally:
        torch.set_num_threads(1)
    assert path == "blocks" and torch.equal(alone, shared)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "phi", "opt", "gpt2", "bloom", "qwen2_moe"])
def test_other_models_are_left_to_their_own_forward(family):
    ids = tokens(1, 12)[0]
    made, path = logits(tiny_model(family), None, ids, more=2)
    assert path == "model" and made.isfinite().all()


COUNTING = {
    "roberta": {"is_decoder": True},  # whose positions begin behind its padding token
    "bamba": BAMBA,
    "minimax": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "block_size": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.mark.parametrize("family", COUNTING)
def test_models_that_do_not_ask_their_cache_where_they_are_are_told(family):
    model, ids = tiny_model(family, **COUNTING[family]), tokens(1, 14)[0]
    whole = model(input_ids=ids[None], use_cache=False).logits[0]
    with torch.inference_mode():
        decoder = Decoder(model, 14)
        made = [decoder.prefill(ids[:8]), *(decoder.step(int(token)).clone() for token in ids[8:])]
    torch.testing.assert_close(torch.stack(made), whole[7:], atol=1e-4, rtol=1e-4)


@compiled
@pytest.mark.parametrize(
    "change", [{"residual_multiplier": 0.5}, {"logits_scaling": 2.0}, {"attention_multiplier": 1.0}]
)
def test_what_no_module_shows_is_found_by_comparing(change):
    model = tiny_model("granite", **{"attention_multiplier": 8**-0.5, **change})
    ids = tokens(1, 12)[0]
    made, path = logits(model, None, ids, more=3)
    own, _ = logits(model, False, ids, more=3)
    # The attention's scale is a plain number of the module, and is taken from there.
    assert path == ("blocks" if "attention_multiplier" in change else "model")
    torch.testing.assert_close(made, own, rtol=1e-4, atol=1e-4)


def positional(dtype=torch.float32):
    """A model that scales its queries by their position, from the 16th token on."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0}
    rope |= {"original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.1}
    return tiny_model("ministral3", dtype=dtype, sliding_window=None, rope_parameters=rope)


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_depends_on_the_position_is_found_before_the_text_gets_there(dtype):
    ids, model = tokens(1, 60)[0], positional(dtype)
    assert logits(model, None, ids[:12])[1] == "blocks"  # proved for 12 tokens only
    made, path = logits(model, None, ids, more=50)
    own, _ = logits(model, False, ids, more=50)
    assert path == "model" and torch.equal(made, own)


@compiled
def test_the_far_comparison_finds_wrong_angles_and_leaves_the_cache_as_it_was(monkeypatch):
    ids, angles = tokens(1, 60)[0], Step._angles

    def late(self, *args):
        cosine, sine = angles(self, *args)
        cosine[40:] = -cosine[40:]
        return cosine, sine

    monkeypatch.setattr(Step, "_angles", late)
    model = tiny_model("llama")
    made, path = logits(model, None, ids, more=50)
    assert path == "model" and torch.equal(made, logits(model, False, ids, more=50)[0])


@compiled
def test_a_model_is_compared_once(monkeypatch):
    model, ids, calls = tiny_model("llama"), tokens(1, 12)[0], []
    prove = Decoder._prove

    def counted(self, quick, token, far):
        calls.append(token)
        return prove(self, quick, token, far)

    monkeypatch.setattr(Decoder, "_prove", counted)
    for _ in range(3):
        assert logits(model, None, ids)[1] == "blocks"
    assert len(calls) == 1


CHANGES = {
    "hook": lambda m: m.register_forward_hook(lambda module, args, output: output * 1.5),
    "hook before": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
    "forward": lambda m: setattr(m, "forward", lambda x: nn.functional.linear(x * 1.5, m.weight)),
}


@compiled
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("known", [False, True])
def test_what_a_user_has_changed_of_a_module_is_done(change, known):
    model, ids = tiny_model("llama"), tokens(1, 12)[0]
    plain = logits(model, None, ids)[0] if known else None
    CHANGES[change](model.model.layers[1].mlp.up_proj)
    made, path = logits(model, None, ids)
    assert path == "model" and torch.equal(made, logits(model, False, ids)[0])
    if plain is not None:
        assert not torch.allclose(made, plain)


@compiled
def test_without_our_kernels_nothing_is_built():
    model = tiny_model("llama")
    with native.force("torch"):
        assert Step.build(model, []) is None
        assert logits(model, None, tokens(1, 12)[0])[1] == "model"


@compiled
def test_a_change_that_by_chance_moves_nothing_is_tried_again(monkeypatch):
    model, ids = tiny_model("llama", dtype=torch.bfloat16), tokens(1, 12)[0]
    tried = []

    def changed(model, seed):
        tried.append(seed)
        return _rounded_once_more(model, seed) if seed > 1 else contextlib.nullcontext()

    monkeypatch.setattr(decoder, "_rounded_once_more", changed)
    assert logits(model, None, ids)[1] == "blocks" and max(tried) == 2
    monkeypatch.setattr(decoder.Step, "__call__", lambda *args: torch.randn(1, 1, model.config.vocab_size))
    assert logits(copy.deepcopy(model), None, ids)[1] == "model" and max(tried) == decoder._CHANGES - 1


def test_the_noise_hooks_leave_no_trace():
    model, ids = tiny_model("llama"), tokens(1, 6)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        with _rounded_once_more(model, 0):
            during = model(input_ids=ids).logits
        assert not torch.equal(before, during) and torch.equal(before, model(input_ids=ids).logits)


def test_packed_says_what_dense_with_zeros_says(products):
    """20 prompts × 64 tokens; how a tie is judged stands in tests/decoding/greedy.py."""
    model = prune(tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2))
    found = compare(model, packed(model), list(tokens(20, 8)), 64)
    assert found.positions == 1280 and not found.faults, found
    assert found.ties <= 0.02 * found.positions, found


def test_the_comparison_finds_a_wrong_weight():
    model = prune(tiny_model("llama", dtype=torch.bfloat16, num_hidden_layers=2))
    wrong = copy.deepcopy(model)
    wrong.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
    assert compare(model, packed(wrong), list(tokens(3, 8)), 16).faults


@pytest.mark.slow
def test_packed_says_what_dense_with_zeros_says_on_a_real_model():
    if packaged_gguf() is None:
        pytest.skip("the packaged model is not installed")
    folder = resolve("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    for module in find_stack(model)[1].modules():
        if isinstance(module, nn.Linear):
            W = module.weight.data
            W[W.abs() <= W.abs().float().flatten().kthvalue(W.numel() // 2).values] = 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    subjects = ["owls", "rivers", "glass", "Rome", "numbers", "bread", "winter", "ships", "violins", "maps"]
    prompts = [
        torch.tensor(tokenizer(text)["input_ids"])
        for subject in subjects
        for text in (f"The history of {subject} began", f"Question: what are {subject} good for? Answer:")
    ]
    found = compare(model, packed(model), prompts, 64)
    assert found.positions == 1280 and not found.faults, found
    assert greedy(model, prompts[0], 4)[0]


def test_our_kernels_are_only_there_inside():
    model = tiny_model("llama")
    before = [type(m) for m in model.modules()]
    with kernels(model):
        assert any(isinstance(m, DenseLinear) for m in model.modules())
    assert [type(m) for m in model.modules()] == before


@pytest.mark.parametrize("quick", [None, False])
def test_memory_grows_with_the_text(quick):
    model, ids = tiny_model("llama"), tokens(1, 40)[0]
    with torch.inference_mode(), kernels(model):
        made = []
        for reserve in (None, 9, 5):
            decoder = Decoder(model, 40, quick, reserve)
            decoder.prefill(ids[:6])
            assert (decoder.memory[0][0].shape[1] < 40) == (reserve is not None)
            made.append(torch.stack([decoder.step(int(token)).clone() for token in ids[6:]]))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_a_full_decoder_says_so():
    model = tiny_model("llama")
    with torch.inference_mode():
        decoder = Decoder(model, 6)
        decoder.prefill(tokens(1, 5)[0])
        decoder.step(4)
        with pytest.raises(UserError, match="room for"):
            decoder.step(4)


@compiled
def test_a_router_that_is_not_a_number_picks_each_expert_once():
    """Picked more than once, an expert had more tokens than places, and what lay behind them in memory was lost."""
    model = tiny_model(
        "qwen3_moe", num_experts=16, num_experts_per_tok=8, moe_intermediate_size=2048, mlp_only_layers=[]
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = float("nan")
    with kernels(model), torch.inference_mode():
        made = Decoder(model, 64)
        made.prefill(tokens(1, 8)[0])
        made.step(5)
        assert made.path == "blocks"
        assert bool(made.step(77).isnan().all())
        buffers = next(held for held in made._quick._alive if isinstance(held, dict))
        assert len(set(buffers["picks"][0].tolist())) == 8
