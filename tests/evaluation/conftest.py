"""A text to measure on."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a text of 860 letters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the owl hunts at night and sleeps by day. " * 20)
    return str(path)
