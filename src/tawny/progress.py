"""How long work reports its progress, without knowing whether a terminal, a log or nobody listens."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """A listener. All calls are cheap and may come often."""

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        """A new walk of `total` steps begins, each a `unit`; it ends the one before."""

    def step(self, text: str) -> None:
        """One step of the phase is done."""

    def at(self, done: int, left: float) -> None:
        """`done` steps of the phase are done and it takes `left` seconds more, which the mean so far would not tell."""

    def detail(self, text: str, done: int, total: int) -> None:
        """What happens inside the current step; `total` 0 when it cannot be counted."""

    def say(self, text: str) -> None:
        """One line a person should read."""


class Silent:
    """Nobody listens."""

    def phase(self, *_: Any, **__: Any) -> None:
        pass

    step = at = detail = say = phase


silent: Progress = Silent()


class Within(Silent):
    """A phase inside one step of a longer phase: its steps are details of that step."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._name, self._done, self._total = progress, "", 0, 0

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self._name, self._done, self._total = name, 0, total

    def step(self, text: str) -> None:
        self._done += 1
        self._progress.detail(self._name, self._done, self._total)

    def say(self, text: str) -> None:
        self._progress.say(text)
