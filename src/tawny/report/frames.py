"""What a person is shown, as plain data: rows of cells under a heading, or names beside values.

Frames are made from the same dictionaries that `--json` prints and records hold. Three places draw them: the terminal
(cli/drawing.py), cards (`markdown`, here) and pages (templates/base.html.j2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Result = Mapping[str, Any]  # what a verb prints with `--json`, or a record


class Marked(NamedTuple):
    """A cell that may be the best of its row, with its change from the first one after it."""

    text: str
    change: str = ""
    best: bool = False

    def __str__(self) -> str:
        return f"{self.text}  {self.change}" if self.change else self.text


@dataclass
class Frame:
    """Rows of cells. Without `columns` a row is a name and a value.

    Columns in `left` are set to the left, all others to the right. Cells of the columns in `wrapped` may go on over
    several lines in a narrow window; a bar or a number in two pieces cannot be read.
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


def markdown(frame: Frame) -> str:
    """A table, or a list of names and values."""
    if not frame.columns:
        return "\n".join(f"- {_cell(name)}: {_cell(value)}" for name, value in frame.rows)
    sides = ("---" if index in frame.left else "---:" for index in range(len(frame.columns)))
    rows = [frame.columns, *frame.rows]
    lines = ["|" + "|".join(f" {_cell(cell)} " if cell else " " for cell in row) + "|" for row in rows]
    return "\n".join([lines[0], "|" + "|".join(sides) + "|", *lines[1:]])


def _cell(cell: str | Marked) -> str:
    if isinstance(cell, str):
        return escaped(cell)
    text = f"**{escaped(cell.text)}**" if cell.best else escaped(cell.text)
    return text + (f" ({cell.change})" if cell.change else "")


def escaped(text: str) -> str:
    """Words for Markdown: nothing in them may start a tag, a link or a new line."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in flat)
