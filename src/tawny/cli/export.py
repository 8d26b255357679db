"""`tawny export`: a checkpoint as the file of another runtime."""

from __future__ import annotations

from pathlib import Path

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import DATA, OUTPUT, RECIPE, Model, option, path_named
from tawny.cli.root import verb
from tawny.gguf_kinds import GGUF_KINDS
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, size


def _file(text: str) -> Path:
    if not text.strip():
        raise typer.BadParameter("it is empty; give a file to write, such as ./model.gguf")
    return path_named(text)


@verb(
    "tawny export ./model --to gguf --out model-q4.gguf --type Q4_K --imatrix model.imatrix.gguf",
    "tawny export solved --to compressed-tensors --out small",
    "tawny export ./model --to imatrix --out model.imatrix.gguf --calibration wiki --samples 16 --seqlen 1024",
)
def export(
    model: Model,
    console: Console,
    *,
    to: str = option(
        "--to TARGET",
        "gguf, for llama.cpp; compressed-tensors, a folder for vLLM, SGLang and transformers; imatrix, the importance matrix of "
        "llama-quantize.",
        RECIPE,
        default=...,
    ),
    out: Path = option(
        "--out PATH", "File to write; of compressed-tensors a folder.", OUTPUT, default=..., parser=_file
    ),
    type: str | None = option(
        "--type TYPE",
        f"Of gguf: F32, F16, BF16, {', '.join(kind.type for kind in GGUF_KINDS.values())}. Default: what was solved for GGUF, else that of "
        "the template, or as the weights are stored, and F32 for packed integers. Of compressed-tensors: w4 or w8 for every linear. "
        "Default: what was solved.",
        RECIPE,
    ),
    group: int | None = option(
        "--group N",
        "Of compressed-tensors: columns that share a scale, 32, 64, 128, or -1, a row. Default: what was solved, or the most that "
        "divide the width.",
        RECIPE,
    ),
    tokenizer_from: str | None = option(
        "--tokenizer-from FILE",
        "Of gguf: file whose tokenizer is taken. Default: the one the model came from, or else tokenizer.json.",
        RECIPE,
    ),
    template: Path | None = option(
        "--template FILE",
        "Of gguf: whole file of the dense model, of any architecture; all but the changed matrices is kept.",
        RECIPE,
        parser=path_named,
    ),
    imatrix: Path | None = option(
        "--imatrix FILE",
        "Of gguf: importance matrix that weighs what rounding to --type loses; of --to imatrix or llama-imatrix.",
        RECIPE,
        parser=path_named,
    ),
    calibration: list[str] | None = option(
        "--calibration TEXT[=SHARE]",
        "Of imatrix: text to measure inputs on, as for `tawny prune`; repeatable. Default: c4.",
        DATA,
    ),
    samples: int | None = option("--samples N", "Windows of text. Default: 128.", DATA),
    seqlen: int | None = option("--seqlen N", "Tokens a window. Default: 2048.", DATA),
    overwrite: bool = option("--overwrite", "Replace an existing file.", OUTPUT, default=False),
) -> None:
    """Write MODEL as a file that another runtime opens. llama.cpp stores and multiplies zeros like other numbers."""
    with console.progress() as progress:
        report = tawny.export(
            model,
            out,
            to,
            type,
            group=group,
            tokenizer_from=tokenizer_from,
            template=template,
            imatrix=imatrix,
            calibration=calibration or None,
            samples=samples,
            seqlen=seqlen,
            overwrite=overwrite,
            progress=progress,
        )
    console.result(report.to_dict(), imatrix_tables if to == "imatrix" else export_tables)


def export_tables(report: Result) -> list[Frame]:
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(report["types"].items()))
    rows = [
        ("size", f"{size(report['bytes'])} from {size(report['source_bytes'])}"),
        ("tensors", f"{report['tensors']}: {types}"),
        ("zeros", f"{report['zeros']:,} kept"),
        ("tokenizer", f"of {report['tokenizer']}"),
        ("time", duration(report["seconds"])),
        ("written", f"{report['out']} ({report['architecture']}), opened again and compared"),
    ]
    return [facts(rows)]


def imatrix_tables(report: Result) -> list[Frame]:
    text = report["text"]
    unseen = (
        f"; no token reached {report['unseen']} experts, whose inputs count alike" if report["unseen"] else ""
    )
    rows = [
        ("measured", f"inputs of {report['tensors']} tensors{unseen}"),
        ("text", f"{text['name']}, {text['samples']} × {text['seqlen']} tokens"),
        ("time", duration(report["seconds"])),
        (
            "written",
            f"{report['out']}, {size(report['bytes'])}; llama-quantize --imatrix {report['out']} … reads it",
        ),
    ]
    return [facts(rows)]
