"""A cache of measured divergences, kept in a file so that a stopped search repeats none of them.

A candidate's divergence is asked for on few windows, then on more, and again in another generation; what is known of a
window is not measured again. Kept are the sums that a divergence is made of, in the order they are added up, so that a
mean is the same whether its windows were measured together, apart, or before a run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tawny.allocation.profile import Allocation
from tawny.choosing.space import Levels
from tawny.model.durable import writing


@dataclass(frozen=True)
class WindowSums:
    """The divergence of one model on one window, in nats: of so many tokens, some at a time."""

    tokens: int
    sums: tuple[float, ...]


def mean(parts: Iterable[WindowSums]) -> float:
    """Nats a token; infinite where a model has broken down."""
    total, tokens = 0.0, 0
    for part in parts:
        tokens += part.tokens
        for value in part.sums:
            total += value
    nats = total / max(1, tokens)
    return nats if math.isfinite(nats) else math.inf


def lead(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """How much nearer the first model is than the second, as a share, with the standard error, over the same windows.

    A ratio of two means, by the delta method: what both have in common takes nothing from being sure.
    """
    first, second = (torch.tensor(each, dtype=torch.float64) for each in (ours, theirs))
    kept = float(first.mean() / second.mean())
    left = first - kept * second
    stderr = float(left.std()) / math.sqrt(len(left)) / float(second.mean()) if len(left) > 1 else 0.0
    return 1 - kept, stderr


class Scores:
    """Divergences by candidate and window, and the proofs of finalists.

    Args:
        path: a file of lines that is read, and added to; None keeps everything in memory.

    Attributes:
        tokens: that went through the model so far.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.tokens = path, 0
        self._windows: dict[tuple[str, int], WindowSums] = {}
        self._proofs: dict[str, float] = {}
        self._proven: dict[str, list[float]] = {}
        if path is not None and path.exists():
            self._read(path)

    def lacking(self, levels: Levels, windows: Sequence[int]) -> tuple[int, ...]:
        """Those of the windows that the candidate has not been measured on."""
        key = _key(levels)
        return tuple(window for window in windows if (key, window) not in self._windows)

    def mean(self, levels: Levels, windows: Sequence[int]) -> float:
        """The candidate's divergence, nats a token, on windows that it has been measured on."""
        key = _key(levels)
        return mean(self._windows[key, window] for window in windows)

    def keep(self, sums: Mapping[Levels, Mapping[int, WindowSums]]) -> None:
        """What was measured, by candidate and window."""
        rows = []
        for levels, by_window in sums.items():
            key = _key(levels)
            for window, own in by_window.items():
                self._windows[key, window] = own
                rows.append([key, window, own.tokens, list(own.sums)])
        self._append({"scores": rows})

    def proof(self, allocation: Allocation) -> float | None:
        """The divergence of the model that was pruned so, if it has been measured."""
        return self._proofs.get(_key(sorted(allocation.items())))

    def proven(self, allocation: Allocation) -> list[float]:
        """The same on each window; empty where it broke down or an earlier version measured."""
        return self._proven.get(_key(sorted(allocation.items())), [])

    def prove(self, allocation: Allocation, score: float, by_window: Sequence[float]) -> None:
        key = _key(sorted(allocation.items()))
        self._proofs[key], self._proven[key] = score, list(by_window)
        self._append({"proof": [key, score, list(by_window)]})

    def _append(self, line: dict[str, Any]) -> None:
        if self.path is None:
            return
        text = json.dumps({**line, "tokens": self.tokens}) + "\n"
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _read(self, path: Path) -> None:
        """Take over what is there, up to a line that was cut off."""
        whole = 0
        with suppress(ValueError, KeyError, TypeError), writing(path):
            for line in path.read_bytes().splitlines(keepends=True):
                entry = json.loads(line)
                for key, window, tokens, sums in entry.get("scores", ()):
                    self._windows[key, window] = WindowSums(tokens, tuple(sums))
                if "proof" in entry:
                    key, self._proofs[key], *rest = entry["proof"]
                    self._proven[key] = rest[0] if rest else []
                self.tokens = entry["tokens"]
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
        with writing(path):
            os.truncate(path, whole)


def _key(what: Any) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:32]
