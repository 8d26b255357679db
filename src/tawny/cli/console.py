"""Where a verb sends what it has to say: progress, tables, errors.

What it promises:

- Results go to stdout, progress and errors to stderr. On a terminal progress is one bar over blocks with the
  time left, and one inner line; anywhere else it is plain lines, a few seconds apart.
- With `--json`, stdout holds exactly one JSON document: the result's `to_dict()`, or `{"error": …}`.
- An error is one line.

Frames (frames.py) are made from the same dictionaries that `--json` prints, so both show the same numbers. drawing.py
draws them; it loads rich, which `--help` has no time for.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from tawny.cli.watching import LineWatch
from tawny.errors import printable
from tawny.process_group import speaks
from tawny.progress import Progress, silent
from tawny.record import finite
from tawny.report.frames import Result, Shown


class Console:
    """Where a verb sends what it has to say."""

    def __init__(self, as_json: bool = False) -> None:
        from tawny.cli import drawing

        self.as_json, self._drawing = as_json, drawing
        self._out, self._err = drawing.rich_on(sys.stdout), drawing.rich_on(sys.stderr)

    # --- results -----------------------------------------------------------------------------------

    def result(self, result: Result, tables: Callable[[Result], Sequence[Shown]]) -> None:
        """Print the JSON document, or else the tables that `tables` makes of it."""
        if speaks() and self.as_json:
            print(json.dumps(finite(result), indent=2, ensure_ascii=_ascii(), default=str), flush=True)
        elif speaks():
            print(self._drawing.page(self._out, tables(result)), flush=True)

    def aside(self, tables: Sequence[Shown]) -> None:
        """Tables on stderr, where stdout holds something else that people pipe on."""
        if not self.as_json:
            print(self._drawing.page(self._err, tables), file=sys.stderr)

    def note(self, text: str) -> None:
        """One line for a person; it never gets between a program and its JSON."""
        if speaks():
            self._err.print(printable(text), soft_wrap=True)

    def error(self, message: str, exit_code: int = 1) -> None:
        """One line on stderr, and the same as the JSON document."""
        line = printable(" ".join(message.split())) or "unknown"
        if not speaks():
            line = f"rank {os.environ['RANK']}: {line}"
        self._err.print(self._drawing.error_line(line), soft_wrap=True)
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
            with self._drawing.bar_on(self._err) as bar:
                yield bar
        else:
            plain = LineWatch(sys.stderr)
            yield plain
            plain.close()


def _ascii() -> bool:
    """Whether stdout would lose letters: JSON can name them all."""
    return "utf" not in (sys.stdout.encoding or "").lower()
