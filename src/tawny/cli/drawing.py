"""What rich draws: tables of frames, and progress as one bar with the time left and one inner line.

Only this file loads rich, and only a verb at work loads this file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tawny.cli.watching import Walk
from tawny.errors import printable
from tawny.report.frames import Frame, Marked, Shown
from tawny.words import duration

_WIDE = 200  # columns where nobody's window limits them
_READABLE = 16  # columns a name needs when it goes on over several lines
_BETWEEN = 3  # columns between two columns of a table


class BarWatch:
    """A bar over blocks and an inner line, redrawn in place; finished phases leave one line behind."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._walk: Walk | None = None
        self._inner = ""

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self.close()
        self._walk = Walk(name, total, unit)

    def step(self, text: str) -> None:
        if self._walk is not None:
            self._walk.step()
        self._inner = ""

    def at(self, done: int, left: float) -> None:
        if self._walk is not None:
            self._walk.to(done, left)

    def detail(self, text: str, done: int, total: int) -> None:
        self._inner = f"{text} {done}/{total}" if total else text

    def say(self, text: str) -> None:
        if self.live is not None:
            self.live.console.print(printable(text))

    def close(self) -> None:
        if self._walk is not None:
            self.say(self._walk.summary())
        self._walk, self._inner = None, ""

    def __rich__(self) -> RenderableType:
        walk = self._walk
        if walk is None:
            return Text("")
        outer = Table.grid(padding=(0, 1))
        outer.add_row(
            Text(walk.name, style="bold"),
            ProgressBar(total=max(walk.total, 1), completed=walk.done, width=32),
            f"{walk.done}/{walk.total}" if walk.total else f"{walk.done} {walk.unit}",
            Text(duration(walk.elapsed), style="dim"),
            Text(walk.left(), style="cyan"),
        )
        return Group(outer, Text("  " + (self._inner or "…"), style="dim", no_wrap=True, overflow="ellipsis"))


@contextmanager
def bar_on(rich: Rich) -> Iterator[BarWatch]:
    """Progress that is redrawn in place until the end of the `with`."""
    bar = BarWatch()
    with Live(bar, console=rich, refresh_per_second=8, transient=True) as live:
        bar.live = live
        yield bar
        bar.close()


def error_line(line: str) -> Text:
    return Text.assemble(("error:", "bold red"), f" {line}")


def page(rich: Rich, tables: Sequence[Shown]) -> str:
    with rich.capture() as captured:
        for shown in tables:
            rich.print(printable(shown) if isinstance(shown, str) else drawn(shown, rich.width))
            rich.print()
    # Tables are padded to their width, which a window does not show and a file should not hold.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def drawn(frame: Frame, width: int) -> Table | Text:
    """A table, or a few lines a row where `width` would leave its names a letter a line, or cut its numbers."""
    if frame.columns and _needed(frame) > width:
        return _stacked(frame, width)
    title = None if frame.title is None else printable(frame.title)
    drawing = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    if frame.columns:
        drawing.box = box.SIMPLE_HEAD
        for index, column in enumerate(frame.columns):
            side: Literal["left", "right"] = "left" if index in frame.left else "right"
            whole = index not in frame.wrapped
            drawing.add_column(Text(printable(column)), justify=side, no_wrap=whole, overflow="fold")
    else:
        drawing.box, drawing.show_header = None, False
        drawing.add_column(style="dim", no_wrap=True)
        drawing.add_column(overflow="fold")
    for row in frame.rows:
        drawing.add_row(*map(_cell, row))
    return drawing


def _cell(cell: str | Marked) -> Text:
    if isinstance(cell, str):
        return Text(printable(cell))
    change = Text(f"  {cell.change}" if cell.change else "", style="not bold dim")
    return Text(printable(cell.text), style="bold" if cell.best else "").append_text(change)


def _needed(frame: Frame) -> int:
    """The narrowest window that shows every number whole and every name readably."""
    needed = -1
    for index, cells in enumerate(zip(frame.columns, *frame.rows, strict=True)):
        natural = max(cell_len(str(cell)) for cell in cells)
        needed += _BETWEEN + (min(natural, _READABLE) if index in frame.wrapped else natural)
    return needed


def _stacked(frame: Frame, width: int) -> Text:
    lines = [] if frame.title is None else [Text(printable(frame.title), style="bold")]
    for first, *rest in frame.rows:
        lines.append(Text(printable(f"{frame.columns[0]} {first}".strip()), style="bold"))
        line = ""
        for head, cell in zip(frame.columns[1:], map(str, rest), strict=True):
            if not (head and cell):
                continue
            part = printable(f"{head} {cell}")
            if line and cell_len(f"  {line}, {part},") > width:
                lines.append(Text(f"  {line},"))
                line = ""
            line += f", {part}" if line else part
        lines.append(Text(f"  {line}"))
    return Text("\n").join(lines)


def rich_on(stream: TextIO) -> Rich:
    # Where there is no window its width must not cut names; COLUMNS still decides if it is set.
    wide = None if stream.isatty() or os.environ.get("COLUMNS", "0") not in ("", "0") else _WIDE
    # Names of files, texts and tasks come from outside: `[red]` or `:owl:` in one is neither a style nor a picture.
    return Rich(file=stream, width=wide, highlight=False, markup=False, emoji=False, stderr=False)
