"""The blocked factor and inverse against float64's, at sizes around their blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.solvers import inverse
from tawny.solvers.inverse import factorise, invert
from tests.reference.problems import lifelike


def damped(width: int, seed: int = 0) -> torch.Tensor:
    H = lifelike(1, width, seed, loud=min(3, width))[1].hessian
    return H + 0.01 * H.diagonal().mean() * torch.eye(width)


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 70), block=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_it_is_the_inverse_whatever_the_blocks(width: int, block: int, seed: int) -> None:
    A = damped(width, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inverse, "_BLOCK", block)
        L, found = factorise(A.clone()).double().tril(), invert(A.clone())
    exact = torch.linalg.inv(A.double())
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-4
    assert float((L @ L.T - A).norm() / A.norm()) < 1e-6


def test_it_is_as_near_as_lapack_with_many_blocks_and_lies_in_the_memory_of_its_argument() -> None:
    A = damped(600)
    exact = torch.linalg.inv(A.double())
    theirs = torch.cholesky_inverse(torch.linalg.cholesky(A))
    place = A.clone()
    place.triu_(1).add_(A.tril())  # whole
    place[torch.triu_indices(600, 600, 1).unbind()] = torch.nan  # the upper triangle is never read
    mine = invert(place)
    assert mine.data_ptr() == place.data_ptr()
    errors = [float((X.double() - exact).norm() / exact.norm()) for X in (mine, theirs)]
    assert errors[0] <= 2 * errors[1] + 1e-6


@pytest.mark.parametrize("bad", [-1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 300])
def test_what_is_not_positive_has_none(bad: float, place: int) -> None:
    A = damped(320)
    A[place, place] = bad
    assert invert(A) is None
