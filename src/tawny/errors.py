"""Every error Tawny raises on purpose.

    TawnyError                exit code 1
    ├── NumericalError        a weight, an activation or a factorisation is not usable; names the linear
    ├── Interrupted           the user pressed Ctrl-C
    ├── LostProcess           one of several processes of a run has ended
    └── UserError             exit code 2: something that was asked for cannot be done
        ├── RecipeError       an unknown key, a value out of range
        ├── PatternError      a mask that does not fit a weight
        ├── ModelError        not a decoder, no blocks, nothing to prune
        ├── CheckpointError   a missing, truncated or foreign file
        ├── TextError         no text, too little text, no way to fetch it
        ├── OutputError       the place to write to is taken, read-only or full
        └── MissingFeature    a package or a feature of the machine is missing

A message is one line: what was given, what was expected, what to do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator


class TawnyError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class NumericalError(TawnyError):
    """A non-finite weight or activation, or a Hessian that cannot be factorised."""


class Interrupted(TawnyError):
    """The user stopped the run."""


class LostProcess(TawnyError):
    """Another process of this run has ended."""


class UserError(TawnyError):
    """What was asked for cannot be done; the message says what can."""

    exit_code = 2


class RecipeError(UserError):
    """An unknown recipe key or a value out of range."""


class PatternError(UserError):
    """A pattern that cannot be parsed or does not fit a linear."""


class ModelError(UserError):
    """The model is not a stack of decoder blocks, or holds nothing to prune."""


class CheckpointError(UserError):
    """A checkpoint file is missing, truncated, or not what its index says."""


class TextError(UserError):
    """The text is empty, too short, or cannot be fetched."""


class OutputError(UserError):
    """The output cannot be written where it was asked for."""


class MissingFeature(UserError):
    """An optional package or a feature of the machine is missing."""


def check_option(valid: bool, key: str, value: object, expected: str) -> None:
    """Raise RecipeError for an option that is out of range."""
    if not valid:
        raise RecipeError(f"{key} is {value}; expected {expected}")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'sparsegpt'?)` for the closest known word, or an empty string."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def short(text: str) -> str:
    """At most 60 characters of a text, on one line; what a terminal would obey or hide is escaped."""
    text = printable(" ".join(text.split()))
    return text if len(text) <= 60 else text[:57] + "..."


def printable(text: str) -> str:
    """A text with what a terminal would obey or hide escaped; lines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """What another library says first of what is wrong, or the kind of error where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextlib.contextmanager
def in_one_line(kind: type[TawnyError], text: Callable[[str], str]) -> Iterator[None]:
    """Say in one line how another library fails on a damaged file; `text` gets its words. Tawny's own errors pass."""
    try:
        yield
    except TawnyError:
        raise
    except Exception as error:
        raise kind(text(one_line(error))) from error


def one_line(error: Exception) -> str:
    """What another library says is wrong, short enough for a line; its kind says more than the value of a KeyError."""
    import textwrap

    said = textwrap.shorten(str(error), 300, placeholder=" …")
    return (
        f"{type(error).__name__}: {said}"
        if said and isinstance(error, LookupError)
        else said or type(error).__name__
    )
