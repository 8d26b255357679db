"""`tawny compare`: any set of models side by side."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import tawny
from tawny.cli.common import check_file
from tawny.cli.console import Console
from tawny.cli.eval_ import DEFAULT_TEXT, TEXT, EvaluationOptions
from tawny.cli.options import OUTPUT, Threads, option, path_named
from tawny.cli.root import verb
from tawny.report.comparison import caption, compared, failures, to_html, to_markdown, write
from tawny.report.frames import Frame, Result, facts
from tawny.report.pages import or_say
from tawny.words import duration


@verb(
    "tawny compare smollm2 pruned packed --text wiki --windows 8",
    "tawny compare smollm2 pruned-50 pruned-60 --tasks owl7 --limit 50 --markdown table.md",
    "tawny compare ./dense ./pruned --text none --html speed.html --json",
)
def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Folders (dense or packed), hub ids, .gguf files, or smollm2."
        ),
    ],
    console: Console,
    *,
    asked: EvaluationOptions,
    text: str | None = option(
        "--text TEXT",
        "c4, wikitext2, ptb, wiki, a .txt/.jsonl file, images:DIR, sample, or none. "
        f"Default: {DEFAULT_TEXT}, none with --tasks.",
        TEXT,
    ),
    seqlen: int | None = option(
        "--seqlen N", "Tokens a window. Default: 2048, and 128 for encoders.", TEXT, min=2
    ),
    windows: int | None = option(
        "--windows N",
        "How many from the start of the text. Default: up to 20; of encoders up to 1000, or 100 pictures.",
        TEXT,
        min=1,
    ),
    no_speed: bool = option(
        "--no-speed", "Do not measure prefill and decoding speed.", OUTPUT, default=False
    ),
    threads: Threads = None,
    markdown: Path | None = option("--markdown FILE", "Also write a .md table.", OUTPUT, parser=path_named),
    html: Path | None = option(
        "--html FILE", "Also write a self-contained .html page.", OUTPUT, parser=path_named
    ),
) -> None:
    """Put models side by side: size, memory, quality and speed, each against the first."""
    check_file("--markdown", markdown, ".md")
    check_file("--html", html, ".html")
    text = text or ("none" if asked.tasks is not None else DEFAULT_TEXT)
    keys = asked.checked(text != "none", {"--windows": windows, "--seqlen": seqlen})
    with console.progress() as progress:
        result = tawny.compare(
            models,
            text=None if text == "none" else text,
            seqlen=seqlen,
            windows=windows,
            bos=asked.bos,
            labels=asked.labels,
            tasks=asked.tasks,
            task_data=asked.task_data,
            limit=asked.limit,
            speed=not no_speed,
            threads=threads,
            progress=progress,
            **keys,
        ).to_dict()
        for file, make in ((markdown, to_markdown), (html, to_html)):
            if file is not None and or_say(file, partial(write, result, file, make), progress):
                progress.say(f"written to {file}")
    console.result(result, compare_tables)


def compare_tables(result: Result) -> list[Frame]:
    """What `tawny compare` measured: a line a number, a column a model; the best of each line is bold."""
    rows = [("", sentence) for sentence in caption(result)]
    rows += [("missing", f"{model}: {part}: {why}") for model, part, why in failures(result)]
    rows.append(("time", duration(result["seconds"])))
    return [compared(result), facts(rows)]
