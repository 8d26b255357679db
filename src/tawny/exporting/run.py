"""`export`: a checkpoint as the file of another runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tawny.errors import UserError, nearest
from tawny.exporting.compressed import TARGET, export_compressed
from tawny.exporting.files import ExportReport
from tawny.exporting.gguf import export_gguf
from tawny.exporting.imatrix import ImatrixReport, export_imatrix
from tawny.exporting.through import export_through
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent
from tawny.run.place import place_of

# Target → what writes it, and the options that it takes.
EXPORTERS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "gguf": (export_gguf, ("type", "tokenizer_from", "template", "imatrix")),
    TARGET: (export_compressed, ("type", "group")),
    "imatrix": (export_imatrix, ("calibration", "samples", "seqlen")),
}


@opens_models
def export(
    source: str | Path,
    out: str | Path,
    to: str = "gguf",
    type: str | None = None,
    *,
    group: int | None = None,
    tokenizer_from: str | Path | None = None,
    template: str | Path | None = None,
    imatrix: str | Path | None = None,
    calibration: Any = None,
    samples: int | None = None,
    seqlen: int | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> ExportReport | ImatrixReport:
    """Write a checkpoint as a file that another runtime opens.

    Args:
        source: a folder (dense, quantised or packed), hub id, `.gguf` file or `smollm2`.
        out: file to write; of `compressed-tensors` a folder.
        to: `gguf`, for llama.cpp; `compressed-tensors`, a folder for vLLM, SGLang and transformers; or `imatrix`, the importance matrix of
            llama.cpp's `llama-quantize`. That one is measured on a text. It holds the mean square of each input of every linear, for
            experts one by one.
        type: of the matrices of `gguf`: F32, F16 or BF16, or a type in blocks such as Q4_K, to which they are rounded by its best
            scales. Then the embedding and the head get at least Q6_K, and a width that no block divides another type.
            None keeps the type that they are stored in, and copies what was solved for GGUF (`tawny prune --values q4_k`).
            Of `compressed-tensors`: w4 or w8, which all linears are rounded to by best scales; None takes what was solved for it.
        group: columns that share a scale in `compressed-tensors`: 32, 64, 128 or -1, a row. None: what was solved, or the most that
            divide the width.
        tokenizer_from: a GGUF file (or `smollm2`) whose tokenizer is taken; None takes that of the GGUF file the model came
            from, or makes it from `tokenizer.json`.
        template: a GGUF file of the same dense model (F32, F16, BF16 or Q8_0), of any architecture: its keys, its tokenizer and all
            tensors but the changed matrices are kept. Without a `type`, matrices keep that of the template. A pruned folder's
            `run.json` says which dense model it was made from.
        imatrix: a file of `--to imatrix` or of `llama-imatrix`: how much the error of each input counts where `gguf` is rounded.
        calibration, samples, seqlen: what an `imatrix` is measured on, as for `tawny.prune`; None: 128 windows of 2,048 tokens of c4.
        overwrite: replace an existing file.
        progress: told how far the work is.
        trust_remote_code: let code that lies in a model's folder run.

    Raises:
        ModelError: llama.cpp has no architecture for it that Tawny writes, no name for a linear, or its tokenizer is not known; or the
            template is of another model.
        TextError: the calibration text cannot be had or is too short.
        UserError: an unknown target or type, an option that the target does not take, or a type without a zero for a model with many.
        OutputError: `out` exists or cannot be written.
        CheckpointError: the folder is damaged, or the importance matrix is of another model.
    """
    if to not in EXPORTERS:
        raise UserError(
            f"--to {to!r} is not known{nearest(to, EXPORTERS)}; choose one of {', '.join(EXPORTERS)}"
        )
    exporter, takes = EXPORTERS[to]
    options = {
        "type": type,
        "group": group,
        "tokenizer_from": tokenizer_from,
        "template": template,
        "imatrix": imatrix,
        "calibration": calibration,
        "samples": samples,
        "seqlen": seqlen,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [f"--{name.replace('_', '-')}" for name in given if name not in takes]:
        raise UserError(
            f"--to {to} takes no {' and no '.join(wrong)}: leave {'it' if len(wrong) == 1 else 'them'} out"
        )
    if template is not None:
        if tokenizer_from is not None:
            raise UserError("--template brings its own tokenizer; leave out --tokenizer-from")
        exporter = export_through
    report: ExportReport | ImatrixReport = exporter(
        source, place_of(out), **given, overwrite=overwrite, progress=progress
    )
    return report
