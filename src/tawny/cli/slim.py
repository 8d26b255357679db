"""`tawny slim`: the smaller dense checkpoint that is left without zero channels, heads and blocks."""

from __future__ import annotations

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Model, Out, Overwrite, option
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, size


@verb(
    "tawny slim pruned --out slim",
    "tawny slim pruned --out slim --multiple 64",
    "tawny pack slim --out packed --values int8",
)
def slim(
    model: Model,
    console: Console,
    *,
    out: Out,
    multiple: int = option(
        "--multiple N", "Keep a multiple of N channels in each block, such as 64 for a GPU", RECIPE, 1, min=1
    ),
    overwrite: Overwrite = False,
) -> None:
    """Cut the zero channels, heads and blocks out of MODEL, and write the smaller dense checkpoint."""
    with console.progress() as progress:
        report = tawny.slim(model, out, multiple=multiple, overwrite=overwrite, progress=progress)
    console.result(report.to_dict(), slim_tables)


def slim_tables(report: Result) -> list[Frame]:
    ranges = {}
    for key in sorted({key for block in report["widths"] for key in block}):
        values = [block[key] for block in report["widths"] if key in block]
        ranges[key] = f"{values[0]}" if min(values) == max(values) else f"{min(values)} to {max(values)}"
    opens = (
        "plain transformers, and whatever opens the source"
        if report["same_widths"]
        else "tawny, and transformers after `import tawny`: blocks differ in width"
    )
    left, gone = len(report["widths"]), len(report["dropped"])
    rows = [
        *([("blocks", f"{left} of {left + gone}")] if gone else []),
        ("parameters", f"{report['parameters']:,} of {report['source_parameters']:,}"),
        ("size", f"{size(report['bytes'])} from {size(report['source_bytes'])}"),
        ("widths", ", ".join(f"{key} {text}" for key, text in ranges.items())),
        ("logits", f"{report['apart']:.1g} apart from the source's"),
        ("opens in", opens),
        ("time", duration(report["seconds"])),
        ("written", report["out"]),
    ]
    return [facts(rows)]
