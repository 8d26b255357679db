"""`tawny list`: recipes, and what a recipe can name."""

from __future__ import annotations

from typing import Annotated

import typer

from tawny.cli.common import console_for
from tawny.cli.options import AsJson
from tawny.cli.root import app
from tawny.errors import UserError


@app.command(
    "list", epilog="\b\nExamples:\n  tawny list\n  tawny list solvers\n  tawny list allocators --json"
)
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]", help="recipes, allocators, solvers, patterns, texts or keys. Default: all."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List recipes, and what a recipe can name: allocators, solvers, patterns, texts, and its keys."""
    with console_for(as_json) as console:
        from tawny.errors import nearest
        from tawny.recipe.catalogue import catalogue
        from tawny.tables import listing_tables

        listing = catalogue()
        if kind is not None:
            if kind not in listing:
                raise UserError(
                    f"nothing of the kind {kind!r} to list{nearest(kind, listing)}: {', '.join(listing)}"
                )
            listing = {kind: listing[kind]}
        console.result(listing, listing_tables)
