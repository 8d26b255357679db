"""`tawny pack`: a checkpoint with zeros becomes a file without them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tawny.cli.common import console_for
from tawny.cli.options import (
    OUTPUT,
    RECIPE,
    AsJson,
    Model,
    Overwrite,
    TrustRemoteCode,
    folder_named,
    packed_values,
)
from tawny.cli.root import app


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny pack pruned --out packed\n"
    "  tawny pack pruned --out packed --values int8 --head int8\n"
    "  tawny pack pruned --out packed --values int8 --group 128 --json"
)
def pack(
    model: Model,
    *,
    values: Annotated[
        str,
        typer.Option(
            "--values",
            metavar="KIND",
            help="Surviving weights as bf16, f16, f32 or int8.",
            rich_help_panel=RECIPE,
        ),
    ] = "bf16",
    group: Annotated[
        int | None,
        typer.Option(
            "--group",
            metavar="128",
            help="With int8: a scale for each 128 columns instead of one a row.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            "--head",
            metavar="KIND",
            help="Pack the head too, int8 say; a tied embedding is then served from it.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder to write.", parser=folder_named, rich_help_panel=OUTPUT
        ),
    ],
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Pack MODEL: a bit mask and the surviving values instead of matrices full of zeros."""
    with console_for(as_json) as console:
        import tawny

        with console.progress() as progress:
            report = tawny.pack(
                model,
                out,
                packed_values(values),
                group,
                None if head is None else packed_values(head),
                overwrite=overwrite,
                progress=progress,
            )
        from tawny.report.publish import refresh
        from tawny.tables import pack_tables

        refresh(out)

        console.result(report.to_dict(), pack_tables)
