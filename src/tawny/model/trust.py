"""Whether code from a model's folder may run. It may not, unless the user asked for it.

transformers would ask on the terminal in the middle of a run. Tawny refuses in one line and names the option.

The answer is needed where a configuration, a model or a tokenizer is opened, many layers below the function that the
user called. A context variable carries it there. A parameter would have to pass through every layer between, and one
layer that forgot it would ask again. The answer holds during one call and what it calls; other threads start with no.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import ParamSpec, TypeVar

from tawny.errors import ModelError

P = ParamSpec("P")
R = TypeVar("R")
_trusted: ContextVar[bool] = ContextVar("tawny_trust_remote_code", default=False)


def trusted() -> bool:
    """Whether code from a model's folder may run here."""
    return _trusted.get()


@contextlib.contextmanager
def trusting(asked_for: bool) -> Iterator[None]:
    """Inside, code may run if it was asked for here or further out."""
    token = _trusted.set(asked_for or trusted())
    try:
        yield
    finally:
        _trusted.reset(token)


def opens_models(function: Callable[P, R]) -> Callable[P, R]:
    """Give a public function's keyword `trust_remote_code` its meaning; the function itself need not look at it."""

    @functools.wraps(function)
    def opening(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(kwargs.get("trust_remote_code") is True):
            return function(*args, **kwargs)

    return opening


@contextlib.contextmanager
def refusing_code(folder: Path) -> Iterator[None]:
    """Turn transformers' refusal to run a folder's code into one line.

    Raises:
        ModelError: the folder needs code of its own, and nobody asked for it.
    """
    try:
        yield
    except ValueError as error:
        if trusted() or "trust_remote_code" not in str(error):
            raise
        raise ModelError(
            f"{folder} needs code of its own, which can do anything on this machine; read it, then pass "
            "--trust-remote-code (in Python trust_remote_code=True)"
        ) from error
