"""Progress as plain lines, and what is known of a phase: how far it is, how long it took, how long it will take."""

from __future__ import annotations

import time
from typing import TextIO

from tawny.errors import printable
from tawny.words import duration

_QUIET_SECONDS = 5.0  # between plain progress lines
_INSTANT = 0.02  # seconds a step that only takes up what is known


class Walk:
    """One phase: how far, how long, how long still."""

    def __init__(self, name: str, total: int, unit: str) -> None:
        self.name, self.total, self.unit = name, total, unit
        self.done, self.start = 0, time.monotonic()
        self._kept = 0  # first steps that an earlier run had made, which take no time
        self._told: float | None = None  # when it ends, by who knows better
        self.end: float | None = None  # of the last step: what comes between two phases belongs to neither

    def step(self) -> None:
        self.to(self.done + 1)

    def to(self, done: int, left: float | None = None) -> None:
        if self._kept == self.done and self.elapsed < _INSTANT * done:
            self._kept = done
        self.done = done
        self._told = None if left is None else time.monotonic() + left
        if done >= self.total > 0:  # nobody knows how many there will be where the total is 0
            self.end = time.monotonic()

    @property
    def elapsed(self) -> float:
        return (self.end or time.monotonic()) - self.start

    def left(self) -> str:
        """Steps are alike, so the mean so far is the best guess; nothing is known before the first."""
        if self.done >= self.total > 0:
            return ""
        since = self.done - self._kept
        if not since and self.elapsed > _QUIET_SECONDS:  # steps are short, and not known from before
            since = self.done
        if self._told is not None:
            left = max(0.0, self._told - time.monotonic())
        elif self.done >= self.total or not since:
            return ""
        else:
            left = self.elapsed / since * (self.total - self.done)
        return f"about {duration(left)} left"

    def summary(self) -> str:
        return f"{self.name}: {self.done} {self.unit} in {duration(self.elapsed)}"


class LineWatch:
    """Plain lines, at most one every few seconds and one at the end of a phase."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._walk: Walk | None = None
        self._last = 0.0

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self.close()
        self._walk = Walk(name, total, unit)
        self._print(f"{name}: {total} {unit}")

    def step(self, text: str) -> None:
        if self._walk is not None:
            self._walk.step()
            self._tell(self._walk)

    def at(self, done: int, left: float) -> None:
        if self._walk is not None:
            self._walk.to(done, left)
            self._tell(self._walk)

    def _tell(self, walk: Walk) -> None:
        if walk.end is None and time.monotonic() - self._last >= _QUIET_SECONDS:
            far = f"{walk.done}/{walk.total}" if walk.total else f"{walk.done} {walk.unit}"
            left = walk.left()
            self._print(f"{walk.name}: {far} after {duration(walk.elapsed)}{f', {left}' if left else ''}")

    def detail(self, text: str, done: int, total: int) -> None:
        pass

    def say(self, text: str) -> None:
        self._print(text)

    def close(self) -> None:
        if self._walk is not None:
            self._print(self._walk.summary())
        self._walk = None

    def _print(self, line: str) -> None:
        self._last = time.monotonic()
        print(printable(line), file=self._stream, flush=True)
