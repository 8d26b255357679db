"""Every kernel this CPU can run against plain torch in float64, over shapes, sparsities, kinds, dtypes and tokens."""

from __future__ import annotations

import _ctypes
import itertools
import os
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.cpu import PRODUCTS
from tawny.errors import UserError
from tawny.kernels import native, ops, reference
from tawny.kinds import KINDS as TABLE
from tawny.packed import format
from tawny.packed.format import pack, unpack
from tests.packed.cases import KINDS, SHAPES, SPARSITIES, python, uneven, weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = native.available()
# one rounding of the result; int8 values may use 16-bit integer activations
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# of the weight, where it is written out in this type
EXPANDED = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-10}


# torch's own products promise no order of sums.
OURS = pytest.mark.parametrize("kernel", KERNELS[:-1], indirect=True)


@cache
def stored(shape, sparsity, values, group, whole=False):
    """Packed once for all kernels: that takes ten times as long as their products. `sparsity` None: `uneven`."""
    W = uneven(shape) if sparsity is None else weight(shape, sparsity)
    return pack(W, values, group, whole=whole)


def activations(tokens: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def agree(packed, x, bias=None):
    """|y − exact| stays within rounding of the result and of the sum of magnitudes (and 16-bit activations)."""
    y = ops.packed_linear(x, packed.weight, bias)
    assert y.dtype is x.dtype and y.shape == (*x.shape[:-1], packed.shape[0])
    W = reference.expand(packed.weight).double()
    exact = x.double() @ W.T
    magnitude = x.double().abs() @ W.abs().T
    if bias is not None:
        exact = exact + bias.double()
        magnitude = magnitude + bias.double().abs()
    allowed = ROUNDING[x.dtype] * exact.abs() + 2e-6 * magnitude + 1e-30
    if TABLE[packed.values].scaled:
        largest = x.double().abs().amax(-1, keepdim=True)
        allowed = allowed + largest / 32767 * 0.51 * W.abs().sum(1)
    if (
        native.kernel_name() == "torch" or packed.group
    ):  # tiles of int8 with group scales are written out, too
        allowed = allowed + EXPANDED[x.dtype] * magnitude
    elif x.numel() > ops._most_direct(packed.weight) * packed.shape[1]:
        allowed = allowed + EXPANDED[ops._computed_in(x.dtype)] * magnitude
    if x.dtype is torch.float16:
        allowed = allowed + 1e-7  # subnormal results
    worst = ((y.double() - exact).abs() / allowed).max().item() if y.numel() else 0.0
    assert worst <= 1, f"{worst:.2f} times the allowed error"


@pytest.mark.parametrize("values,group", KINDS)
def test_every_kernel_agrees_with_plain_torch_over_shapes_and_sparsities(kernel, values, group):
    for shape in SHAPES:
        for sparsity in [*SPARSITIES, None]:
            packed = stored(shape, sparsity, values, group)
            for dtype in DTYPES:
                for tokens in (1, 2, 5):
                    agree(packed, activations(tokens, shape[1], dtype))


@pytest.mark.parametrize("values,group", [kind for kind in KINDS if TABLE[kind[0]].scaled])
def test_whole_integers_agree_are_expanded_and_looked_up(kernel, values, group):
    for shape in SHAPES:
        packed = stored(shape, 0.0, values, group, whole=True)
        assert packed.whole
        for tokens in (1, 2, 3, 4, 7, 8, 40):
            agree(packed, activations(tokens, shape[1], DTYPES[tokens % 3]))
        for dtype in DTYPES:
            dense = reference.expand(packed.weight, dtype)
            assert torch.equal(ops.expand(packed.weight, dtype), dense)
            ids = torch.tensor([[shape[0] - 1, 0]])
            assert torch.equal(ops.gather_rows(ids, packed.weight, dtype), dense[ids])


@pytest.mark.parametrize("values,group", KINDS)
def test_every_kernel_agrees_for_any_number_of_tokens(kernel, products, values, group):
    packed = stored((37, 250), None, values, group)
    bias = torch.randn(37)
    for dtype in DTYPES:
        for tokens in (*range(9), 12, 17, 31, 32, 33, 70, 1030):
            agree(packed, activations(tokens, 250, dtype), bias.to(dtype))


@pytest.mark.parametrize("values,group", KINDS)
def test_prefill_by_expanding_agrees_in_one_chunk_and_in_many(kernel, products, values, group, monkeypatch):
    monkeypatch.setattr(ops, "_most_direct", lambda weight: 4)
    packed = stored((201, 130), None, values, group)
    bias = torch.randn(201)
    for chunk in (1, 8 << 20):
        monkeypatch.setattr(ops, "CHUNK_BYTES", chunk)
        for dtype in DTYPES:
            agree(packed, activations(9, 130, dtype), bias.to(dtype))
            agree(packed, activations(9, 130, dtype))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.floats(0, 1),
    st.sampled_from(KINDS),
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(0, 1000),
    st.booleans(),
)
def test_kernels_agree_on_anything(rows, columns, sparsity, kind, dtype, tokens, seed, whole):
    packed = pack(weight((rows, columns), sparsity, seed), *kind, whole=whole)
    x = activations(tokens, columns, dtype)
    for kernel in KERNELS:
        with native.force(kernel):
            agree(packed, x)


@pytest.mark.parametrize("values,group", KINDS)
def test_expanding_gives_the_dense_weight(kernel, values, group):
    for shape in SHAPES:
        packed = stored(shape, None, values, group)
        for dtype in DTYPES:
            found = ops.expand(packed.weight, dtype)
            assert torch.equal(found, reference.expand(packed.weight, dtype))


@pytest.mark.parametrize("group", [None, 128])
def test_expanding_keeps_the_largest_weights_finite(kernel, group):
    for dtype in DTYPES:
        W = weight((5, 70), 0.5).sign().to(dtype) * torch.finfo(dtype).max
        packed = pack(W, "int8", group)
        found = ops.expand(packed.weight, dtype)
        assert bool(found.isfinite().all()) and torch.equal(found, reference.expand(packed.weight, dtype))


def test_the_plain_torch_twin_expands_any_range_of_groups():
    packed = pack(uneven((21, 200)), "int8", 128)
    dense = unpack(packed)
    assert torch.equal(reference.expand(packed.weight, torch.float32, 2, 4), dense[8:16])
    assert torch.equal(reference.expand(packed.weight, torch.float32, 5, 6), dense[20:])


def by_threads(product) -> list[torch.Tensor]:
    """The same product on one, two and three threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(product())
    finally:
        torch.set_num_threads(before)
    return found


@OURS
def test_a_product_does_not_depend_on_the_number_of_threads(kernel):
    for (values, group), whole in itertools.product(KINDS, (False, True)):
        packed = stored((301, 700), None, values, group, whole)
        for tokens in (1, 3, 8, 70):
            x = activations(tokens, 700, torch.bfloat16)
            one, two, three = by_threads(partial(ops.packed_linear, x, packed.weight, None))
            assert torch.equal(one, two) and torch.equal(one, three)


@OURS
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dense_product_does_not_depend_on_the_number_of_threads(kernel, dtype):
    """Over sums that cancel: what is left of them is the order in which they were added up."""
    for rows, columns in [(66, 512), (67, 515)]:
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(0))
        half = weight((rows, columns), 0.0).to(dtype)
        W = torch.cat([half, half[:, order]], 1)
        for tokens in range(1, ops.dense_direct() + 1):
            half = activations(tokens, columns, dtype)
            x = torch.cat([half, -half[:, order]], 1)
            for stored, transposed in ((W, False), (W.T.contiguous(), True)):
                one, two, three = by_threads(partial(ops.dense_linear, x, stored, None, transposed))
                assert torch.equal(one, two) and torch.equal(one, three)


@pytest.mark.parametrize("values,group", [(k, g) for k, g in KINDS if TABLE[k].scaled])
def test_a_whole_weight_gives_the_bits_of_a_masked_one(kernel, values, group):
    """So that a decoder may choose whichever is faster here, and the text does not depend on it."""
    for shape in [(66, 515), (7, 64), (12, 1344)]:
        packed = stored(shape, 0.6, values, group)
        bare = format.whole(packed)
        assert bare.whole and not packed.whole
        assert torch.equal(unpack(bare), unpack(packed))
        for tokens in (1, 2, 5, 33):
            x = activations(tokens, shape[1], torch.float32)
            found = [ops.packed_linear(x, each.weight, None) for each in (packed, bare)]
            # Other orders of sums; whole.py does not exchange there.
            if kernel in ("torch", *native.EXPANDING):
                torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
            else:
                assert torch.equal(*found), tokens


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tokens_are_multiplied_as_exactly_as_few(kernel, products, dtype):
    """Past the kernel's own tokens, whatever type the product is computed in, and over more rows than one part holds."""
    rows, columns, tokens = 1100, 2051, ops.dense_direct() + 3
    W, x = weight((rows, columns), 0.0).to(dtype), activations(tokens, columns, dtype)
    bias = activations(1, rows, dtype)[0]
    exact = x.double() @ W.double().T + bias.double()
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4 * float(exact.abs().max())}
    for stored, transposed in ((W, False), (W.T.contiguous(), True)):
        found = ops.dense_linear(x, stored, bias, transposed)
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), exact, **close)


def test_activations_may_be_unaligned_strided_or_three_dimensional(kernel):
    packed = pack(weight((20, 128), 0.6), "bf16")
    wide = torch.randn(2, 3, 259)
    for dtype in DTYPES:
        x = wide.to(dtype)
        agree(packed, x[..., 1:129])
        agree(packed, x[..., ::2][..., :128])
        agree(packed, x.flatten()[1:129])


@pytest.mark.parametrize("values,group", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_activation_is_never_hidden(kernel, values, group, bad):
    packed = pack(weight((8, 128), 0.0), values, group)
    for dtype in DTYPES:
        x = activations(2, 128, dtype)
        x[1, 17] = bad
        y = ops.packed_linear(x, packed.weight, None)
        assert bool(torch.isfinite(y[0]).all())
        assert not bool(torch.isfinite(y[1]).any())


def test_sixteen_bit_activations_stand_an_outlier(kernel):
    """One activation 1000 times the others: 8-bit activations would lose the rest, 16-bit ones keep 5 bits of it."""
    packed = pack(weight((64, 512), 0.5), "int8")
    x = activations(1, 512, torch.float32)
    x[0, 7] = 1000
    exact = x.double() @ unpack(packed).double().T
    y = ops.packed_linear(x, packed.weight, None).double()
    without = exact - x[0, 7].double() * unpack(packed)[:, 7].double()
    assert (y - exact).norm() < 0.02 * without.norm()


@pytest.mark.parametrize("values,group", [("int8", None), ("int8", 128)])
def test_tiny_activations_are_not_lost(kernel, values, group):
    packed = pack(weight((8, 128), 0.5), values, group)
    for dtype in (torch.float32, torch.bfloat16):
        for tiny in (1e-33, 1e-36):
            x = (activations(2, 128, torch.float32) * tiny).to(dtype)
            y = ops.packed_linear(x, packed.weight, None).double()
            exact = x.double() @ unpack(packed).double().T
            assert (y - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_kernels_agree_with_plain_torch(kernel, dtype):
    for shape in SHAPES:
        W = weight(shape, 0.0).to(dtype)
        bias = torch.randn(shape[0]).to(dtype)
        for tokens in range(1, 9):
            x = activations(tokens, shape[1], dtype)
            exact = x.double() @ W.double().T + bias.double()
            magnitude = x.double().abs() @ W.double().abs().T + bias.double().abs()
            allowed = 2 * ROUNDING[dtype] * exact.abs() + 4e-6 * magnitude + 1e-7
            for stored, transposed in ((W, False), (W.T.contiguous(), True)):
                y = ops.dense_linear(x, stored, bias, transposed).double()
                assert bool(((y - exact).abs() <= allowed).all())


def test_sums_over_very_many_columns_do_not_overflow(kernel):
    """All products of one sign: 70,000 of them do not fit what holds the sums of 16-bit activations."""
    packed = pack(torch.ones(4, 70016), "int8")
    x = torch.full((3, 70016), 255 / 32767)
    x[:, 0] = 1.0
    for dtype in DTYPES:
        for tokens in (1, 2, 3):
            agree(packed, x[:tokens].to(dtype))


def test_the_table_and_the_compiled_kernels_mean_the_same_kinds():
    if not native.chosen():
        pytest.skip("no compiled kernels here")
    bits = native.library().tawny_kind_bits
    coded = {
        kind.code: -kind.bits if kind.scaled else kind.bits
        for kind in TABLE.values()
        if kind.code is not None
    }
    assert {code: bits(code) for code in coded} == coded
    for kind in TABLE.values():
        if kind.code is not None and kind.bits < 8:
            level = partial(native.library().tawny_level, kind.code)
            assert tuple(map(level, range(1 << kind.bits))) == kind.grid and level(1 << kind.bits) == 0
    assert [bits(code) for code in (-1, 99)] == [0, 0]
    assert all(
        TABLE[name].code == code
        for name, code in zip(("f32", "bf16", "f16"), ops.FLOATS.values(), strict=True)
    )


def test_an_openmp_runtime_is_found_under_a_path_with_spaces():
    line = "7f0a1000-7f0a2000 r-xp 00000000 fe:00 1048{} {}\n"
    runtimes = ["/a b/my torch/lib/libgomp-1a2b.so.1", "/usr/lib/libiomp5.so"]
    mapped = [*runtimes, "/x/libompl.so.1 (deleted)", "[heap]"]
    maps = "".join(line.format(number, path) for number, path in enumerate(mapped))
    assert native._openmp_in(maps) == set(runtimes)


def test_there_is_one_openmp_runtime_in_the_process():
    """A second pool of spinning threads would ruin every two-thread timing."""
    if not native.chosen():
        pytest.skip("no compiled kernels here")
    native.library()
    assert len(native._openmp_in(Path("/proc/self/maps").read_text())) == 1


def test_of_several_openmp_runtimes_that_of_torch_is_taken(monkeypatch):
    """Other wheels bring one, too, beside torch's in site-packages."""
    folder = Path(torch.__file__).parent
    ours = next(iter(folder.rglob("libgomp*.so*")), None) or next(iter(folder.rglob("lib*omp*.so*")), None)
    if ours is None or not native.chosen():
        pytest.skip("this torch brings no runtime")
    others = [str(folder.parent / name / "libgomp.so.1") for name in ("aaa.libs", "torchaudio.libs")]
    opened = []
    monkeypatch.setattr(native, "_openmp_in", lambda _: [*others, str(ours)])
    monkeypatch.setattr(native.ctypes, "CDLL", opened.append)
    native._openmp_of_torch()
    assert opened == [str(ours)]


def test_an_unknown_kernel_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="avx512f"), native.force("avx512"):
        pass


def test_every_combination_that_this_cpu_can_run_is_tested(request):
    """Each kernel with each way of multiplying; the header of the run lists them."""
    cases = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    run = {(case["kernel"], case["products"]) for case in cases if {"kernel", "products"} <= case.keys()}
    if not run:
        pytest.skip("the tests of the kernels were left out")
    assert run == set(itertools.product(native.available(), PRODUCTS))


def test_a_library_without_our_kernels_is_refused():
    code = "from tawny.kernels.native import kernel_name; kernel_name()"
    last = python(code, TAWNY_KERNEL_LIBRARY=_ctypes.__file__).stderr.strip().splitlines()[-1]
    assert "UserError: TAWNY_KERNEL_LIBRARY=" in last and "expected the path of a built _native" in last


@pytest.mark.skipif(
    "sanitize" not in os.environ.get("TAWNY_KERNEL_LIBRARY", ""), reason="needs a sanitized build"
)
def test_the_sanitizer_sees_a_read_past_the_values():
    """Without this, a run under sanitizers that checks nothing would look like one that finds nothing."""
    code = """
import torch
from tawny.packed.linear import PackedLinear
from tawny.packed.format import pack
W = torch.randn(8, 64); W[:, ::2] = 0
packed = pack(W)
packed.tensors["values"] = packed.tensors["values"][: packed.nnz].clone()  # no padding
PackedLinear(packed)(torch.randn(1, 64).bfloat16())
"""
    for kernel in KERNELS[:-2]:  # portable code reads no whole vectors
        run = python(code, TAWNY_CPU=f"kernel={kernel}")
        assert run.returncode != 0 and "AddressSanitizer" in run.stderr
