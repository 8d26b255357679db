"""What a verb shows, as plain data: rows of cells under a heading, or names beside values.

A verb makes frames from the same dictionary that `--json` prints. console.py draws them, so that only it loads rich.
"""

from __future__ import annotations

__all__ = ["Frame", "Marked", "Result", "Shown", "facts", "parts", "table"]

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Result = Mapping[str, Any]  # what a verb prints with `--json`, and makes its frames from


class Marked(NamedTuple):
    """A cell that may be the best of its row, with its change from the first one behind it."""

    text: str
    change: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text}  {self.change}" if self.change else self.text


@dataclass
class Frame:
    """Rows of cells. Without `columns` a row is a name and a value.

    Columns in `left` are set to the left, all others to the right. Cells of the columns in `wrapped` may go on over
    several lines in a narrow window; a bar or a number in two pieces says nothing.
    """

    columns: tuple[str, ...] = ()
    title: str | None = None
    left: Sequence[int] = (0,)
    wrapped: Sequence[int] = ()
    rows: list[tuple[str | Marked, ...]] = field(default_factory=list)

    def add(self, *cells: str | Marked) -> None:
        self.rows.append(cells)


Shown = Frame | str  # what the console draws: a frame, or a line of text


def table(*columns: str, title: str | None = None, left: Sequence[int] = (0,)) -> Frame:
    """An empty table; the named columns in `left` may wrap."""
    return Frame(columns, title, left, [index for index in left if columns[index]])


def facts(rows: Sequence[tuple[str, str]], title: str | None = None) -> Frame:
    """Names and values, without a heading."""
    return Frame(title=title, rows=list(rows))


def parts(sums: Mapping[str, Any], total: str, show: Callable[[Any], str]) -> str:
    """The four largest parts of a sum by name, in brackets."""
    largest = sorted(((v, k) for k, v in sums.items() if k != total and v > 0), reverse=True)[:4]
    words = ", ".join(f"{key.replace('_', ' ')} {show(value)}" for value, key in largest)
    return words and f" ({words})"
