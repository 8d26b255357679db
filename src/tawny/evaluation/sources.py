"""What every measurement needs of a model: its stack of blocks, and one tokenizer for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tawny.errors import ModelError
from tawny.model.source import load_tokenizer, resolve
from tawny.model.stack import Stack, live_stack
from tawny.model.structure import predicts_tokens
from tawny.packed.opening import open_stack
from tawny.precision import compute_dtype


def name_of(source: str | Path | nn.Module) -> str:
    """What a result calls a model: as it was given, or the class of a live one."""
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)


def reads_on(source: str | Path | nn.Module) -> bool:
    """Whether a model predicts the next token of a text, without reading weights."""
    from transformers import AutoModelForCausalLM

    from tawny.model.skeleton import model_class, read_config

    if isinstance(source, nn.Module):
        return predicts_tokens(source)
    return bool(model_class(read_config(resolve(source))) is AutoModelForCausalLM)


def open_stack_of(
    source: str | Path | nn.Module,
    compute: str = "auto",
    device: str = "cpu",
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Stack, Path | None]:
    """A model as a stack of blocks, and its folder if it has one, which is read one block at a time.

    A live module keeps its own dtype and device.
    """
    dtype = compute_dtype(compute, device)
    if isinstance(source, nn.Module):
        return live_stack(source), None
    folder = resolve(source, say)
    return open_stack(folder, dtype, device), folder


# Letters, digits, signs, white space and scripts: where vocabularies differ, some of this falls apart differently.
_PROBE = "The quick brown fox, 3.1415926535 %\n\n\tdef f(x): return x**2  # straße, наука, 水 🦉 don't"


def shared_tokenizer(folders: Sequence[Path]) -> Any:
    """The tokenizer of one folder, or of two that have the same.

    Raises:
        ModelError: no folder, or two that differ.
    """
    if not folders:
        raise ModelError(
            "a live model needs tokenizer=… to read a text; or give tokens [windows, seqlen] in its place"
        )
    known = [load_tokenizer(folder) for folder in folders]
    first, last = known[0], known[-1]
    if len(known) > 1 and (
        first.get_vocab() != last.get_vocab() or first(_PROBE)["input_ids"] != last(_PROBE)["input_ids"]
    ):
        raise ModelError(
            f"{folders[0]} and {folders[-1]} have different tokenizers, so their next tokens cannot agree: "
            "compare their bits per byte instead"
        )
    return last
