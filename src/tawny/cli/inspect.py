"""`tawny inspect`: what a checkpoint really holds."""

from __future__ import annotations

import tawny
from tawny.cli.console import Console
from tawny.cli.options import Model
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts, table
from tawny.words import percent, size


@verb("tawny inspect pruned", "tawny inspect smollm2", "tawny inspect pruned --json | jq '.sparsity'")
def inspect(model: Model, console: Console) -> None:
    """Show what a checkpoint really holds, linear by linear: zeros, n:m patterns, ties."""
    with console.progress() as progress:
        inspection = tawny.inspect(model, progress=progress).to_dict()
    console.result(inspection, inspection_tables)


def inspection_tables(inspection: Result) -> list[Frame]:
    frame = table("linear", "shape", "zeros", "sparsity", "pattern", "ties", left=(0, 4))
    for linear in inspection["linears"]:
        frame.add(
            linear["name"],
            "×".join(map(str, linear["shape"])),
            f"{linear['zeros']:,}",
            percent(linear["sparsity"]),
            linear["pattern"],
            f"{linear['ties']:,}",
        )
    tied = ", head tied to the embedding" * inspection["tied_head"]
    rows = [
        ("sparsity", f"{percent(inspection['sparsity'])} of {inspection['prunable']:,} prunable weights"),
        ("linears", f"{len(inspection['linears'])} in {inspection['blocks']} blocks"),
        ("parameters", f"{inspection['parameters']:,}{tied}"),
        ("files", f"{size(inspection['bytes'])}, stored as {inspection['stored']}"),
    ]
    rows += [("dense", line) for line in inspection["dense"]]
    return [frame, facts(rows)]
