"""Who is told about progress. The library only ever calls these four methods; `console.py` shows them.

A watch never changes a result, and none of its methods may be needed for one.
"""

from __future__ import annotations

__all__ = ["Silent", "Watch", "silent"]

from typing import Protocol


class Watch(Protocol):
    """Told what happens, in the order phase, (detail*, step)*, phase, …; `say` may come at any time."""

    def phase(self, name: str, total: int) -> None:
        """A walk over `total` blocks starts."""
        ...

    def step(self, text: str) -> None:
        """One block of the walk is done; `text` is its name."""
        ...

    def detail(self, text: str, done: int, total: int) -> None:
        """Inside a block: what is being done, `done` of `total` parts of it (0 of 0 where nobody counts)."""
        ...

    def say(self, text: str) -> None:
        """Something the user should read, in one line."""
        ...


class Silent:
    """Tells nobody."""

    def phase(self, name: str, total: int) -> None:
        pass

    def step(self, text: str) -> None:
        pass

    def detail(self, text: str, done: int, total: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass


silent = Silent()
