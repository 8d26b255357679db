"""The only file that talks to the terminal: progress, tables, errors.

What it promises:

- Results go to stdout, progress and errors to stderr. On a terminal progress is one bar over blocks with the
  time left, and one inner line; anywhere else it is plain lines, a few seconds apart.
- With `--json`, stdout holds exactly one JSON document: the result's `to_dict()`, or `{"error": …}`.
- An error is one line.

Frames (frames.py) are made from the same dictionaries that `--json` prints, so both show the same numbers.
"""

from __future__ import annotations

__all__ = ["Console"]

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, TextIO

from rich import box
from rich.cells import cell_len
from rich.console import Console as Rich
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tawny.cli.frames import Frame, Marked, Result, Shown
from tawny.errors import printable
from tawny.process_group import speaks
from tawny.progress import Progress, silent
from tawny.record import finite
from tawny.words import duration

_QUIET_SECONDS = 5.0  # between plain progress lines
_WIDE = 200  # columns where nobody's window limits them
_INSTANT = 0.02  # seconds a step that only takes up what is known
_READABLE = 16  # columns a name needs when it goes on over several lines
_BETWEEN = 3  # columns between two columns of a table


class Console:
    """Where a verb sends what it has to say."""

    def __init__(self, as_json: bool = False) -> None:
        self.as_json = as_json
        self._out = _rich(sys.stdout)
        self._err = _rich(sys.stderr)

    # --- results -----------------------------------------------------------------------------------

    def result(self, result: Result, tables: Callable[[Result], Sequence[Shown]]) -> None:
        """Print the JSON document, or else the tables that `tables` makes of it."""
        if speaks() and self.as_json:
            print(json.dumps(finite(result), indent=2, ensure_ascii=_ascii(), default=str), flush=True)
        elif speaks():
            print(_drawn(self._out, tables(result)), flush=True)

    def aside(self, tables: Sequence[Shown]) -> None:
        """Tables on stderr, where stdout holds something else that people pipe on."""
        if not self.as_json:
            print(_drawn(self._err, tables), file=sys.stderr)

    def note(self, text: str) -> None:
        """One line for a person; it never gets between a program and its JSON."""
        if speaks():
            self._err.print(printable(text), soft_wrap=True)

    def error(self, message: str, exit_code: int = 1) -> None:
        """One line on stderr, and the same as the JSON document."""
        line = printable(" ".join(message.split())) or "unknown"
        if not speaks():
            line = f"rank {os.environ['RANK']}: {line}"
        self._err.print(Text.assemble(("error:", "bold red"), f" {line}"), soft_wrap=True)
        if self.as_json:
            with suppress(OSError):  # stdout may be what failed
                print(json.dumps({"error": line, "exit_code": exit_code}, ensure_ascii=_ascii()), flush=True)

    # --- progress ----------------------------------------------------------------------------------

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Progress that is shown until the end of the `with`."""
        if not speaks():
            yield silent
        # FORCE_COLOR makes a file a terminal to rich.
        elif sys.stderr.isatty() and self._err.is_terminal and not self._err.is_dumb_terminal:
            shown = _BarWatch()
            with Live(shown, console=self._err, refresh_per_second=8, transient=True) as live:
                shown.live = live
                yield shown
                shown.close()
        else:
            plain = _LineWatch(sys.stderr)
            yield plain
            plain.close()


def _ascii() -> bool:
    """Whether stdout would lose letters: JSON can name them all."""
    return "utf" not in (sys.stdout.encoding or "").lower()


class _Walk:
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
        made = self.done - self._kept
        if not made and self.elapsed > _QUIET_SECONDS:  # steps are short, and not known from before
            made = self.done
        if self._told is not None:
            left = max(0.0, self._told - time.monotonic())
        elif self.done >= self.total or not made:
            return ""
        else:
            left = self.elapsed / made * (self.total - self.done)
        return f"about {duration(left)} left"

    def summary(self) -> str:
        return f"{self.name}: {self.done} {self.unit} in {duration(self.elapsed)}"


class _BarWatch:
    """A bar over blocks and an inner line, redrawn in place; finished phases leave one line behind."""

    def __init__(self) -> None:
        self.live: Live | None = None
        self._walk: _Walk | None = None
        self._inner = ""

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self.close()
        self._walk = _Walk(name, total, unit)

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


class _LineWatch:
    """Plain lines, at most one every few seconds and one at the end of a phase."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._walk: _Walk | None = None
        self._last = 0.0

    def phase(self, name: str, total: int, unit: str = "blocks") -> None:
        self.close()
        self._walk = _Walk(name, total, unit)
        self._print(f"{name}: {total} {unit}")

    def step(self, text: str) -> None:
        if self._walk is not None:
            self._walk.step()
            self._tell(self._walk)

    def at(self, done: int, left: float) -> None:
        if self._walk is not None:
            self._walk.to(done, left)
            self._tell(self._walk)

    def _tell(self, walk: _Walk) -> None:
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


def _drawn(rich: Rich, tables: Sequence[Shown]) -> str:
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
    made = Table(title=title, title_justify="left", title_style="bold", pad_edge=False)
    if frame.columns:
        made.box = box.SIMPLE_HEAD
        for index, column in enumerate(frame.columns):
            side: Literal["left", "right"] = "left" if index in frame.left else "right"
            whole = index not in frame.wrapped
            made.add_column(Text(printable(column)), justify=side, no_wrap=whole, overflow="fold")
    else:
        made.box, made.show_header = None, False
        made.add_column(style="dim", no_wrap=True)
        made.add_column(overflow="fold")
    for row in frame.rows:
        made.add_row(*map(_cell, row))
    return made


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


def _rich(stream: TextIO) -> Rich:
    # Where there is no window its width must not cut names; COLUMNS still decides if it is set.
    wide = None if stream.isatty() or os.environ.get("COLUMNS", "0") not in ("", "0") else _WIDE
    # Names of files, texts and tasks come from outside: `[red]` or `:owl:` in one is neither a style nor a picture.
    return Rich(file=stream, width=wide, highlight=False, markup=False, emoji=False, stderr=False)
