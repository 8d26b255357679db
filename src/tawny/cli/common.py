"""What verbs share: a console that turns a failure into one line and an exit code, and a recipe from arguments."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from tawny.cli.console import Console
from tawny.errors import NumericalError, OutputError, TawnyError
from tawny.process_group import speaks

_NO_MEMORY = "out of memory: use a shorter --seqlen, and fewer --samples or a smaller -o batch (`tawny plan` estimates it first)"


@contextmanager
def console_for(as_json: bool) -> Iterator[Console]:
    """A console for the body of a verb; whatever goes wrong in it becomes one line and an exit code."""
    # The library reports what matters itself; warnings of others are noise between a user and a result.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # their bars would redraw themselves in a file
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")
    console = Console(as_json)
    try:
        yield console
    except TawnyError as error:
        # Of several processes all but the first say only what the first cannot know.
        if not speaks() and not isinstance(error, NumericalError):
            raise typer.Exit(error.exit_code) from error
        fail(console, str(error), error.exit_code)
    except KeyboardInterrupt:
        fail(console, "stopped by Ctrl-C; nothing unfinished looks finished", 1)
    except BrokenPipeError:  # `tawny list | head`
        _let_go()
        raise typer.Exit(1) from None
    except MemoryError:
        fail(console, _NO_MEMORY, 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        if error.errno == errno.ENOSPC and not error.filename:
            try:
                sys.stdout.flush()
            except OSError:  # its own disk is the full one
                _let_go()
        fail(console, f"{error.strerror or error}{where}", 1)
    except Exception as error:
        # torch's own, of a CPU and of a GPU
        lacks = "can't allocate memory" in str(error) or type(error).__name__ == "OutOfMemoryError"
        if isinstance(error, RuntimeError) and lacks:
            fail(console, _NO_MEMORY, 1)
        if os.environ.get("TAWNY_DEBUG"):
            raise
        fail(console, f"unexpected {type(error).__name__}: {error} (TAWNY_DEBUG=1 shows where)", 1)


def _let_go() -> None:
    """Nothing more goes to stdout, at the end of the interpreter neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(console: Console, message: str, exit_code: int) -> None:
    console.error(message, exit_code)
    raise typer.Exit(exit_code)


def check_file(option: str, path: Path | None, *endings: str) -> None:
    """Before the work: a result that cannot be written should not cost the time it takes."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise OutputError(f"{option} {path} does not end in {' or '.join(endings)}: name such a file")
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder: name a file, in it or beside it")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{option} {path}: its folder does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"{option} {path}: nothing can be written in its folder ({error.strerror}); name a file in another"
        ) from None
