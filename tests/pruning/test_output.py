"""The factors of the output: against the exact Fisher information of a tiny model, of experts, of encoders, and in a file."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tawny.calibration.output import (
    OutputAccumulator,
    OutputFactor,
    _drawn,
    gradient_of_drawn_tokens,
    gradient_of_features,
    watch_gradients,
)
from tawny.model.stack import live_stack
from tawny.model.streams import Samples, Stream
from tawny.model.tensorfile import write_tensors
from tawny.progress import silent
from tawny.pruning.factors import OutputFactors, factor_of, file_of, parts_of
from tawny.run.run import Run
from tawny.run.walk import Visitor, walk_back
from tests.encoders import inputs_for, tiny_encoder
from tests.tiny import tiny_model, tokens


class Watch(Visitor):
    def __init__(self, stack, factor="whole"):
        self.stack, self.factor, self.factors = stack, factor, {}

    def around(self, block):
        linears = self.stack.linears(block.index)
        self.accumulators = {x.name: OutputAccumulator(x.shape[0], self.factor) for x in linears}
        add = {name: each.add for name, each in self.accumulators.items()}
        self.seen = watch_gradients(linears, add, block.streams["output"])
        return self

    def __enter__(self):
        self.seen.__enter__()

    def __exit__(self, *error):
        return self.seen.__exit__(*error)

    def visit(self, block):
        self.factors |= {name: each.finish() for name, each in self.accumulators.items()}


def factors_of(model, samples, seed=0, end=None, factor="whole"):
    stack = live_stack(model.eval())
    watch = Watch(stack, factor)

    def drawn(stream, chunk):
        part = stream.slices[chunk]
        seeds = [1000 * seed + sample for sample in range(part.start, part.stop)]
        if end is not None:
            return end(stack, stream, chunk, seeds)
        return gradient_of_drawn_tokens(stack, stream, chunk, seeds, rows=3)

    walk_back(Run.unkept(silent), stack, samples, [watch], end=drawn, name="output", phase="asking")
    return watch.factors


def exact_factors(model, ids):
    """G of every linear: over all positions, and all tokens that the model may predict there, by their chance."""
    outputs = {}
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_hook(lambda m, _, out: outputs.__setitem__(m, out)) for m in linears]
    with torch.enable_grad():
        said = model(input_ids=ids).logits[0].log_softmax(-1)
    for hook in hooks:
        hook.remove()
    sums = [torch.zeros(m.out_features, m.out_features, dtype=torch.float64) for m in linears]
    for position in range(said.shape[0]):
        for token in range(said.shape[1]):
            felt = torch.autograd.grad(
                said[position, token], [outputs[m] for m in linears], retain_graph=True
            )
            chance = float(said[position, token].detach().exp())
            for total, g in zip(sums, felt, strict=True):
                total += chance * g[0].double().T @ g[0].double()
    names = {module: name for name, module in model.named_modules()}
    return {names[m]: total / ids.shape[1] for m, total in zip(linears, sums, strict=True)}


def test_draws_average_to_the_exact_fisher_information():
    model = tiny_model("llama", vocab_size=24, num_hidden_layers=2).eval()
    ids = tokens(1, 5) % 24
    exact = exact_factors(model, ids)
    rounds = [factors_of(model, Samples(ids), seed) for seed in range(150)]
    assert set(rounds[0]) == set(exact)
    for name, G_OO in exact.items():
        mean_OO = torch.stack([each[name].blocks[0] for each in rounds]).mean(0).double()
        diagonal = torch.stack([each[name].diagonal for each in rounds]).mean(0).double()
        torch.testing.assert_close(diagonal, mean_OO.diagonal(), rtol=1e-4, atol=1e-12)
        assert float((mean_OO - G_OO).norm() / G_OO.norm()) < 0.35
        assert float(mean_OO.trace() / G_OO.trace()) == pytest.approx(1, abs=0.2)


def test_padding_feels_nothing_and_is_not_counted():
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[1, 7:] = 0
    padded = factors_of(tiny_model("llama"), Samples(ids, mask))
    for name, factor in padded.items():
        # A first token attends to itself alone: the gradient of its query is nothing, or rounding.
        least = 17 if name.endswith("q_proj") else 19
        assert least <= factor.tokens <= 19 and factor.mean > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_experts_count_the_tokens_that_were_routed_to_them(family):
    samples = Samples(tokens(3, 16))
    factors = factors_of(tiny_model(family), samples)
    experts = [factor for name, factor in factors.items() if ".experts." in name]
    downs = [factor.tokens for name, factor in factors.items() if ".experts." in name and "down" in name]
    assert experts and all((factor.tokens > 0) == (factor.mean > 0) for factor in experts)
    blocks = len({name.split(".experts.")[0] for name in factors if ".experts." in name})
    assert sum(downs) == 3 * 16 * 2 * blocks  # two experts a token


@pytest.mark.parametrize("name", ["bert", "vit", "swin", "whisper"])
def test_encoders_are_asked_by_their_features(name):
    model = tiny_encoder(name)
    stack = live_stack(model.eval())
    inputs = inputs_for(model, 3)
    samples = Samples(inputs, seqlen=stack.positions(inputs))
    factors = factors_of(model, samples, end=gradient_of_features, factor="rows")
    assert factors and all(each.mean > 0 and not each.blocks for each in factors.values())


def test_the_draws_of_a_sample_depend_on_its_seed_alone():
    stack = live_stack(tiny_model("llama").eval())
    stream = Stream(stack, Samples(tokens(2, 12)))
    both = gradient_of_drawn_tokens(stack, stream, 0, [7, 8], rows=5)
    swapped = gradient_of_drawn_tokens(stack, stream, 0, [8, 7], rows=12)
    other = gradient_of_drawn_tokens(stack, stream, 0, [7, 7], rows=12)
    torch.testing.assert_close(other[0], both[0], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(swapped[0], both[0])


@given(size=st.integers(1, 90), seed=st.integers(0, 999))
def test_a_draw_is_where_the_summed_chances_pass_a_number(size, seed):
    random = torch.Generator().manual_seed(seed)
    chances = torch.rand(4, size, generator=random) * (torch.rand(4, size, generator=random) < 0.5)
    chances[:, seed % size] += 0.1
    chances /= chances.sum(-1, keepdim=True)
    even = torch.rand(4, generator=random, dtype=torch.float64)
    below = chances.double().cumsum(-1)
    slow = torch.searchsorted(below, (even * below[:, -1])[:, None], right=True)[:, 0].clamp(max=size - 1)
    drawn = _drawn(chances, even)
    assert bool((chances.gather(1, drawn[:, None]) > 0).all())
    assert torch.equal(drawn, slow)


@pytest.mark.parametrize("factor", ["rows", "whole"])
def test_factors_come_back_from_theirfile_of(factor, tmp_path):
    accumulator = OutputAccumulator(5000 if factor == "whole" else 7, factor)
    accumulator.add(torch.randn(3, 5000 if factor == "whole" else 7))
    written = accumulator.finish()
    parts = {f"a.b/{key}": value for key, value in parts_of(written).items()}
    write_tensors(file_of(tmp_path, 4), parts)
    read = OutputFactors(tmp_path).of(4, torch.device("cpu"), "whole")["a.b"]
    assert read.tokens == 3 and torch.equal(read.diagonal, written.diagonal)
    assert len(read.blocks) == len(written.blocks) == (3 if factor == "whole" else 0)
    assert all(torch.equal(a, b) for a, b in zip(read.blocks, written.blocks, strict=True))
    assert (
        OutputFactors().of(0, torch.device("cpu"), "rows") == {} and factor_of(parts_of(written)).tokens == 3
    )


def test_norms_of_inputs_do_where_nobody_has_their_hessian():
    factor = OutputFactor(9, torch.rand(5))
    D, norms = torch.randn(5, 7), torch.rand(7)
    assert factor.felt(D, norms, 3) == pytest.approx(factor.felt(D, torch.diag(norms), 3), rel=1e-5)
