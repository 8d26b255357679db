from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tawny.recovery.objective import distil, match
from tests.reference.distil import whole_loss


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 3),
    length=st.integers(2, 9),
    chunk=st.integers(1, 30),
    kl=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_chunks_give_the_loss_and_gradient_of_all_logits_at_once(batch, length, chunk, kl, seed):
    torch.manual_seed(seed)
    student, teacher = nn.Linear(6, 11), nn.Linear(6, 11)
    hidden, seen = torch.randn(batch, length, 6, requires_grad=True), torch.randn(batch, length, 6)
    ids = torch.randint(11, (batch, length))
    loss = whole_loss(student(hidden), teacher(seen), ids, kl)
    loss.backward()
    expected = [hidden.grad.clone(), student.weight.grad.clone()]
    student.zero_grad()
    tails = [lambda _, h: student(h), lambda _, h: teacher(h)]
    scale = 1 / (batch * (length - 1))
    losses, gradient = distil(*tails, ids, hidden, seen, kl=kl, chunk=chunk, scale=scale)
    mean = ((1 - kl) * losses.next_token + kl * losses.kl) / losses.tokens
    assert mean == pytest.approx(float(loss.detach()), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.weight.grad, expected[1], rtol=1e-4, atol=1e-6)


def test_windows_may_weigh_the_teacher_unequally():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 11), nn.Linear(6, 11)
    hidden, seen = torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 6)
    ids, weights = torch.randint(11, (3, 5)), torch.tensor([1.0, 0.5, 0.0])
    each = [
        whole_loss(student(hidden[b : b + 1]), teacher(seen[b : b + 1]), ids[b : b + 1], float(weights[b]))
        for b in range(3)
    ]
    torch.stack(each).mean().backward()
    tails = [lambda _, h: student(h), lambda _, h: teacher(h)]
    _, gradient = distil(*tails, ids, hidden, seen, kl=weights, chunk=3, scale=1 / 12)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-4, atol=1e-6)


def test_a_model_that_is_its_own_teacher_has_no_divergence_and_always_agrees():
    head = nn.Linear(5, 7)
    hidden, ids = torch.randn(2, 4, 5), torch.randint(7, (2, 4))
    losses, gradient = distil(
        lambda _, h: head(h), lambda _, h: head(h), ids, hidden, hidden, kl=0.5, chunk=3
    )
    assert gradient is None and losses.agree == losses.tokens == 6
    assert losses.kl == pytest.approx(0, abs=1e-6)


def test_logits_exist_for_a_chunk_only():
    seen = []

    def head(ids, hidden):
        seen.append(hidden.shape[1])
        return hidden @ torch.eye(4)

    ids = torch.zeros(3, 9, dtype=torch.int64)
    distil(head, None, ids, torch.randn(3, 9, 4), None, kl=0, chunk=5, scale=1.0)
    assert max(seen) == 5 and sum(seen) == 24


def test_features_are_matched_by_the_share_of_each_positions_energy_that_is_lost():
    torch.manual_seed(0)
    student, teacher = nn.Linear(6, 5), nn.Linear(6, 5)
    hidden, seen = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6)
    lost = sum(
        (student(hidden)[b, t] - teacher(seen)[b, t].detach()).norm() ** 2
        / teacher(seen)[b, t].detach().norm() ** 2
        for b in range(2)
        for t in range(3)
    )
    (lost / 6).backward()
    expected = [hidden.grad.clone(), student.weight.grad.clone()]
    student.zero_grad()
    tails = [lambda _, h: student(h), lambda _, h: teacher(h)]
    losses, gradient = match(*tails, torch.zeros(2, 3, dtype=torch.int64), hidden, seen, scale=1 / 6)
    assert losses.tokens == 6 and losses.next_token == pytest.approx(float(lost), rel=1e-5)
    torch.testing.assert_close(gradient, expected[0])
    torch.testing.assert_close(student.weight.grad, expected[1])
    assert match(*tails, torch.zeros(2, 3), hidden, seen, scale=None) == (losses, None)
