"""`tawny list`: recipes, and what a recipe can name."""

from __future__ import annotations

from typing import Annotated

import typer

from tawny.cli.console import Console
from tawny.cli.root import verb
from tawny.errors import UserError, nearest
from tawny.report.frames import Frame, Result, table


@verb("tawny list", "tawny list solvers", "tawny list allocators --json", name="list", code=False)
def list_(
    console: Console,
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="[KIND]", help="recipes, allocators, solvers, patterns, texts or keys. Default: all."
        ),
    ] = None,
) -> None:
    """List recipes, and what a recipe can name: allocators, solvers, patterns, texts, and its keys."""
    from tawny.recipe.catalogue import catalogue

    listing = catalogue()
    if kind is not None:
        if kind not in listing:
            raise UserError(
                f"nothing of the kind {kind!r} to list{nearest(kind, listing)}: {', '.join(listing)}"
            )
        listing = {kind: listing[kind]}
    console.result(listing, listing_tables)


def listing_tables(listing: Result) -> list[Frame]:
    """One table a kind of choice."""
    tables = []
    for kind, entries in listing.items():
        optioned = any(entry.get("options") for entry in entries)
        heads = ("name", *(["options"] if optioned else []), "what it is")
        frame = table(*heads, title=kind, left=range(len(heads)))
        for entry in entries:
            options = entry.get("options", {}).items()
            shown = " ".join(f"{key}={'none' if value is None else value}" for key, value in options)
            frame.add(entry["name"], *([shown] if optioned else []), entry["summary"])
        tables.append(frame)
    return tables
