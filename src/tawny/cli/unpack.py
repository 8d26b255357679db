"""`tawny unpack`: the dense checkpoint a packed folder was made from."""

from __future__ import annotations

from typing import Annotated

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import Out, Overwrite
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, size


@verb(
    "tawny unpack packed --out dense",
    "tawny unpack owner/packed-model --out dense",
    "tawny unpack packed --out dense --overwrite --json",
    code=False,
)
def unpack(
    packed: Annotated[
        str, typer.Argument(metavar="PACKED", help="Folder or hub id that `tawny pack` wrote.")
    ],
    console: Console,
    *,
    out: Out,
    overwrite: Overwrite = False,
) -> None:
    """Write the dense checkpoint PACKED was made from; plain transformers opens it."""
    with console.progress() as progress:
        report = tawny.unpack(packed, out, overwrite=overwrite, progress=progress)
    from tawny.report.publish import refresh

    refresh(out)
    console.result(report.to_dict(), unpack_tables)


def unpack_tables(report: Result) -> list[Frame]:
    exact = (
        "identical to the checkpoint that was packed, bit for bit"
        if report["exact"]
        else "as the packed values stand for them; what rounding took does not come back"
    )
    rows = [
        ("size", f"{size(report['bytes'])} from {size(report['source_bytes'])} packed"),
        ("weights", exact),
        ("time", duration(report["seconds"])),
        ("written", report["out"]),
    ]
    return [facts(rows)]
