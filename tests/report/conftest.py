from __future__ import annotations

import sys

import pytest

from tawny.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command: its exit code, its output and what it said beside that."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tawny", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call
