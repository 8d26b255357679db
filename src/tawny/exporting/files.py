"""What an export wrote, and what it may not overwrite."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tawny.errors import OutputError
from tawny.model.source import gguf_behind
from tawny.record import record_in
from tawny.run.place import same_place


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        types: how many tensors have each type.
        bytes, source_bytes: of the file, and of the tensors it was made from.
        zeros: exact zeros of the matrices that the file keeps.
    """

    source: str
    out: str
    to: str
    architecture: str
    tokenizer: str
    types: dict[str, int]
    tensors: int
    bytes: int
    source_bytes: int
    zeros: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_out(out: Path, overwrite: bool, *files: str | Path | None) -> None:
    """Refuse an `out` that is a folder, that exists and may not be replaced, or that is one of the `files` it reads.

    Raises:
        OutputError: it is.
    """
    if out.is_dir():
        raise OutputError(
            f"{out} is a folder; expected a file to write: give --out a name such as {out / 'model.gguf'}"
        )
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
    if any(file is not None and same_place(out, Path(file)) for file in files):
        raise OutputError(
            f"{out} is a file that the export reads; a source is never overwritten: choose another --out"
        )


def check_apart(out: Path, folder: Path) -> None:
    """Refuse an `out` that is a file of the model in `folder`, or the GGUF file that this came from; raises as `check_out` does."""
    check_out(out, True, *(folder.resolve() / x.name for x in folder.iterdir()), origin(folder))


def origin(folder: Path) -> Path | None:
    """The GGUF file that a pruned folder was made from, as its record says, if it is still there."""
    source = record_in(folder).get("source")
    return gguf_behind(source) if isinstance(source, str) else None
