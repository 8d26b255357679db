from __future__ import annotations

import pytest
import torch

from tawny.calibration import statistics
from tawny.calibration.observe import observe
from tawny.calibration.statistics import Accumulator
from tawny.model.blocks import live_stack
from tawny.model.streams import Samples, Stream
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


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_are_those_of_inputs_recorded_in_the_models_own_forward(family):
    model = tiny_model(family)
    stack = live_stack(model)
    ids = tokens()
    index = 1
    recorded: dict[str, list[torch.Tensor]] = {}
    linears = [linear for linear in stack.linears(index) if linear.expert is None]
    handles = [
        linear.module.register_forward_pre_hook(
            lambda m, args, name=linear.name: recorded.setdefault(name, []).append(args[0].detach())
        )
        for linear in linears
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    stream = Stream(stack, Samples(ids), chunk_tokens=ids.shape[1])
    stream.advance(0)
    seen = observe(stream, index, stack.linears(index), "hessian")
    for linear in linears:
        x = torch.cat([part.reshape(-1, part.shape[-1]) for part in recorded[linear.name]])
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


def test_observing_while_advancing_gives_the_plain_output():
    stack = live_stack(tiny_model("qwen2"))
    plain, watched = (Stream(stack, Samples(tokens())) for _ in range(2))
    plain.advance(0)
    observe(watched, 0, stack.linears(0), "norms", advance=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.hidden, watched.hidden, strict=True))


@pytest.mark.parametrize("width", [7, 1024, 1500])
def test_a_hessian_from_chunks_and_panels_is_the_plain_product(width):
    x = torch.randn(300, width)
    accumulator = Accumulator(width, "hessian")
    for part in x.split(77):
        accumulator.add(part)
    made = accumulator.finish()
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
        accumulator = Accumulator(1100, "hessian")
        for part in x.split(70):
            accumulator.add(part)
        made.append(accumulator.finish().hessian)
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-3)
    assert statistics.hessian_bytes(1100) == 4 * 1100**2
