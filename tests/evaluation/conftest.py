"""A text to measure on, and the verbs as a person calls them."""

from __future__ import annotations

import sys

import pytest

from tawny.cli import main


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """The path of a text of 860 letters."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the owl hunts at night and sleeps by day. " * 20)
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    """`run("eval", …)`: the exit code, stdout and stderr of a verb."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tawny", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call
