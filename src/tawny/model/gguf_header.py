"""How a GGUF file is opened: what `gguf` raises on a damaged one becomes one line."""

from __future__ import annotations

__all__ = ["open_gguf", "refusing"]

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tawny.errors import CheckpointError, in_one_line


def refusing(what: str) -> AbstractContextManager[None]:
    """The readers of GGUF files were written for whole ones."""
    return in_one_line(
        CheckpointError, lambda said: f"{what} ({said}); fetch it again, or give a safetensors folder"
    )


def open_gguf(path: Path) -> Any:
    """A `gguf.GGUFReader` of the file.

    Raises:
        CheckpointError: it is not a GGUF file.
    """
    from gguf import GGUFReader

    with refusing(f"{path} cannot be opened as a GGUF model"):
        return GGUFReader(str(path))
