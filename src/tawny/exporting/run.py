"""`export`: a checkpoint as the file of another runtime."""

from __future__ import annotations

__all__ = ["EXPORTERS", "export"]

from pathlib import Path

from tawny.errors import UserError, nearest
from tawny.exporting.gguf import ExportReport, export_gguf
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.run.place import place_of

EXPORTERS = {"gguf": export_gguf}


@opens_models
def export(
    source: str | Path,
    out: str | Path,
    to: str = "gguf",
    type: str | None = None,
    *,
    tokenizer_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> ExportReport:
    """Write a checkpoint as a file that another runtime opens.

    Args:
        source: a folder (dense, quantised or packed), hub id, `.gguf` file or `smollm2`.
        out: file to write.
        to: `gguf`, for llama.cpp.
        type: of the matrices: F32, F16, BF16, Q8_0, Q5_0 or Q4_0; None keeps the one they are stored in. With Q5_0 and Q4_0 the
            embedding and the head are Q8_0; matrices whose width is not a multiple of 32 are F16 then.
        tokenizer_from: a GGUF file (or `smollm2`) whose tokenizer is taken; None takes that of the GGUF file the model came
            from, or makes it from `tokenizer.json`.
        overwrite: replace an existing file.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: llama.cpp has no architecture for it that Tawny writes, or its tokenizer is not known.
        UserError: an unknown runtime or type.
        OutputError: `out` exists or cannot be written.
        CheckpointError: the folder is damaged.
    """
    if to not in EXPORTERS:
        raise UserError(
            f"--to {to!r} is not known{nearest(to, EXPORTERS)}; choose one of {', '.join(EXPORTERS)}"
        )
    return EXPORTERS[to](
        source, place_of(out), type, tokenizer=tokenizer_from, overwrite=overwrite, progress=progress
    )
