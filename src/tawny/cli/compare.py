"""`tawny compare`: any set of models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tawny.cli.common import check_file, console_for
from tawny.cli.eval_ import DEFAULT_TEXT, TASKS, TEXT, Bos, Compute, Limit, TaskFolder, Tasks, check_compute
from tawny.cli.options import OUTPUT, AsJson, Device, Threads, TrustRemoteCode
from tawny.cli.root import app
from tawny.machine import check_device


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny compare smollm2 pruned packed --text wiki --windows 8\n"
    "  tawny compare smollm2 pruned-50 pruned-60 --tasks owl7 --limit 50 --markdown table.md\n"
    "  tawny compare ./dense ./pruned --text none --html speed.html --json"
)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders (dense or packed), hub ids, .gguf files, or smollm2."
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="c4, wikitext2, ptb, wiki, a .txt/.jsonl file, or none.",
            rich_help_panel=TEXT,
        ),
    ] = DEFAULT_TEXT,
    seqlen: Annotated[
        int, typer.Option("--seqlen", metavar="N", help="Tokens a window.", min=2, rich_help_panel=TEXT)
    ] = 2048,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            metavar="N",
            help="How many from the start of the text. Default: up to 20.",
            min=1,
            rich_help_panel=TEXT,
        ),
    ] = None,
    bos: Bos = None,
    tasks: Tasks = None,
    task_data: TaskFolder = None,
    limit: Limit = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Ask again what was asked before.", rich_help_panel=TASKS)
    ] = False,
    no_speed: Annotated[
        bool, typer.Option("--no-speed", help="Leave prefill and decoding speed out.", rich_help_panel=OUTPUT)
    ] = False,
    threads: Threads = None,
    compute: Compute = "auto",
    device: Device = None,
    markdown: Annotated[
        Path | None,
        typer.Option("--markdown", metavar="FILE", help="Also write a .md table.", rich_help_panel=OUTPUT),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Also write a self-contained .html page.", rich_help_panel=OUTPUT
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Put models side by side: size, memory, quality and speed, each against the first."""
    with console_for(as_json) as console:
        check_compute(compute)
        check_file("--markdown", markdown, ".md")
        check_file("--html", html, ".html")
        check_device(device or "cpu")
        import tawny
        from tawny.report.comparison import to_html, to_markdown, write

        with console.progress() as progress:
            result = tawny.compare(
                models,
                text=None if text == "none" else text,
                seqlen=seqlen,
                windows=windows,
                bos=bos,
                tasks=tasks,
                task_data=task_data,
                limit=limit,
                speed=not no_speed,
                threads=threads,
                compute=compute,
                device=device or "cpu",
                cache=not no_cache,
                progress=progress,
            ).to_dict()
        from tawny.tables import compare_tables

        console.result(result, compare_tables)
        for file, make in ((markdown, to_markdown), (html, to_html)):
            if file is not None:
                write(result, file, make)
                console.note(f"written to {file}")
