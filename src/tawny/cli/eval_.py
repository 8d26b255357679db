"""`tawny eval`: how good a model is."""

from __future__ import annotations

from typing import Annotated

import typer

from tawny.cli.common import check_device, console_for
from tawny.cli.options import DATA, OUTPUT, AsJson, Device, Model
from tawny.cli.root import app


@app.command(
    "eval",
    epilog="\b\nExamples:\n"
    "  tawny eval smollm2 --text wiki --windows 8\n"
    "  tawny eval pruned --text wikitext2 --seqlen 4096\n"
    "  tawny eval ./model --text notes.txt --seqlen 512 --json",
)
def eval_(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="c4, wikitext2, ptb, wiki, or a .txt/.jsonl file.",
            rich_help_panel=DATA,
        ),
    ] = "wikitext2",
    seqlen: Annotated[
        int, typer.Option("--seqlen", metavar="N", help="Tokens a window.", min=2, rich_help_panel=DATA)
    ] = 2048,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            metavar="N",
            help="How many from the start of the text. Default: all.",
            min=1,
            rich_help_panel=DATA,
        ),
    ] = None,
    compute: Annotated[
        str,
        typer.Option(
            "--compute", metavar="DTYPE", help="auto, float32, bfloat16 or float16.", rich_help_panel=OUTPUT
        ),
    ] = "auto",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL on a text, block by block: what can be pruned can be evaluated in the same memory."""
    with console_for(as_json) as console:
        if compute not in ("auto", "float32", "bfloat16", "float16"):
            from tawny.errors import RecipeError

            raise RecipeError(f"--compute {compute!r} is unknown: give auto, float32, bfloat16 or float16")
        check_device(device or "cpu")
        import tawny

        with console.watching() as watch:
            measured = tawny.evaluate(
                model,
                text,
                seqlen=seqlen,
                windows=windows,
                compute=compute,
                device=device or "cpu",
                watch=watch,
            ).to_dict()
        from tawny.tables import perplexity_tables

        console.result(measured, perplexity_tables)
