"""`tawny export`: a checkpoint as the file of another runtime."""

from __future__ import annotations

from pathlib import Path

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, RECIPE, Model, option, path_named
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, size


def _file(text: str) -> Path:
    if not text.strip():
        raise typer.BadParameter("it is empty; give a file to write, such as ./model.gguf")
    return path_named(text)


@verb(
    "tawny export pruned --to gguf --out pruned.gguf",
    "tawny export pruned --to gguf --out pruned-q8.gguf --type Q8_0",
    "tawny export pruned --to gguf --out pruned.gguf --tokenizer-from original.gguf",
)
def export(
    model: Model,
    console: Console,
    *,
    to: str = option("--to RUNTIME", "gguf, for llama.cpp.", RECIPE, default=...),
    out: Path = option("--out FILE", "File to write.", OUTPUT, default=..., parser=_file),
    type: str | None = option(
        "--type TYPE",
        "F32, F16, BF16, Q8_0, Q5_0 or Q4_0. Default: as the weights are stored, and F32 for packed integers.",
        RECIPE,
    ),
    tokenizer_from: str | None = option(
        "--tokenizer-from FILE",
        "GGUF file whose tokenizer is taken. Default: the one the model came from, or else tokenizer.json.",
        RECIPE,
    ),
    overwrite: bool = option("--overwrite", "Replace an existing file.", OUTPUT, default=False),
) -> None:
    """Write MODEL as a file that another runtime opens. Zeros stay zeros; llama.cpp stores and multiplies them."""
    with console.progress() as progress:
        report = tawny.export(
            model, out, to, type, tokenizer_from=tokenizer_from, overwrite=overwrite, progress=progress
        )
    console.result(report.to_dict(), export_tables)


def export_tables(report: Result) -> list[Frame]:
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(report["types"].items()))
    rows = [
        ("size", f"{size(report['bytes'])} from {size(report['source_bytes'])}"),
        ("tensors", f"{report['tensors']}: {types}"),
        ("zeros", f"{report['zeros']:,}, all kept"),
        ("tokenizer", f"of {report['tokenizer']}"),
        ("time", duration(report["seconds"])),
        ("written", f"{report['out']} ({report['architecture']}), opened again and compared"),
    ]
    return [facts(rows)]
