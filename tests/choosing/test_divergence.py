"""How far a model that is put together from solutions is from the dense one, against obvious restatements."""

from __future__ import annotations

import pytest
import torch

import tawny
from tawny.choosing import divergence as module
from tawny.choosing.divergence import Reference, Scorer
from tawny.choosing.scores import Scores
from tawny.model.streams import Samples, Stream
from tests.choosing.parts import solved_levels
from tests.tiny import tiny_model


def test_a_score_is_the_divergence_of_the_whole_model_put_together_by_hand(tmp_path):
    model = tiny_model("llama")
    job, space, store, held_out, solved = solved_levels(model, tmp_path / "levels")
    scorer = Scorer(job, store, held_out, solved.hidden, tawny.progress.silent)
    levels = tuple((i % 5) - 2 for i in range(len(space.linears)))
    [score] = scorer([levels], [3, 1])
    ids = held_out.tokens[[3, 1]]
    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        flat = [linear for some in job.by_block for linear in some]
        for index, some in enumerate(job.by_block):
            store.open(index)
            for linear in some:
                solution = store.read(linear, levels[flat.index(linear)])
                share = float((solution == 0).float().mean())
                assert share == pytest.approx(
                    space.sparsity(flat.index(linear), levels[flat.index(linear)]), abs=1e-2
                )
                getattr(linear.module, linear.parameter).data.copy_(solution)
        q = model(ids).logits.double().log_softmax(-1)
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert score == pytest.approx(expected, rel=1e-4)
    store.remove()
    assert not (tmp_path / "levels").exists()


def test_what_is_known_of_a_window_is_not_measured_again(tmp_path):
    job, space, store, held_out, solved = solved_levels(tiny_model("llama"), tmp_path / "levels")
    path = tmp_path / "scores.jsonl"
    scores = Scores(path)
    scorer = Scorer(job, store, held_out, solved.hidden, tawny.progress.silent, scores)
    one, other = space.uniform, (1, -1, *space.uniform[2:])
    scorer([one, other], [1])
    spent = scores.tokens
    found = scorer([one, other], [0, 1, 3])
    assert scores.tokens == 3 * spent
    assert scorer([other], [3, 0]) == scorer([other], [3, 0])
    assert scores.tokens == 3 * spent
    again = Scores(path)
    assert [again.mean(levels, [0, 1, 3]) for levels in (one, other)] == found
    assert again.tokens == scores.tokens and again.lacking(one, [2, 3]) == (2,)
    # A line that was cut off counts for nothing, and what comes after it is read again.
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    cut = Scores(path)
    assert cut.lacking(one, [0, 1, 3]) == (0, 3)
    cut.prove({"a": 0.5}, float("inf"), [])
    cut.prove({"a": 0.7}, 0.25, [0.2, 0.3])
    assert Scores(path).proven({"a": 0.7}) == [0.2, 0.3] and Scores(path).proof({"a": 0.7}) == 0.25
    assert Scores(path).proof({"a": 0.5}) == float("inf") and Scores(path).proof({"a": 0.6}) is None
    assert Scores(path).lacking(one, [1]) == ()


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_divergence_is_the_one_of_its_formula_however_many_rows_fit_the_cache(rows, monkeypatch):
    dense, other = torch.randn(7, 50, dtype=torch.float64), torch.randn(7, 50, dtype=torch.float64)
    p, q = dense.softmax(-1), other.softmax(-1)
    monkeypatch.setattr(module, "_CACHED_BYTES", rows * 4 * 50)
    made = Reference(dense.float()).divergence(other.float())
    torch.testing.assert_close(made, (p * (p / q).log()).sum(-1).float())
    torch.testing.assert_close(Reference(dense.float()).divergence(dense.float()), torch.zeros(7))


def test_candidates_that_share_blocks_score_as_they_would_alone_and_cost_less(tmp_path):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    job, space, store, held_out, solved = solved_levels(model, tmp_path / "levels")
    scorer = Scorer(job, store, held_out, solved.hidden, tawny.progress.silent)
    base = space.uniform
    others = [tuple(k + (i == place) for i, k in enumerate(base)) for place in (0, 9, len(base) - 1)]
    together = scorer([base, *others, base], [0, 1, 2])
    spent, scorer.scores = scorer.scores.tokens, Scores()
    assert together == [scorer([one], [0, 1, 2])[0] for one in (base, *others, base)]
    assert spent < scorer.scores.tokens
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_padding_does_not_count_in_a_score(tmp_path):
    model = tiny_model("llama")
    job, space, store, held_out, _ = solved_levels(model, tmp_path / "levels")
    scores = []
    for filler in (5, 6):
        ids, mask = held_out.tokens.clone(), torch.ones_like(held_out.tokens)
        ids[:, 12:], mask[:, 12:] = filler, 0
        padded = Samples(ids, mask)
        hidden = _dense_hidden(job.stack, padded)
        scorer = Scorer(job, store, padded, hidden, tawny.progress.silent)
        scores.append(scorer([space.uniform], [0, 1])[0])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


def _dense_hidden(stack, samples):
    stream = Stream(stack, samples)
    for index in range(len(stack)):
        stream.advance(index)
    return torch.cat(stream.hidden)
