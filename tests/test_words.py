from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tawny import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 00 s"), (65, "1 min 05 s"), (3600, "1 h 00 min")],
)
def test_durations_round_to_words(seconds, said):
    assert words.duration(seconds) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (269e6, "269 MB"), (1.114e9, "1.11 GB"), (5e15, "5000 TB")],
)
def test_sizes_are_decimal(count, said):
    assert words.size(count) == said


@given(st.floats(0, 1e7), st.floats(allow_nan=True, allow_infinity=True), st.integers(1, 40))
def test_durations_are_short_and_a_bar_never_leaves_its_width(seconds, share, width):
    assert 3 <= len(words.duration(seconds)) <= 13
    assert 0 <= len(words.bar(share, width)) <= width


def test_a_single_window_has_no_standard_error():
    assert words.perplexity_text({"perplexity": 20.0, "stderr": 0.0}) == "20.00"
