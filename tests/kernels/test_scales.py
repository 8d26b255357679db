from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tawny
from tawny.errors import CheckpointError
from tawny.kernels import ops, reference
from tawny.kernels.scales import long, short
from tawny.kinds import KINDS, scaled_kinds
from tawny.packed import format
from tawny.packed.folder import PackedFolder
from tests.packed.test_folder import edit_index, saved
from tests.reference import packed as twin


def five_bits(fractions: list[int], exponents: list[int]) -> torch.Tensor:
    """bfloat16 scales of signs and five significant bits."""
    scales = torch.tensor(
        [(1 + abs(f) / 16) * 2.0**e * (-1 if f < 0 else 1) for f, e in zip(fractions, exponents, strict=True)]
    )
    return scales.bfloat16()


def longer(packed: format.PackedTensor) -> format.PackedTensor:
    """The same weight with bfloat16 scales."""
    t = dict(packed.tensors)
    t["scales"] = long(t["scales"], t.pop("exponents"))
    return replace(packed, tensors=t)


@settings(deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(-120, 110))
def test_scales_of_five_bits_come_back_from_eight(data, spans, low) -> None:
    count = 4 * spans
    fractions = data.draw(st.lists(st.integers(-15, 15), min_size=count, max_size=count))
    exponents = data.draw(st.lists(st.integers(low, low + 6), min_size=count, max_size=count))
    scales = five_bits(fractions, exponents).view(1, -1, 4)
    scales[torch.rand(scales.shape) < 0.2] = 0
    codes, rows = short(scales)
    assert codes.dtype == rows.dtype == torch.uint8 and codes.shape == scales.shape and rows.shape == (4,)
    assert torch.equal(long(codes, rows), scales)
    assert twin.long(codes.flatten().tolist(), rows.tolist()) == scales.flatten().tolist()


@pytest.mark.parametrize("last", [1.5 * 2**-9, 1 + 2**-7, float("nan"), float("inf")])
def test_what_eight_bits_do_not_hold_is_not_short(last) -> None:
    scales = five_bits([0] * 8, [0] * 8).view(1, 2, 4)
    assert short(scales) is not None
    scales[0, 1, 2] = last
    assert short(scales) is None


def test_a_folder_has_short_scales_where_nothing_is_lost(tmp_path) -> None:
    dense = saved(tmp_path / "dense")
    tawny.pack(dense, tmp_path / "packed", "int4", head="int6")
    folder = PackedFolder(tmp_path / "packed")
    assert all(entry.short for entry in folder.linears.values())
    model = tawny.load(tmp_path / "packed")
    for name, entry in folder.linears.items():
        packed, live = folder.read_packed(name), model.get_submodule(name).packed
        assert packed.tensors["scales"].dtype == torch.uint8 and packed.tensors.keys() == live.tensors.keys()
        assert all(torch.equal(tensor, live.tensors[key]) for key, tensor in packed.tensors.items())
        taken = sum(folder.tensors[f"{name}.{key}"].bytes for key in entry.wanted())
        assert taken == packed.nbytes < longer(packed).nbytes


@pytest.mark.parametrize("width", [96, 3200])
def test_a_weight_with_a_group_that_dwarfs_others_has_long_scales_and_loses_nothing(width) -> None:
    W_OI = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    W_OI[1, 7] = 500
    packed = format.pack(W_OI, "int4")
    assert "exponents" not in packed.tensors and "exponents" in format.pack(W_OI[2:], "int4").tensors
    assert abs(float(format.unpack(packed)[1, 7]) - 500) < 1.5  # 0.3 %, where five bits are off by up to 3


@pytest.mark.parametrize("told", ["yes", True])
def test_what_the_index_says_of_scales_must_fit(told, tmp_path) -> None:
    tawny.pack(saved(tmp_path / "dense"), tmp_path / "packed", "int8", group=64)

    def edit(index) -> None:
        next(iter(index["linears"].values()))["short"] = told

    edit_index(tmp_path / "packed", edit)
    with pytest.raises(CheckpointError, match="damaged"):
        PackedFolder(tmp_path / "packed")


def test_of_scales_that_give_a_group_back_a_short_one_is_found() -> None:
    """Of a group with one weight that is not 0 nearly any scale does, and one long scale would make all of them long."""
    levels, generator = torch.tensor(KINDS["int4"].grid), torch.Generator().manual_seed(0)
    scales = (
        five_bits(torch.randint(-15, 16, (64,), generator=generator).tolist(), [-6] * 64).view(64, 1).float()
    )
    W_OI = levels[torch.randint(0, 16, (64, 96), generator=generator)] * scales
    W_OI[:, 33:64] = 0
    for stored_OI in (W_OI, W_OI.bfloat16()):
        packed = format.pack(stored_OI, "int4", whole=True)
        assert "exponents" in packed.tensors
        assert torch.equal(format.unpack(packed, stored_OI.dtype), stored_OI)


@pytest.mark.parametrize(
    ("values", "group"), [(kind.name, group) for kind in scaled_kinds() for group in kind.groups if group]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(9, 200), (64, 1536)])
def test_kernels_read_short_scales_as_the_long_ones_they_stand_for(values, group, sparsity, shape) -> None:
    generator = torch.Generator().manual_seed(0)
    spans = -(-shape[1] // group)
    fractions = torch.randint(-15, 16, (shape[0] * spans,), generator=generator).tolist()
    exponents = torch.randint(-9, -2, (shape[0] * spans,), generator=generator).tolist()
    levels = torch.tensor(KINDS[values].grid)
    q_OSC = levels[torch.randint(0, len(levels), (shape[0], spans, group), generator=generator)]
    q_OSC[torch.rand(q_OSC.shape, generator=generator) < sparsity] = 0
    q_OSC[..., 0] = max(KINDS[values].grid, key=abs)  # so that the scale is found again
    q_OSC[3, 0] = 0  # a scale of 0
    scale_OS = five_bits(fractions, exponents).float().view(shape[0], spans, 1)
    W_OI = (q_OSC * scale_OS).flatten(1)[:, : shape[1]]
    packed = format.pack(W_OI, values, group, not sparsity)
    assert "exponents" in packed.tensors
    other = longer(packed)
    for tokens in (1, 2, 5, 33):
        x = torch.randn(tokens, shape[1], generator=generator)
        for dtype in (torch.float32, torch.bfloat16):
            made = ops.packed_linear(x.to(dtype), packed.weight, None)
            assert torch.equal(made, ops.packed_linear(x.to(dtype), other.weight, None))
    assert torch.equal(
        ops.expand(packed.weight, torch.float32), reference.expand(other.weight, torch.float32)
    )
    assert torch.equal(reference.expand(packed.weight), reference.expand(other.weight))
