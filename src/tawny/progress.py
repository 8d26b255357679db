"""How long work reports its progress, without knowing whether a terminal, a log or nobody listens."""

from __future__ import annotations

import os
from typing import Protocol


class Progress(Protocol):
    """A listener. All calls are cheap and may come often."""

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        """A new walk of `total` steps begins, each a `unit`; it ends the one before."""

    def step(self, text: str) -> None:
        """One step of the phase is done."""

    def detail(self, text: str, done: int, total: int) -> None:
        """What happens inside the current step; `total` 0 when it cannot be counted."""

    def say(self, text: str) -> None:
        """One line a person should read."""


class Silent:
    """Nobody listens."""

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def detail(self, text: str, done: int, total: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


silent: Progress = Silent()


def started_by_torchrun() -> bool:
    """Whether this is one of several processes that share a run."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def speaks() -> bool:
    """Whether this process is the one of them that talks and writes."""
    return not started_by_torchrun() or os.environ["RANK"] == "0"
