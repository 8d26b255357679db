from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tawny import kinds
from tawny.errors import CheckpointError, NumericalError, UserError
from tawny.kernels import native, reference
from tawny.kinds import KINDS as TABLE
from tawny.packed import format
from tawny.packed.checking import check
from tawny.packed.format import pack, unpack
from tests.packed.cases import KINDS, SHAPES, SPARSITIES, uneven, weight
from tests.reference.packed import read

DTYPES = {kind.name: kind.dtype for kind in TABLE.values() if not kind.scaled}
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("values", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_gives_back_every_bit_of_a_float_weight(shape, values):
    for sparsity in SPARSITIES:
        W = weight(shape, sparsity).to(DTYPES[values])
        packed = pack(W, values)
        check(packed)
        assert same_bits(unpack(packed), W)
        assert packed.nnz == int((W != 0).sum())


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 11), st.integers(1, 140), st.sampled_from(sorted(DTYPES)))
def test_any_bit_pattern_survives_packing(data, rows, columns, values):
    dtype = DTYPES[values]
    width = 8 * dtype.itemsize
    patterns = [
        0,
        0,
        0,
        1,
        -1,
        -(2 ** (width - 1)),
        2 ** (width - 1) - 1,
        0x7C00,
        0x7C01,
        0x7F80,
        0x7F81,
        12345,
    ]
    bits = data.draw(st.lists(st.sampled_from(patterns), min_size=1, max_size=40))
    flat = torch.tensor(bits * (rows * columns // len(bits) + 1), dtype=BITS[dtype])[: rows * columns]
    W = flat.view(rows, columns).view(dtype)
    packed = pack(W, values)
    for kernel in native.available():
        with native.force(kernel):
            assert same_bits(unpack(packed), W), kernel


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("values", TABLE)
def test_unpack_writes_out_what_plain_torch_does_bit_for_bit(values, whole):
    W = 0 - weight((37, 200), 0.0 if whole else 0.5).abs()  # the best scales of few bits are below zero
    W[8] *= 6e4 / W[8].abs().max()
    for group in TABLE[values].groups:
        packed = pack(W, values, group, whole)
        for dtype in (None, *BITS, torch.float64):
            wanted = reference.expand(packed.weight, dtype)
            for kernel in native.available():
                with native.force(kernel):
                    made = unpack(packed, dtype)
                if dtype is torch.float64:
                    assert made.dtype is dtype and torch.equal(made, wanted)
                else:
                    assert same_bits(made, wanted), kernel


def test_negative_zero_is_a_survivor_and_positive_zero_is_not():
    packed = pack(torch.tensor([[0.0, -0.0, 1.0]]), "bf16")
    assert packed.nnz == 2
    assert torch.signbit(unpack(packed)).tolist() == [[False, True, False]]
    assert pack(torch.tensor([[0.0, -0.0, 1.0]]), "int8").nnz == 2


def test_what_underflows_in_the_stored_kind_is_dropped():
    packed = pack(torch.tensor([[1e-30, 1.0]]), "f16")
    assert packed.nnz == 1
    assert unpack(packed).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("values,group", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 65), (9, 200)])
def test_a_reader_written_from_the_specification_agrees(shape, values, group):
    for whole in (False, True):
        packed = pack(uneven(shape), values, group, whole)
        check(packed)
        assert packed.whole == (whole and TABLE[values].scaled)
        assert torch.equal(torch.tensor(read(packed)), unpack(packed).float())


FEW = [(values, group) for values, group in KINDS if TABLE[values].storage == "uint8"]


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(sorted({values for values, _ in FEW})))
def test_codes_come_back_from_any_place(data, values):
    kind = TABLE[values]
    levels = data.draw(st.lists(st.sampled_from(kind.grid), min_size=1, max_size=200))
    stored = kind.encode(torch.tensor(levels, dtype=torch.int8))
    assert stored.numel() == kind.stored(len(levels)) == -(-len(levels) // 64) * 8 * kind.bits
    first = data.draw(st.integers(0, len(levels)))
    last = data.draw(st.integers(first, len(levels)))
    assert kind.decode(stored, first, last).tolist() == levels[first:last]


@pytest.mark.parametrize("values,group", FEW)
@pytest.mark.parametrize("shape", SHAPES)
def test_few_bits_keep_the_mask_and_are_near(shape, values, group):
    W = uneven(shape) * 0.02
    packed = pack(W, values, group)
    check(packed)
    assert packed.nnz == int((W != 0).sum())
    found = unpack(packed)
    assert bool((found[W == 0] == 0).all())
    assert 0 in TABLE[values].grid or torch.equal(found != 0, W != 0)
    for first in range(0, shape[1], group):
        part = W[:, first : first + group]
        # The scale that makes the largest weight the last level is tried, and the best of all is no worse.
        grid = TABLE[values].grid
        far = max(max(b - a for a, b in pairwise(grid)) / 2, grid[0] + grid[-1]) * 1.05 / grid[-1]
        error = (found[:, first : first + group] - part).square().sum(1)
        assert bool((error <= (part != 0).sum(1) * (far * part.abs().amax(1)).square()).all())


@pytest.mark.parametrize("values,group", FEW)
def test_a_weight_that_lies_on_the_grid_is_packed_exactly(values, group):
    generator, kind = torch.Generator().manual_seed(3), TABLE[values]
    shape, spans = (9, 200), -(-200 // group)
    scales = (torch.rand(9, spans, generator=generator) - 0.5).bfloat16().float()
    levels = torch.tensor(kind.grid)[torch.randint(0, len(kind.grid), shape, generator=generator)]
    W = levels * scales.repeat_interleave(group, 1)[:, :200]
    for whole in (True, False):
        # A checkpoint in 16 bits holds these numbers rounded, and codes and scales come back all the same.
        for stored in (W, W.bfloat16(), W.half()):
            found = unpack(pack(stored, values, group, whole))
            assert torch.equal(found.to(stored.dtype), stored)
            assert torch.equal(found, W) or stored is not W


@settings(max_examples=60, deadline=None)
@given(top=st.integers(1, 127), scale=st.sampled_from([2**-7, 0.0288, 0.37]), seed=st.integers(0, 10**6))
@example(top=16, scale=0.0288, seed=0)
def test_the_scales_of_eight_bits_for_gpus_are_found_whatever_the_highest_level(top, scale, seed):
    """Where it is 64 or a part of it, twice the levels reach 64 and no further: 128 is there with one sign only."""
    generator = torch.Generator().manual_seed(seed)
    tops = torch.tensor([127, 127, 127, top])[:, None]  # as most groups of a solved weight are
    q_GJ = (torch.rand(4, 64, generator=generator) * (2 * tops + 1)).floor() - tops
    q_GJ[:, :2] = torch.cat([tops, -tops], 1)
    W = (q_GJ * torch.tensor(scale).bfloat16().float()).bfloat16()
    kind = kinds.GPU_KINDS["w8"]
    scales = format.scales_of(W, kind, 64, whole=True)
    assert same_bits((kind.round(W.float(), scales) * scales).bfloat16(), W)


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_and_keeps_the_mask(shape, group):
    W = uneven(shape) * 0.02
    packed = pack(W, "int8", group)
    check(packed)
    assert packed.nnz == int((W != 0).sum())
    for first in range(0, shape[1], group or shape[1]):
        part = slice(first, first + (group or shape[1]))
        step = W[:, part].abs().amax(1, keepdim=True) / 127
        error = (unpack(packed)[:, part] - W[:, part]).abs()
        assert bool((error <= step * (0.5001 if group is None else 0.506)).all())


@pytest.mark.parametrize("group", [None, 128])
def test_sums_are_the_sums_of_the_integers(group):
    W = weight((9, 300), 0.5)
    packed = pack(W, "int8", group)
    dense = unpack(packed).double()
    expected = dense.sum(1) if group else (dense / packed.tensors["scales"][:9, None].double()).sum(1)
    assert torch.allclose(packed.tensors["sums"][:9].double(), expected, atol=1e-3)


def test_int8_of_extreme_rows_stays_finite():
    W = torch.zeros(6, 200)
    W[0, 3] = 1e-42
    W[1, 3] = 3e38
    W[2, :] = -0.0
    W[3, 100] = torch.finfo(torch.float32).tiny
    for group in (None, 128):
        packed = pack(W, "int8", group)
        check(packed)
        assert bool(torch.isfinite(unpack(packed)).all())
        assert bool(((unpack(packed) - W).abs() <= W.abs().amax(1, keepdim=True) / 127 + 1e-38).all())


@pytest.mark.parametrize("group", [None, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_int8_of_the_largest_weights_is_finite_in_their_own_type(dtype, group):
    for share in (1.0, 0.9966):
        W = torch.tensor([[share], [-share]], dtype=dtype) * torch.finfo(dtype).max
        found = unpack(pack(W, "int8", group), dtype)
        assert torch.allclose(found.double(), W.double(), rtol=0.01)


def test_n_of_m_needs_nothing_special():
    W = weight((8, 256), 0.0).view(8, -1, 4)
    W[..., :2] = 0
    packed = pack(W.view(8, 256), "bf16")
    assert packed.nnz == W.numel() / 2
    assert same_bits(unpack(packed), W.view(8, 256).to(torch.bfloat16))


@pytest.mark.parametrize("values,group", KINDS)
def test_bytes_are_what_the_formula_says(values, group):
    W = weight((128, 2048), 0.7)
    packed = pack(W, values, group)
    kind = TABLE[values]
    short = "exponents" in packed.tensors
    scales = (
        (1 / group + 5 / 2048 if short else 2 / group + 4 / 2048) if group else 8 / 2048 if kind.scaled else 0
    )
    ideal = (kind.bits / 8 * packed.nnz / W.numel() + 1 / 8 + scales) * W.numel()
    assert packed.nbytes == pytest.approx(ideal, rel=0.01)


def changed(name, place, change):
    """A damage: one element of a tensor is another."""

    def damage(tensors):
        tensors[name][place] = change(tensors[name][place])

    return damage


DAMAGES = {
    "mask": changed("masks", (0, 0, 1), lambda word: word ^ 4),
    "padding column": changed("masks", (0, 1, 0), lambda word: word | 1 << 40),
    "padding row": changed("masks", (1, 0, 3), lambda word: word | 1),
    "offset": changed("offsets", 1, lambda offset: offset + 1),
    "first offset": changed("offsets", 0, lambda offset: 1),
    "count": changed("offsets", -1, lambda offset: offset + 4),
    "negative": changed("offsets", -1, lambda offset: -1),
    "scale": changed("scales", 2, lambda scale: float("nan")),
    "length": lambda tensors: tensors.update(values=tensors["values"][:-1]),
    "dtype": lambda tensors: tensors.update(values=tensors["values"].view(torch.uint8)),
    "missing": lambda tensors: tensors.pop("sums"),
}


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_with_the_name_of_the_weight(damage, native, monkeypatch):
    packed = pack(weight((6, 70), 0.5), "int8")
    if not native:
        monkeypatch.setattr("tawny.kernels.native._load", lambda: (None, "test"))
    check(packed)
    DAMAGES[damage](packed.tensors)
    # A bit in the padding is also one too many: the refusal must be of the padding.
    said = "a mask bit is set in the padding" if damage.startswith("padding") else ""
    with pytest.raises(CheckpointError, match=rf"mlp\.up.*{said}"):
        check(packed, "mlp.up")


def test_what_cannot_be_packed_is_refused_in_words():
    W = weight((4, 64), 0.5)
    with pytest.raises(UserError, match="int7"):
        pack(W, "int7")
    with pytest.raises(UserError, match="group 16 is not possible"):
        pack(W, "int4", 16)
    with pytest.raises(UserError, match="goes with int8, int6, int5, int4, int3 or int2"):
        pack(W, "bf16", 128)
    with pytest.raises(UserError, match="matrix"):
        pack(W[0])
    with pytest.raises(UserError, match="float"):
        pack(W.long())
    W[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"^model\.up: .*NaN or infinity"), format.naming("model.up"):
        pack(W, "int8")


def test_shapes_describe_what_pack_makes():
    for values, group in KINDS:
        packed = pack(weight((9, 70), 0.5), values, group)
        assert {k: (t.dtype, tuple(t.shape)) for k, t in packed.tensors.items()} == packed.form.tensors()


@pytest.mark.parametrize(
    "value,dtype,values",
    [
        (7e4, torch.float32, "f16"),
        (-7e4, torch.bfloat16, "f16"),
        (3.4e38, torch.float32, "bf16"),
        (1e300, torch.float64, "f32"),
        (1e300, torch.float64, "int8"),
    ],
)
def test_a_finite_weight_never_becomes_infinity_in_silence(value, dtype, values):
    W = torch.zeros(5, 70, dtype=dtype)
    W[3, 66] = value
    refusal = r"model\.up: a weight of shape \(5, 70\) holds .* infinity in"
    with pytest.raises(NumericalError, match=refusal), format.naming("model.up"):
        format.pack(W, values)


def test_infinity_that_the_checkpoint_holds_is_kept_and_the_largest_finite_weight_fits():
    W = torch.tensor([[float("inf"), -float("inf"), float("nan"), 65504.0, -65504.0]])
    made = format.unpack(format.pack(W, "f16"))
    assert torch.equal(made.nan_to_num(1.0), W.half().nan_to_num(1.0))


@pytest.mark.parametrize("values", TABLE)
@pytest.mark.parametrize("whole", [False, True])
def test_a_weight_is_packed_in_parts_as_in_one(values, whole, monkeypatch):
    W_OI = torch.randn(90, 200).bfloat16() * (1 if whole else torch.rand(90, 200) > 0.5)
    solved_OI = format.unpack(format.pack(W_OI, values, whole=whole), torch.bfloat16)
    for weight_OI in (W_OI, solved_OI):
        at_once = format.pack(weight_OI, values, whole=whole)
        with monkeypatch.context() as small:
            small.setattr(format, "_PART", 3000)
            small.setattr(kinds, "_ENCODED", 5 * kinds.CHUNK)
            parts = format.pack(weight_OI, values, whole=whole)
        assert parts.tensors.keys() == at_once.tensors.keys()
        for name, tensor in at_once.tensors.items():
            assert torch.equal(parts.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
