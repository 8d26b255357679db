from __future__ import annotations

import pytest
import torch

from tawny.kinds import KINDS
from tawny.packed import format
from tawny.packed.on_grid import OnGrid

FEW = [name for name, kind in KINDS.items() if kind.bits < 8]


def weight(sparsity=0.5, shape=(6, 80)):
    generator = torch.Generator().manual_seed(1)
    W_OI = torch.randn(shape, generator=generator) * 0.02
    return W_OI.masked_fill(torch.rand(shape, generator=generator) < sparsity, 0)


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", FEW)
def test_a_weight_that_lies_on_the_grid_starts_as_it_is(name, group):
    W_OI = format.unpack(format.pack(weight(), name, group))
    made = OnGrid(W_OI, KINDS[name], group).value(W_OI)
    assert torch.equal(made.masked_fill(W_OI == 0, 0), W_OI)


@pytest.mark.parametrize("name", FEW)
def test_gradients_are_those_of_lsq_as_autograd_has_them(name):
    kind, W_OI = KINDS[name], weight()
    grid = OnGrid(W_OI, kind, 64)
    with torch.no_grad():
        grid.ends_OS *= 0.6  # some weights lie beyond the ends now
    gradient_OI = torch.randn(W_OI.shape, generator=torch.Generator().manual_seed(2)) * (W_OI != 0)
    made_OI, ends_OS = grid.gradients(W_OI, gradient_OI)

    V_OI = W_OI.clone().requires_grad_()
    exact_OS = grid.ends_OS.detach().clone().requires_grad_()
    scale_OS = exact_OS / kind.largest
    scale_OS = scale_OS + (grid.grid.held(scale_OS.detach()) - scale_OS).detach()
    scale_OI = scale_OS.repeat_interleave(64, 1)[:, :80]
    ratio_OI = (V_OI / scale_OI).clamp(kind.grid[0], kind.grid[-1])
    level_OI = ratio_OI + (kind.round(V_OI.detach(), scale_OI.detach()) - ratio_OI).detach()
    ((level_OI * scale_OI) * gradient_OI).sum().backward()
    torch.testing.assert_close(ends_OS, exact_OS.grad)
    ratio_OI = (W_OI / scale_OI).detach()
    beyond_OI = (ratio_OI < kind.grid[0]) | (ratio_OI > kind.grid[-1])
    assert beyond_OI.any()
    torch.testing.assert_close(made_OI[~beyond_OI], V_OI.grad[~beyond_OI])
    inward_OI = beyond_OI & (gradient_OI * W_OI > 0)
    assert torch.equal(made_OI[inward_OI], gradient_OI[inward_OI])
    assert not made_OI[beyond_OI & ~inward_OI].any()


@pytest.mark.parametrize("name", FEW)
def test_rounding_finds_a_nearest_level_whose_code_gives_it_back(name):
    grid = KINDS[name].grid
    halves = torch.arange(2 * grid[0] - 9, 2 * grid[-1] + 10) / 2
    values = torch.cat([halves, halves + 0.1, halves - 0.1, torch.tensor([1e38, -1e38])])
    made = KINDS[name].round(values, torch.ones(1))
    assert set(made.tolist()) == set(grid)
    distances = (values[:, None].double() - torch.tensor(grid)).abs().amin(1)
    assert torch.equal((values.double() - made).abs(), distances)
    survivors = made.to(torch.int8)
    assert torch.equal(KINDS[name].decode(KINDS[name].encode(survivors), 0, len(survivors)), survivors)


def test_what_was_removed_under_a_scale_below_zero_is_removed_when_packed_again():
    W_OI = 0 - weight().abs()  # whose best scales are below zero
    once = format.unpack(format.pack(W_OI, "int4", 64))
    assert torch.equal(format.unpack(format.pack(once, "int4", 64)), once)
    assert not once[W_OI == 0].any()


@pytest.mark.parametrize("name", [name for name in FEW if name != "int2"])
def test_one_weight_hundreds_of_times_as_large_leaves_the_others_of_its_group_no_worse_than_zero(name):
    W_OI = weight(sparsity=0)
    W_OI[:, 7] = torch.tensor([5.0, -5.0, 6.0, -6.0, 7.0, -7.0])
    made_OI = format.unpack(format.pack(W_OI, name, 64, whole=True))
    others = torch.ones(80, dtype=torch.bool)
    others[7] = False
    assert ((made_OI - W_OI)[:, others].abs() <= W_OI[:, others].abs() * 1.01).all()
    assert (made_OI - W_OI)[:, 7].abs().max() < 0.03


@pytest.mark.parametrize("name", FEW)
def test_zeros_that_rounding_made_are_trained_and_those_of_a_mask_are_not(name):
    kind = KINDS[name]
    for sparsity in (0, 0.5):
        W_OI = format.unpack(format.pack(weight(sparsity, (32, 256)), name, 64, whole=not sparsity))
        assert OnGrid(W_OI, kind, 64).whole == (not sparsity)
