"""What all pages share: the template engine that escapes whatever comes from outside, and writing in one piece."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tawny.progress import Progress

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **view: Any) -> str:
    """A template of this package filled with `view`; a name it lacks is an error."""
    return _environment().get_template(template).render(view)


@cache  # it keeps templates compiled
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def or_say(path: Path, make: Callable[[], object], progress: Progress) -> bool:
    """Make a page or a picture; whether it was. The work is done: one that cannot be made must not look like a failed run.

    A file that was there stays as it was, or as far as the new one came.
    """
    there = path.exists()
    try:
        make()
    except Exception as error:
        if not there:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        progress.say(f"{path.name} could not be made: {type(error).__name__}: {error}")
        return False
    return True


def write_beside(path: Path, text: str) -> Path:
    """Write beside and rename, so that a page is there whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path
