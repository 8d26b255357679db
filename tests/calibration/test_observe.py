from __future__ import annotations

import re
import types

import pytest
import torch

from tawny.calibration import statistics
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Accumulator
from tawny.errors import ModelError, NumericalError
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tests.end_to_end.test_prune import TRANSPOSED
from tests.tiny import FAMILIES, tiny_model, tokens

EXPECTED_STAGES = {
    "llama": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    # Attention and MLP of this architecture read the same normed tensor.
    "phi": [{"q_proj", "k_proj", "v_proj", "fc1"}, {"dense"}, {"fc2"}],
    "gpt2": [{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}],
    "opt": [{"q_proj", "k_proj", "v_proj"}, {"out_proj"}, {"fc1"}, {"fc2"}],
}


@pytest.mark.parametrize("family", EXPECTED_STAGES)
def test_stages_are_the_linears_that_share_an_input(family):
    stack = live_stack(tiny_model(family))
    seen = observe(Stream(stack, Samples(tokens())), 0, stack.linears(0), "none")
    stages = [{linear.name.rsplit(".", 1)[1] for linear in stage.linears} for stage in seen.stages]
    assert stages == EXPECTED_STAGES[family]


@pytest.mark.parametrize("advance", [False, True])
@pytest.mark.parametrize("name", ["self_attn.q_proj", "input_layernorm"])
def test_a_weight_that_is_not_finite_is_named_before_what_comes_of_it(name, advance):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule(f"model.layers.0.{name}").weight.view(-1)[5] = torch.nan
    stack = live_stack(model)
    words = rf"^model\.layers\.0\.{re.escape(name)}\.weight .* holds NaN .* in float32; check its weights$"
    with pytest.raises(NumericalError, match=words):
        observe(Stream(stack, Samples(tokens())), 0, stack.linears(0), "norms", advance=advance)


def test_an_embedding_that_is_not_finite_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[tokens()[0, 0]] = torch.inf
    words = r"^model\.embed_tokens\.weight .* holds NaN or infinite weights in float32; check its weights$"
    with pytest.raises(NumericalError, match=words):
        Stream(live_stack(model), Samples(tokens()))


@pytest.mark.parametrize(
    ("dtype", "received", "given"),
    [
        (torch.float32, "float32; check the checkpoint", "float32; check its weights"),
        (torch.float16, "float16; try compute=float32", "float16; convert the live model first"),
    ],
)
def test_activations_that_are_not_finite_are_told_with_what_can_be_done(dtype, received, given):
    stack = live_stack(tiny_model("llama", dtype=dtype))
    stream = Stream(stack, Samples(tokens()))
    stream.hidden[0].fill_(torch.nan)
    with pytest.raises(NumericalError, match=f"q_proj receives NaN or infinite activations in {received}"):
        observe(stream, 0, stack.linears(0), "norms")
    with pytest.raises(NumericalError, match=f"layers.0 gives NaN or infinite activations in {given}"):
        stream.advance(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_are_those_of_inputs_recorded_in_the_models_own_forward(family):
    model = tiny_model(family)
    stack = live_stack(model)
    ids = tokens()
    index = 1
    recorded = {linear: [] for linear in stack.linears(index) if linear.expert is None}
    handles = [
        linear.module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].detach()))
        for linear, seen in recorded.items()
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = Stream(stack, Samples(ids), chunk_tokens=ids.shape[1])
    stream.advance(0)
    seen = observe(stream, index, stack.linears(index), "hessian")
    for linear, parts in recorded.items():
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        made = seen.statistics[linear.name]
        assert made.tokens == ids.numel() == x.shape[0]
        torch.testing.assert_close(made.hessian, x.T @ x, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(made.squared_norms, x.double().square().sum(0), rtol=1e-3, atol=1e-3)


def test_every_expert_counts_the_tokens_routed_to_it():
    stack = live_stack(tiny_model("mixtral"))
    ids = tokens()
    seen = observe(Stream(stack, Samples(ids), chunk_tokens=ids.shape[1]), 0, stack.linears(0), "norms")
    for kind in ("gate_up_proj", "down_proj"):
        counts = [s.tokens for name, s in seen.statistics.items() if f".{kind}." in name]
        assert len(counts) == 4 and sum(counts) == 2 * ids.numel()  # two experts a token


def mixture(model, index):
    layer = model.model.layers[index]
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def routed(family, experts, chunks):
    """What each expert multiplies by gate_up_proj, and by down_proj, in float64: of the tokens it is among the best for.

    A chunk is what the router is given, what it gives, and which of its tokens are no padding.
    """
    best = TRANSPOSED[family].get("num_experts_per_tok") or TRANSPOSED[family]["moe_topk"]
    for expert in range(4):
        rows = []
        for hidden, given, valid in chunks:
            logits = given[1 if family == "llama4_text" else 0].double()
            chosen = (logits.topk(best, dim=-1).indices == expert).any(-1) & valid
            scale = logits[chosen, expert, None].sigmoid() if family == "llama4_text" else 1.0
            rows.append(hidden[chosen].double() * scale)
        x = torch.cat(rows)
        made = x @ experts.gate_up_proj[expert].detach().double()
        if family == "gpt_oss":
            made = made + experts.gate_up_proj_bias[expert].detach().double()
            gate = made[:, ::2].clamp(max=experts.limit)
            up = made[:, 1::2].clamp(-experts.limit, experts.limit) + 1
            yield expert, x, up * gate * (experts.alpha * gate).sigmoid()
        else:
            gate, up = made.chunk(2, dim=-1)
            yield expert, x, up * gate * gate.sigmoid()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("needs", ["norms", "hessian"])
@pytest.mark.parametrize("family", TRANSPOSED)
def test_an_expert_stored_the_other_way_is_measured_by_the_tokens_routed_to_it(family, needs, padded):
    model, ids, index = tiny_model(family, **TRANSPOSED[family]), tokens(), 1
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[:, :5] = 0
        mask[2, :11] = 0
    stack = live_stack(model)
    stream = Stream(stack, Samples(ids, mask), chunk_tokens=2 * ids.shape[1])
    stream.advance(0)
    chunks = []

    def record(module, args, given):
        valid = stream.valid(len(chunks))
        every = torch.ones(len(args[0]), dtype=torch.bool)
        chunks.append((args[0].detach(), given, every if valid is None else valid.reshape(-1)))

    handle = mixture(model, index).router.register_forward_hook(record)
    seen = observe(stream, index, stack.linears(index), needs)
    handle.remove()
    assert len(chunks) == 2
    names = {name.split("experts.")[1]: name for name in seen.statistics if ".experts." in name}
    assert len(names) == 8
    for expert, *inputs in routed(family, mixture(model, index).experts, chunks):
        for kind, x in zip(("gate_up_proj", "down_proj"), inputs, strict=True):
            made = seen.statistics[names[f"{kind}.{expert}"]]
            assert made.tokens == len(x) > 0
            wanted = x.T @ x
            # A product of n pairs in float32 rounds n times, by 2⁻²⁴ of the lengths of both: an input of down_proj is
            # made of 32, and a sum of squares of as many as there are tokens; an activation may be steep, so four times that.
            # One token more is hundreds of times as much.
            lengths = wanted.diagonal().sqrt()
            rounding = 4 * (32 + len(x)) * 2.0**-24
            assert ((made.squared_norms.double() - lengths**2).abs() <= rounding * lengths**2).all()
            if needs == "hessian":
                assert ((made.hessian.double() - wanted).abs() <= rounding * lengths[:, None] * lengths).all()


PRODUCTS = {
    "@ P[e]": lambda x, P, e: x @ P[e],
    "torch.matmul": lambda x, P, e: torch.matmul(x, P[e]),
    "Tensor.matmul": lambda x, P, e: x.matmul(P[int(e)]),
    "torch.mm": lambda x, P, e: torch.mm(x, P[e]),
    "Tensor.mm": lambda x, P, e: x.mm(P.unbind()[e]),
    "F.linear of P[e].T": lambda x, P, e: torch.nn.functional.linear(x, P[e].T),
    "F.linear of a transposed P": lambda x, P, e: torch.nn.functional.linear(x, P.transpose(1, 2)[e]),
}
WHOLE = {
    "torch.bmm": torch.bmm,
    "Tensor.bmm": lambda x, P: x.bmm(P),
    "torch.matmul": torch.matmul,
    "@ P": lambda x, P: x @ P,
}


def observed(one=None, every=None, **changes):
    """Statistics of a block whose experts multiply by `one`, expert by expert, or by `every`, all at once."""
    model = tiny_model("aria_text", **TRANSPOSED["aria_text"] | changes)
    experts = model.model.layers[0].mlp.experts

    def looped(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for e in index.unique():
            rows, place = torch.where(index == e)
            gate, up = one(hidden[rows], self.gate_up_proj, e).chunk(2, dim=-1)
            made = one(self.act_fn(gate) * up, self.down_proj, e)
            out.index_add_(0, rows, made * weights[rows, place, None])
        return out

    def at_once(self, hidden, index, weights):
        routed = torch.zeros(len(hidden), 4).scatter_(1, index, 1.0).T[..., None]
        gate, up = every(hidden * routed, self.gate_up_proj).chunk(2, dim=-1)
        made = every(self.act_fn(gate) * up, self.down_proj)
        scores = torch.zeros(len(hidden), 4).scatter_(1, index, weights).T[..., None]
        return (made * scores).sum(0)

    if one is not None or every is not None:
        experts.forward = types.MethodType(looped if every is None else at_once, experts)
    stack, mask = live_stack(model), torch.ones(4, 24, dtype=torch.bool)
    mask[:, :5] = False
    linears = [linear for linear in stack.linears(0) if linear.expert is not None]
    return observe(Stream(stack, Samples(tokens(), mask)), 0, linears, "norms").statistics


@pytest.mark.parametrize("product", [*PRODUCTS, *(f"{name} of all" for name in WHOLE)])
def test_experts_are_seen_whatever_product_they_take_part_in(product):
    name = product.removesuffix(" of all")
    made = observed(every=WHOLE[name]) if product.endswith(" of all") else observed(one=PRODUCTS[name])
    wanted = observed()
    assert made.keys() == wanted.keys()
    for name, own in wanted.items():
        assert made[name].tokens == own.tokens
        torch.testing.assert_close(made[name].squared_norms, own.squared_norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "product",
    [
        lambda x, P, e: torch.nn.functional.linear(x, P[e]),  # fits a square one, but multiplies its outputs
        lambda x, P, e: x @ P[e].T,
        lambda x, P, e: x @ P[e].clone(),
    ],
)
def test_a_product_with_something_else_is_not_taken_for_one_with_an_expert(product):
    def one(x, P, e):
        return product(x, P, e) if P.shape[1] == P.shape[2] else x @ P[e]

    with pytest.raises(ModelError, match=r"down_proj\.0 \[32, 32\] takes no part"):
        observed(one, intermediate_size=32)


def test_an_expert_of_many_that_multiply_at_once_has_seen_no_token_when_none_was_routed_to_it():
    model = tiny_model("llama4_text", **TRANSPOSED["llama4_text"])
    model.model.layers[0].feed_forward.router.weight.data.zero_()  # equal logits: the best is always the same
    stack = live_stack(model)
    seen = observe(Stream(stack, Samples(tokens())), 0, stack.linears(0), "hessian")
    counts = {name: s.tokens for name, s in seen.statistics.items() if ".experts." in name}
    assert sorted(counts.values()) == [0] * 6 + [tokens().numel()] * 2


def test_observing_while_advancing_gives_the_plain_output():
    stack = live_stack(tiny_model("qwen2"))
    plain, watched = (Stream(stack, Samples(tokens())) for _ in range(2))
    plain.advance(0)
    observe(watched, 0, stack.linears(0), "norms", advance=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.hidden, watched.hidden, strict=True))


def hessian(x):
    """Statistics of tokens that come in chunks."""
    accumulator = Accumulator(x.shape[1], "hessian")
    for part in x.split(77):
        accumulator.add(part)
    return accumulator.finish()


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_a_hessian_from_chunks_and_panels_is_the_plain_product(width):
    x = torch.randn(300, width)
    made = hessian(x)
    torch.testing.assert_close(made.hessian, x.T @ x, rtol=1e-3, atol=1e-3)
    assert torch.equal(made.hessian, made.hessian.T) and made.tokens == 300
    torch.testing.assert_close(made.squared_norms, x.double().square().sum(0), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("needs", ["norms", "hessian"])
@pytest.mark.parametrize("width", [9, 1100])
def test_the_order_of_chunks_does_not_show(needs, width):
    dice = torch.Generator().manual_seed(0)
    chunks = [torch.randn(40, width, generator=dice) * 10**k for k in (-2, 0, 1, 0, -1)]
    one, parts = Accumulator(width, needs), [Accumulator(width, needs) for _ in range(2)]
    for number, chunk in enumerate(chunks):
        one.add(chunk)
        parts[number % 2].add(chunk)
    made = one.finish()
    first, second = (part.finish(exact=True) for part in parts)
    if needs == "hessian":
        first.hessian += second.hessian
        first.round()
        assert torch.equal(first.hessian, made.hessian) and made.hessian.dtype == torch.float32
    else:
        first.squared_norms += second.squared_norms
    assert torch.equal(first.squared_norms, made.squared_norms)


def test_a_hessian_too_wide_for_float64_is_the_same_in_float32(monkeypatch):
    x = torch.randn(300, 1100, generator=torch.Generator().manual_seed(0))
    made = []
    for width in (8192, 0):
        monkeypatch.setattr(statistics, "EXACT_WIDTH", width)
        made.append(hessian(x).hessian)
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-3)
    assert statistics.hessian_bytes(1100) == 4 * 1100**2
