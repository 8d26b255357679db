"""What every measurement needs of a model: how it is opened, its tokenizer, and a fingerprint of its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tawny.calibration.writing import Author
from tawny.errors import ModelError
from tawny.model.checkpoint import Checkpoint, file_bytes, is_packed
from tawny.model.source import load_tokenizer, resolve
from tawny.model.stack import Stack, live_stack
from tawny.model.structure import predicts_tokens
from tawny.packed.opening import load, open_stack, without_bars
from tawny.precision import compute_dtype
from tawny.process_group import ProcessGroup
from tawny.progress import Progress, silent

# Written beside the weights, and no part of what the model computes.
_NOT_THE_MODEL = {"run.json", "journal.json", "report.json"}
_PART_OF_THE_MODEL = (".safetensors", ".json", ".model", ".txt", ".jinja", ".py")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights, configuration, tokenizer and code in a folder: same fingerprint, same model."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix not in _PART_OF_THE_MODEL or path.name in _NOT_THE_MODEL or not path.is_file():
            continue
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            hashlib.file_digest(file, lambda: digest)  # goes on with this one
    return digest.hexdigest()


def open_model(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The whole model in a folder, dense or packed, for forwards in `dtype`."""
    with without_bars():
        return load(folder, dtype=dtype, device=device)


def reads_on(source: str | Path | nn.Module) -> bool:
    """Whether a model predicts the next token of a text, without reading weights."""
    from transformers import AutoModelForCausalLM

    from tawny.model.skeleton import model_class, read_config

    if isinstance(source, nn.Module):
        return predicts_tokens(source)
    return bool(model_class(read_config(resolve(source))) is AutoModelForCausalLM)


def author_of(
    model: Path | nn.Module,
    tokenizer: Any,
    seed: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    memory: int | None = None,
    group: ProcessGroup | None = None,
    progress: Progress = silent,
) -> Author:
    """Who writes the text `self`: the model in a folder, opened when it is asked, or a live one."""
    if isinstance(model, nn.Module):
        held = sum(p.numel() * p.element_size() for p in model.parameters())
        return Author(lambda: model, tokenizer, None, held, seed, memory, group, progress)
    size = file_bytes(model) if is_packed(model) else Checkpoint(model).bytes_in(dtype)
    opened = partial(open_model, model, dtype, device)
    return Author(
        opened, tokenizer, lambda: f"{fingerprint(model)} {dtype}", size, seed, memory, group, progress
    )


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
