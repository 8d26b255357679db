"""`tawny push`: a finished folder onto the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, option
from tawny.cli.root import verb
from tawny.report.frames import Frame, Result, facts, table
from tawny.words import size


@verb(
    "tawny push pruned someone/smollm2-owl-50 --dry-run",
    "tawny push pruned someone/smollm2-owl-50 --private",
    "tawny push small.gguf someone/smollm2-small-gguf",
    code=False,
)
def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that prune, pack or recover finished, or a GGUF file of a fit."
        ),
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face hub.")],
    console: Console,
    *,
    dry_run: bool = option(
        "--dry-run", "Check the folder and its card and list the files; no network.", OUTPUT, default=False
    ),
    private: bool = option("--private", "Make a new repository private.", OUTPUT, default=False),
    message: str | None = option("--message TEXT", "Message of the commit.", OUTPUT),
) -> None:
    """Upload a finished model to the Hugging Face hub, with its card and report."""
    from tawny.report.push import push as push_folder

    with console.progress() as progress:
        report = push_folder(
            folder, repo, private=private, dry_run=dry_run, message=message, progress=progress
        ).to_dict()
    console.result(report, push_tables)


def push_tables(report: Result) -> list[Frame]:
    """What was, or would be, uploaded."""
    frame = table("file", "size")
    for name, count in report["files"].items():
        frame.add(name, size(count))
    done = report["url"] or f"nothing was uploaded: the folder and its card are fit for {report['repo']}"
    rows = [("in all", size(report["bytes"])), *(("note", note) for note in report["notes"])]
    return [frame, facts([*rows, ("dry run" if report["dry_run"] else "uploaded", done)])]
