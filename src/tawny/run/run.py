"""A run: what every long verb works through, whatever it makes.

A run keeps what it has finished in a journal, adds up its time, tells its progress, and may share its work with other processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

from tawny.machine import peak_memory
from tawny.progress import Progress
from tawny.run.journal import Journal
from tawny.run.ranks import Ranks


@final
class Clock:
    """Adds up wall time by phase, and in all since it was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def go_on(self, seconds: Mapping[str, float]) -> None:
        """Count what a run that was stopped took before, by phase and as `total`."""
        self.seconds.update(seconds)
        self._started -= self.seconds.pop("total", 0.0)

    @property
    def elapsed(self) -> float:
        """Seconds in all."""
        return time.perf_counter() - self._started

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@final
@dataclass(frozen=True)
class Run:
    """One run, apart from what it works on.

    Attributes:
        journal: what is finished, for the same command to continue from.
        ranks: the processes that share the run.
        hidden: folder of hidden states that are not kept in memory; None where all of them are.
    """

    journal: Journal
    ranks: Ranks
    progress: Progress
    clock: Clock
    hidden: Path | None = None

    @classmethod
    def unkept(cls, progress: Progress) -> Run:
        """A run of this process alone that begins anew each time."""
        return cls(Journal(None), Ranks(alone=True), progress, Clock())

    def note_cost(self) -> None:
        """Tell the journal what the run has taken so far, before it is written."""
        state = self.journal.state
        state["seconds"] = {**self.clock.seconds, "total": self.clock.elapsed}
        state["peak_memory"] = max(peak_memory(), int(state.get("peak_memory", 0)))

    def spill(self, walk: str, stream: str) -> Path | None:
        """Where the hidden states of a walk are kept, if not in memory."""
        return self.hidden and self.hidden / f"{walk}.{stream}{self.journal.suffix}"
