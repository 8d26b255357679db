"""A model made ready to be decoded: opened, its memory counted, its plain linears run by our kernels.

`ready` may be entered by any number of sequences of one model at once, in any threads. The first puts the kernels in
place, the last takes them out again. Between steps nothing is locked and nothing of torch is changed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from tawny.decoding.swapped import kernels
from tawny.errors import ModelError, RecipeError
from tawny.machine import resident_memory
from tawny.model.structure import evaluating, predicts_tokens
from tawny.packed.opening import load, without_bars


@dataclass(frozen=True)
class Opened:
    """A causal model, and the process's memory before it was opened."""

    model: Any
    before: int

    def added(self) -> int:
        """Bytes that the model has added to the process so far."""
        return max(0, resident_memory() - self.before)


def open_model(source: Path | nn.Module, dtype: str | None = None) -> Opened:
    """A folder (dense or packed), in its own dtype or another, or a live model as it is."""
    if isinstance(source, nn.Module):
        return Opened(source, resident_memory())
    with without_bars():  # they would run through the text
        _import_code(source)
        before = resident_memory()
        return Opened(load(source, dtype=dtype), before)


def _import_code(folder: Path) -> None:
    """Import what opening the model will import, so that memory measured afterwards is the model's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from tawny.model.skeleton import model_class, read_config

    with contextlib.suppress(Exception):  # whatever is wrong with the folder, opening it says so better
        config = read_config(folder)
        model_class(config)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Inside, torch uses so many threads, or as many as before if None."""
    if count is not None and count < 1:
        raise RecipeError(f"threads {count} is not possible; give 1 or more")
    before = torch.get_num_threads()
    changes = count not in (None, before)  # setting the same number would still cost oneDNN its cache
    if changes:
        torch.set_num_threads(count)  # type: ignore[arg-type]
    try:
        yield torch.get_num_threads()
    finally:
        if changes:
            torch.set_num_threads(before)


@contextlib.contextmanager
def alone(lock: contextlib.AbstractContextManager[object], count: int | None) -> Iterator[None]:
    """Inside, a step of one sequence: others wait, nothing is recorded for gradients, and torch has its threads."""
    with lock, torch.inference_mode(), threads(count):
        yield


class _Ready:
    """How many decode a model, and what undoes its being ready."""

    def __init__(self) -> None:
        self.lock, self.users, self.undo = threading.RLock(), 0, contextlib.ExitStack()


_all: WeakKeyDictionary[nn.Module, _Ready] = WeakKeyDictionary()
_locking = threading.Lock()


def check_predicts(model: nn.Module) -> None:
    """Raise a ModelError for a model that predicts no next token."""
    if not predicts_tokens(model):
        raise ModelError(
            f"{type(model).__name__} predicts no next token and so decodes nothing: `tawny bench` and tawny.latency say how long a "
            "batch takes"
        )


@contextlib.contextmanager
def ready(model: nn.Module) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """Inside, a model is in eval mode and runs our kernels. Its forwards must be run under the lock that this gives.

    One forward a model at a time: the proof of the quick path hooks its modules.

    Raises:
        ModelError: the model predicts no next token.
    """
    check_predicts(model)
    with _locking:
        shared = _all.setdefault(model, _Ready())
    with shared.lock:
        if not shared.users:
            with contextlib.ExitStack() as stack:
                stack.enter_context(evaluating(model))
                stack.enter_context(kernels(model))
                shared.undo = stack.pop_all()
        shared.users += 1
    try:
        yield shared.lock
    finally:
        with shared.lock:
            shared.users -= 1
            if not shared.users:
                shared.undo.close()
