"""`tawny bench`: how fast and how small a model is on this machine."""

from __future__ import annotations

from typing import Annotated

import typer

from tawny.cli.common import console_for
from tawny.cli.options import DATA, AsJson, Model, Threads, TrustRemoteCode
from tawny.cli.root import app


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny bench smollm2\n"
    "  tawny bench packed --prompt-tokens 512 --tokens 64 --threads 2\n"
    "  tawny bench packed --json | jq .decode_tokens_per_second"
)
def bench(
    model: Model,
    prompt_tokens: Annotated[
        int,
        typer.Option(
            "--prompt-tokens", metavar="N", help="Tokens of the prompt.", min=1, rich_help_panel=DATA
        ),
    ] = 128,
    tokens: Annotated[
        int,
        typer.Option("--tokens", metavar="N", help="Tokens decoded in a round.", min=1, rich_help_panel=DATA),
    ] = 32,
    rounds: Annotated[
        int,
        typer.Option(
            "--rounds",
            metavar="N",
            help="Measured rounds, after one to warm up.",
            min=1,
            rich_help_panel=DATA,
        ),
    ] = 5,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure decoding, prefill, memory and file size of MODEL, dense or packed."""
    with console_for(as_json) as console:
        import tawny

        with console.progress() as progress:
            measured = tawny.bench(
                model,
                prompt_tokens=prompt_tokens,
                tokens=tokens,
                rounds=rounds,
                threads=threads,
                progress=progress,
            ).to_dict()
        from tawny.tables import speed_tables

        console.result(measured, speed_tables)
