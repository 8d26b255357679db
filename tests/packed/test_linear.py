from __future__ import annotations

import pickle
from copy import deepcopy as copy_module

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from tawny.errors import UserError
from tawny.kernels import native
from tawny.kinds import KINDS as TABLE
from tawny.packed.format import pack, unpack
from tawny.packed.linear import DenseLinear, PackedLinear, pack_linear
from tests.packed.cases import KINDS, weight


def linear(out: int = 24, columns: int = 96, bias: bool = True) -> nn.Linear:
    module = nn.Linear(columns, out, bias=bias)
    with torch.no_grad():
        module.weight.copy_(weight((out, columns), 0.6))
    return module


@pytest.mark.parametrize("values,group", KINDS)
def test_a_packed_linear_computes_what_its_dense_twin_computes(products, values, group):
    module = linear()
    packed = PackedLinear.from_linear(module, values, group)
    twin = nn.functional.linear
    for tokens in (1, 4, 9, 50):
        x = torch.randn(2, tokens, 96)
        expected = twin(x, packed.dense(torch.float32), packed.bias)
        assert torch.allclose(packed(x), expected, atol=2e-3 if TABLE[values].scaled else 1e-5)


def test_dense_gives_back_the_bits():
    module = linear()
    assert torch.equal(pack_linear(module, "f32").dense(), module.weight.data)


def test_a_transposed_conv1d_is_packed_as_out_by_in():
    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight((96, 24), 0.5))
            self.bias = nn.Parameter(torch.randn(24))

    module = Conv1D()
    packed = PackedLinear.from_linear(module, "f32")
    x = torch.randn(3, 96)
    assert packed.shape == (24, 96)
    assert torch.allclose(packed(x), x @ module.weight + module.bias, atol=1e-5)


def test_what_is_no_linear_is_refused():
    with pytest.raises(UserError, match="LayerNorm"):
        pack_linear(nn.LayerNorm(4))


@pytest.mark.parametrize("values,group", KINDS)
def test_an_empty_one_on_meta_is_filled_by_a_state_dict(values, group):
    module = linear()
    packed = PackedLinear.from_linear(module, values, group)
    empty = PackedLinear.empty(packed.packed.form, bias=True, device="meta")
    assert all(t.is_meta for t in empty.state_dict().values())
    empty.load_state_dict(packed.state_dict(), assign=True)
    x = torch.randn(1, 96)
    assert torch.equal(empty(x), packed(x))


def test_what_was_looked_up_for_speed_follows_the_buffers():
    first, second = PackedLinear.from_linear(linear(), "f32"), PackedLinear.from_linear(linear(), "int8")
    x = torch.randn(1, 96)
    before = first(x)
    copy = copy_module(first)
    other = pack(weight((24, 96), 0.3, 9), "f32")
    for name, tensor in other.tensors.items():
        setattr(first, name, tensor)
    expected = torch.nn.functional.linear(x, unpack(other), first.bias)
    assert torch.allclose(first(x), expected, atol=1e-5)
    assert torch.equal(copy(x), before)
    again = pickle.loads(pickle.dumps(first))
    assert torch.equal(again(x), first(x))
    first.values.data = first.values.clone() * 2
    assert torch.allclose(first(x) - first.bias, 2 * (expected - first.bias), atol=1e-5)
    with native.force("torch"):
        assert torch.allclose(second(x), reference_of(second, x), atol=1e-5)
    assert torch.allclose(second(x), reference_of(second, x), atol=2e-3)
    second.scales.data = second.scales.clone() * 2
    assert torch.allclose(second(x), reference_of(second, x), atol=4e-3)


def reference_of(module: PackedLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, module.dense(torch.float32), module.bias)


def test_casting_a_model_changes_the_bias_and_never_the_packed_tensors():
    packed = PackedLinear.from_linear(linear(), "int8", 128)
    before = {name: t.clone() for name, t in packed.packed.tensors.items()}
    packed.to(torch.float16).bfloat16().double().half()
    assert packed.bias is not None and packed.bias.dtype is torch.float16 is packed.weight.dtype
    for name, tensor in packed.packed.tensors.items():
        assert tensor.dtype is before[name].dtype and torch.equal(tensor, before[name])
    packed.to("meta")
    assert packed.masks.is_meta and packed.bias.is_meta


def test_gradients_reach_the_activations_and_match_the_dense_layer():
    module = linear()
    packed = PackedLinear.from_linear(module, "f32")
    for tokens in (1, 40):
        x = torch.randn(tokens, 96, requires_grad=True)
        y = torch.randn(tokens, 24)
        (got,) = torch.autograd.grad((packed(x) * y).sum(), x)
        (expected,) = torch.autograd.grad((module(x) * y).sum(), x)
        assert torch.allclose(got, expected, atol=1e-5)


def both() -> list[tuple[PackedLinear | DenseLinear, nn.Linear]]:
    """A packed linear and one that stays dense, with what they are to compute."""
    module = linear()
    return [(PackedLinear.from_linear(module, "f32"), module), (DenseLinear.from_linear(module), module)]


def test_trained_parameters_get_gradients_from_activations_without():
    for ours, theirs in both():
        names = ["bias"] if isinstance(ours, PackedLinear) else ["weight", "bias"]
        x, y = torch.randn(1, 96), torch.randn(1, 24)
        for name in names:
            ours.requires_grad_(False)
            getattr(ours, name).requires_grad_(True)
            (got,) = torch.autograd.grad((ours(x) * y).sum(), getattr(ours, name))
            (expected,) = torch.autograd.grad((theirs(x) * y).sum(), getattr(theirs, name))
            assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_one_computes_the_same():
    for ours, theirs in both():
        traced = torch.jit.trace(ours, (torch.randn(2, 96),))
        x = torch.randn(2, 96)
        assert torch.allclose(traced(x), theirs(x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_function_transforms_and_forward_mode_see_through():
    x, t = torch.randn(3, 96), torch.randn(3, 96)
    for ours, theirs in both():
        transforms = (
            lambda f: torch.vmap(f)(x),
            lambda f: torch.func.jvp(f, (x,), (t,))[1],
            lambda f: torch.vmap(torch.func.grad(lambda one: f(one).square().sum()))(x),
        )
        for transform in transforms:
            assert torch.allclose(transform(ours), transform(theirs), atol=1e-4)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, t))).tangent
        assert tangent is not None and torch.allclose(tangent, t @ theirs.weight.T, atol=1e-5)


def test_a_model_with_packed_linears_compiles_and_exports():
    model = nn.Sequential(
        PackedLinear.from_linear(linear()), nn.ReLU(), DenseLinear.from_linear(linear(24, 24))
    )
    x = torch.randn(3, 96)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)
        exported = torch.export.export(model, (x,))
        assert any("tawny.packed_linear" in str(node.target) for node in exported.graph.nodes)
        assert torch.equal(exported.module()(x), expected)


def test_the_operators_pass_torch_own_checks():
    packed = pack(weight((24, 96), 0.5), "int8").tensors
    tensors = (packed.get(k) for k in ("masks", "values", "offsets", "scales", "exponents", "sums"))
    weight_ = (*tensors, 24, 96, "int8", 0)
    x, bias, ids = torch.randn(2, 96, requires_grad=True), torch.randn(24), torch.tensor([[3, 9, 3]])
    torch.library.opcheck(torch.ops.tawny.packed_linear, (x, bias, *weight_))
    torch.library.opcheck(torch.ops.tawny.expand, (torch.float32, *weight_))
    torch.library.opcheck(torch.ops.tawny.gather_rows, (ids, torch.float32, *weight_))
    dense = (torch.randn(2, 96, requires_grad=True), torch.randn(24, 96, requires_grad=True), None)
    torch.library.opcheck(torch.ops.tawny.dense_linear, dense)


def test_activations_of_the_wrong_width_are_refused():
    with pytest.raises(UserError, match="width 95"):
        PackedLinear.from_linear(linear())(torch.randn(1, 95))


def test_a_dense_linear_shares_its_weight_and_computes_the_same():
    module = linear().to(torch.bfloat16)
    dense = DenseLinear.from_linear(module)
    assert dense.weight.data_ptr() == module.weight.data_ptr()
    for tokens in (1, 3, 40):
        x = torch.randn(tokens, 96).bfloat16()
        assert torch.allclose(dense(x).float(), module(x).float(), atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_may_be_strided_and_must_fit(dtype):
    W = weight((24, 96), 0.6).to(dtype)
    strided = torch.randn(24, 2).to(dtype)[:, 1]
    assert not strided.is_contiguous()
    for make in (lambda bias: PackedLinear(pack(W, "f32"), bias), lambda bias: DenseLinear(W, bias)):
        for tokens in (1, 4, 40):
            x = torch.randn(tokens, 96).to(dtype)
            for bias in (strided, strided[:1].expand(24)):
                assert torch.equal(make(bias)(x), make(bias.contiguous())(x))
        with pytest.raises(UserError, match=r"bias of shape \(23,\) does not fit a weight of 24 rows"):
            make(strided[:23])
        module = make(strided)
        module.bias.data = strided[:23]
        with pytest.raises(UserError, match="does not fit"):
            module(x[:1])


def test_a_packed_linear_says_what_it_is():
    assert "values=int8, group=128" in repr(PackedLinear.from_linear(linear(), "int8", 128))
    assert torch.equal(unpack(pack(torch.eye(3), "f32")), torch.eye(3))
