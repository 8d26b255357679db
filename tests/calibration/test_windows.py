from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tawny.calibration.text import load_text
from tawny.calibration.windows import (
    TokenisedText,
    evaluation_windows,
    held_out_windows,
    sample_windows,
    tokenise,
)
from tawny.errors import RecipeError, TextError


class Letters:
    """A tokenizer of letters that may know BOS, and may put it in front, as Gemma's does."""

    def __init__(self, bos=1, begins=True):
        self.bos_token_id, self.begins, self.calls = bos, begins, 0

    def __call__(self, text, return_attention_mask, verbose, add_special_tokens=True):
        assert not verbose, "a corpus longer than the context is no reason for a warning"
        self.calls += 1
        return {"input_ids": [*[1] * (self.begins and add_special_tokens), *map(ord, text)]}


def test_a_text_is_tokenised_once_whole_with_its_special_tokens(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    letters = Letters()
    text = tokenise(load_text(tmp_path / "a.txt"), letters, bos=False)
    assert text.ids.tolist() == [1, 97, 98, 99] and text.ids.dtype == torch.int64 and text.bos is None
    assert text.name == f"text {str(tmp_path / 'a.txt')!r}" and letters.calls == 1


def test_windows_begin_as_the_tokenizer_begins_a_text_unless_told_otherwise():
    kinds = (Letters(), Letters(begins=False), Letters(None, begins=False))
    assert [tokenise("abc", each).bos for each in kinds] == [1, None, None]
    assert [tokenise("abc", each, False).bos for each in kinds] == [None] * 3
    assert [tokenise("abc", each, True).bos for each in kinds[:2]] == [1, 1]
    with pytest.raises(RecipeError, match="this tokenizer has no BOS"):
        tokenise("abc", kinds[2], True)
    assert tokenise("abc", Letters()).ids.tolist() == [97, 98, 99]  # every window has its own


@settings(deadline=None, max_examples=50)
@given(length=st.integers(60, 200), seqlen=st.integers(2, 20), seed=st.integers(0, 9))
def test_with_bos_a_window_is_bos_and_one_token_less_of_the_text(length, seqlen, seed):
    ids = torch.arange(100, 100 + length)
    bare, begun = TokenisedText(ids), TokenisedText(ids, bos=1)
    makers = [
        lambda text, size: sample_windows(text, 3, size, seed),
        lambda text, size: evaluation_windows(text, size, 3),
        lambda text, size: evaluation_windows(text, size, 3, stride=1),
    ]
    for make in makers:
        windows = make(begun, seqlen)
        assert windows.shape == (3, seqlen) and (windows[:, 0] == 1).all()
        if seqlen > 2:  # a window of the text alone has two tokens at least
            assert torch.equal(windows[:, 1:], make(bare, seqlen - 1))
    apart = evaluation_windows(begun, seqlen, stride=seqlen)  # no more than all of the text
    assert torch.equal(apart[:, 1:].flatten(), ids[: len(apart) * (seqlen - 1)])


def test_too_short_a_text_is_told_the_length_that_was_asked_for():
    with pytest.raises(TextError, match="2 windows of 8 need 14"):
        evaluation_windows(TokenisedText(torch.arange(13), bos=1), 8, 2)
    with pytest.raises(TextError, match="2 samples of 8 need at least 8"):
        sample_windows(TokenisedText(torch.arange(7), bos=1), 2, 8, 0)


@settings(deadline=None, max_examples=50)
@given(
    length=st.integers(1, 200), samples=st.integers(1, 20), seqlen=st.integers(2, 50), seed=st.integers(0, 9)
)
def test_samples_are_windows_of_the_text_or_a_complaint(length, samples, seqlen, seed):
    text = TokenisedText(torch.arange(length))
    if length < seqlen + samples - 1:
        with pytest.raises(TextError, match="short"):
            sample_windows(text, samples, seqlen, seed)
        return
    windows = sample_windows(text, samples, seqlen, seed)
    assert windows.shape == (samples, seqlen)
    assert torch.equal(windows - windows[:, :1], torch.arange(seqlen).expand(samples, seqlen))
    assert int(windows.max()) < length and torch.equal(windows, sample_windows(text, samples, seqlen, seed))


def test_every_place_may_start_a_window_and_seeds_differ():
    text = TokenisedText(torch.arange(10))
    starts = {int(s) for seed in range(30) for s in sample_windows(text, 4, 3, seed)[:, 0]}
    assert starts == set(range(8))


@settings(deadline=None, max_examples=50)
@given(length=st.integers(0, 200), seqlen=st.integers(2, 50), windows=st.none() | st.integers(1, 10))
def test_evaluation_takes_the_first_windows_and_drops_the_tail(length, seqlen, windows):
    text = TokenisedText(torch.arange(length))
    wanted = max(length // seqlen, 1) if windows is None else windows
    if wanted * seqlen > length:
        with pytest.raises(TextError, match=f"{wanted * seqlen - length:,} short"):
            evaluation_windows(text, seqlen, windows)
        return
    cut = evaluation_windows(text, seqlen, windows)
    assert torch.equal(cut.flatten(), text.ids[: wanted * seqlen]) and cut.shape == (wanted, seqlen)


def test_windows_with_a_stride_overlap():
    made = evaluation_windows(TokenisedText(torch.arange(20)), 8, stride=3)
    assert made.tolist() == [list(range(i, i + 8)) for i in (0, 3, 6, 9, 12)]
    assert len(evaluation_windows(TokenisedText(torch.arange(20)), 8, 2, stride=3)) == 2
    with pytest.raises(TextError, match="6 windows of 8 need 23"):
        evaluation_windows(TokenisedText(torch.arange(20)), 8, 6, stride=3)


@pytest.mark.parametrize("bos", [None, 1])
@pytest.mark.parametrize("seed", range(4))
def test_held_out_windows_overlap_no_sample_and_not_each_other(seed, bos):
    text = TokenisedText(torch.arange(100, 3100), bos)
    samples, windows = sample_windows(text, 12, 100, seed), held_out_windows(text, 12, 100, seed, 50, 6)
    assert windows.shape == (6, 50) and torch.equal(windows, held_out_windows(text, 12, 100, seed, 50, 6))
    if bos is not None:
        assert (windows[:, 0] == bos).all()
        samples, windows = samples[:, 1:], windows[:, 1:]
    assert windows.unique().numel() == windows.numel() and not torch.isin(windows, samples).any()
    assert (windows.diff(dim=1) == 1).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_first_held_out_windows_are_from_all_of_the_text(seed):
    first = held_out_windows(TokenisedText(torch.arange(30000)), 12, 100, seed, 50, 20)[:4, 0]
    assert (first.max() - first.min()) > 10000


def test_a_text_that_is_all_samples_leaves_nothing_to_hold_out():
    with pytest.raises(TextError, match="to compare models on"):
        held_out_windows(TokenisedText(torch.arange(110)), 10, 100, 0, 20, 4)
