"""ALPS's passes by every kernel this CPU can run, against the same written out in plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tawny.errors import TawnyError
from tawny.kernels import admm, native

KERNELS = native.available()[:-1]  # without torch
SIZES = [(1, 1), (3, 5), (7, 16), (9, 31), (64, 65), (150, 257)]  # the last one is shared by threads


def problem(rows: int, columns: int, zeros: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
    """T, W and a mask: T with many ties, at the threshold 0.5 of these tests too."""
    dice = torch.Generator().manual_seed(seed)
    T = torch.randn(rows, columns, generator=dice).mul_(8).round_().div_(8)
    W = torch.randn(rows, columns, generator=dice)
    return T, W, torch.rand(T.shape, generator=dice) < 0.3 if zeros else None


def support(T: Tensor, zero: Tensor | None, threshold: float) -> Tensor:
    above = T.abs() > threshold
    return above if zero is None else above & ~zero


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32).long()


def spread(T: Tensor, zero: Tensor | None, bounds: tuple[float, float], shift: int) -> Tensor:
    """What `update` counts."""
    scores = (T.abs() if zero is None else T.abs().masked_fill(zero, 0.0)).flatten()
    low, high = bounds
    near = scores[(scores > low) & (scores <= high)]
    bins = (bits(near) - int(bits(torch.tensor(low))) - 1) >> shift
    return torch.cat([(scores <= low).sum()[None], bins.bincount(minlength=admm.BINS)])


@pytest.fixture(params=KERNELS)
def kernel(request):
    with native.force(request.param):
        yield request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_passes_are_what_torch_says(kernel, threads, size, zeros: bool, dtype) -> None:
    T, W, zero = problem(*size, zeros)
    D = torch.where(support(T, zero, 0.5), T, 0.0)
    out = torch.empty_like(T, dtype=dtype)
    assert admm.right(T, W, zero, 0.5, 0.3, 0.2, out)
    wanted = 0.3 * (D - W) - 0.2 * (T - D)
    # the last bit of float32 may round a bfloat16 the other way
    assert torch.allclose(out.float(), wanted, rtol=2**-8 if dtype is torch.bfloat16 else 0, atol=1e-6)
    bounds, shift, counts = (0.4375, 0.625), 7, admm.histogram(T.numel())
    moved, step = T.clone(), W.flip(0).to(dtype)
    assert admm.update(moved, W, step, zero, 0.5, 0.3, 0.2, bounds, shift, counts)
    assert torch.allclose(moved, W + step + (T - D) * (0.2 / 0.3), atol=1e-6)
    assert torch.equal(counts.sum(0), spread(moved, zero, bounds, shift))
    seen = torch.zeros(size, dtype=torch.bool)
    for values in (T, moved, moved, -T):
        wanted = support(values, zero, 0.5)
        changed = int((wanted ^ seen).sum())
        assert admm.changes(values, zero, seen, 0.5) == changed
        assert torch.equal(seen, wanted)


@settings(max_examples=40, deadline=None)
@given(
    kernel=st.sampled_from(KERNELS or ("torch",)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    first=st.integers(0, 8),
    seed=st.integers(0, 10**6),
    low=st.floats(0, 2, width=32),
    width=st.floats(0, 1),
)
def test_the_histogram_counts_every_weight_once(kernel, rows, columns, first, seed, low, width) -> None:
    if kernel == "torch":
        pytest.skip("no compiled kernels")
    T, W, zero = problem(rows, columns, seed % 2 == 1, seed)
    S = W.flip(0) / 4
    low, high = (float(torch.tensor(bound)) for bound in (low, low * (1 + width)))
    span = int(bits(torch.tensor(high)) - bits(torch.tensor(low)))
    shift = max(0, (span - 1) // admm.BINS).bit_length()
    counts, moved = admm.histogram(T.numel()), T.clone()
    with native.force(kernel):
        for part in (
            slice(0, first),
            slice(first, rows),
        ):  # what is added up over slices is that of the whole
            slice_of_zero = None if zero is None else zero[part]
            admm.update(
                moved[part], W[part], S[part], slice_of_zero, 0.5, 0.3, 0.2, (low, high), shift, counts
            )
    assert torch.equal(counts.sum(0), spread(moved, zero, (low, high), shift))
    assert counts.sum() == (moved.abs() <= high).sum() + (
        0 if zero is None else (zero & (moved.abs() > high)).sum()
    )


def test_a_range_that_does_not_fit_the_bins_is_refused(kernel) -> None:
    T, W, _ = problem(3, 5, False)
    with pytest.raises(TawnyError, match="out of range"):
        admm.update(T, W, W, None, 0.5, 0.3, 0.2, (0.25, 0.5), 6, admm.histogram(15))


def test_what_a_kernel_cannot_read_is_left_to_torch(kernel) -> None:
    T, W, _ = problem(6, 8, False)
    assert not admm.right(T.T, W.T, None, 0.5, 0.3, 0.2, torch.empty(8, 6))
    assert not admm.right(T.double(), W.double(), None, 0.5, 0.3, 0.2, torch.empty_like(T).double())
    assert not admm.right(T, W, None, 0.5, 0.3, 0.2, torch.empty_like(T).half())
    with native.force("torch"):
        assert not admm.right(T, W, None, 0.5, 0.3, 0.2, torch.empty_like(T))
        assert admm.changes(T, None, torch.zeros(T.shape, dtype=torch.bool), 0.5) is None
