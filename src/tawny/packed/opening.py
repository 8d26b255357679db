"""Open a folder, dense, quantised or packed, the same way for all: as a transformers model (`tawny.load`), or block by block.

Weights that another library quantised are decoded. Other tensors stay where safetensors maps them: a page of a weight is resident once it is touched, and shared between
processes that load the same folder. A packed folder is checked before its model is handed out. No model is handed
out with a weight that no file holds: transformers would fill it with random numbers and only log it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tawny.errors import CheckpointError, ModelError, TawnyError, UserError, one_line
from tawny.machine import check_device
from tawny.model.checkpoint import Checkpoint, computed_in, file_bytes, is_packed
from tawny.model.quantised import settings_of
from tawny.model.source import resolve
from tawny.model.stack import Stack
from tawny.model.tensorfile import natural
from tawny.model.trust import opens_models, refusing_code, trusted
from tawny.packed.folder import PackedCheckpoint, PackedFolder
from tawny.precision import DTYPES, forward_dtype


def open_checkpoint(folder: Path) -> Checkpoint:
    """The weights of a folder; those of a packed one come back dense, a tensor at a time."""
    return PackedCheckpoint(folder) if is_packed(folder) else Checkpoint(folder)


def loaded_bytes(folder: Path) -> int:
    """Bytes of the tensors of a folder when its whole model is in memory."""
    return file_bytes(folder) if is_packed(folder) else Checkpoint(folder).bytes_in(None)


def open_stack(
    folder: Path,
    compute: torch.dtype | None = None,
    device: str = "cpu",
    changes: Mapping[str, Any] | None = None,
) -> Stack:
    """The checkpoint in `folder` as a stack; only what is outside the blocks is read.

    Args:
        changes: settings that take the place of config.json's; biases that only they ask for are zero.

    Raises:
        ModelError: neither decoder nor encoder, or a configuration that cannot be used.
        CheckpointError: files are missing, truncated or do not fit the configuration.
        MissingFeature: this machine lacks the device.
    """
    from tawny.model.skeleton import open_skeleton

    check_device(device)
    checkpoint = open_checkpoint(folder)
    dtype = compute or forward_dtype(device)
    checkpoint.zero_biases = bool(changes)
    return Stack(open_skeleton(folder, dtype, changes), checkpoint, dtype, device)


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Inside, transformers and the hub draw no bars: stderr belongs to our own progress."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@opens_models
def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    verify: bool = True,
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> Any:
    """A transformers model in eval mode from a dense, quantised or packed folder, hub id, `.gguf` file or `smollm2`.

    What another library quantised is decoded and dense.

    Args:
        dtype: type of everything that is not packed, and of activations; the checkpoint's own if None.
        verify: False skips the hashes of a packed folder; its shapes, offsets and masks are checked always.
        device: where the model goes.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        CheckpointError: a packed folder is damaged, or weights of the model are in no file: names the tensor.
        ModelError: the folder cannot be opened as a decoder or an encoder.
        MissingFeature: this machine lacks the device.
        UserError: an unknown dtype.
    """
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise UserError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
        dtype = DTYPES[dtype]
    check_device(device)
    folder = resolve(source)
    packed = is_packed(folder)
    from tawny.model.skeleton import model_class, read_config
    from tawny.packed.quantizer import verification

    if packed:
        PackedFolder(folder)  # names what is wrong with an index that transformers would stumble over
    config = read_config(folder)
    kind, named = model_class(config), config.to_dict().get("transformers_weights")
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"{folder} names {named!r} as its weights (transformers_weights in config.json), expected a safetensors file"
        )
    if not packed and settings_of(folder) is not None:
        return _decoded(folder, dtype, device)
    try:
        with verification(hashes=verify), refusing_code(folder):
            model, report = kind.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,  # of other names than its own, transformers would rather take a pickle beside them
                output_loading_info=True,
                trust_remote_code=trusted(),
            )
    except TawnyError:
        raise
    except Exception as error:  # a wrong value fails wherever a model happens to use it
        reason = one_line(error)
        said = CheckpointError if packed else ModelError
        raise said(f"{source} cannot be opened: {reason}") from error
    if absent := sorted(report["missing_keys"], key=natural):
        raise CheckpointError(
            f"{source} lacks {len(absent)} weights of the model, first {', '.join(map(repr, absent[:3]))}; "
            + ("pack the model again" if packed else "fetch the checkpoint again")
        )
    model.requires_grad_(False)
    return model.eval().to(device)


def load_quietly(folder: Path, dtype: torch.dtype, device: str = "cpu") -> Any:
    """The whole model in a folder, dense or packed, for forwards in `dtype`; no bars are drawn."""
    with without_bars():
        return load(folder, dtype=dtype, device=device)


def _decoded(folder: Path, dtype: torch.dtype | None, device: str) -> Any:
    """The dense model that a quantised checkpoint stands for."""
    from transformers import GenerationConfig

    model = open_stack(folder, dtype or computed_in(folder), device).whole()
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device)
