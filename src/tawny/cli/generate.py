"""`tawny generate`: text from a model, dense or packed, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from tawny.cli.common import console_for
from tawny.cli.options import RECIPE, AsJson, Model, Threads, TrustRemoteCode
from tawny.cli.root import app


def _possible_seed(seed: int) -> int:
    if not 0 <= seed < 2**63:
        raise typer.BadParameter(f"{seed} given, expected 0 to {2**63 - 1}")
    return seed


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny generate smollm2 'The capital of France is'\n"
    "  tawny generate packed 'Write a poem about owls.' --max-tokens 200 --temperature 0.8 --seed 1\n"
    "  tawny generate packed 'Once upon a time' --no-chat --json"
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")],
    max_tokens: Annotated[
        int,
        typer.Option(
            "-n", "--max-tokens", metavar="N", help="Most tokens to make.", min=1, rich_help_panel=RECIPE
        ),
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "-t", "--temperature", metavar="T", help="0 takes the likeliest token.", rich_help_panel=RECIPE
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            "--top-p", metavar="P", help="Draw from the likeliest P of probability.", rich_help_panel=RECIPE
        ),
    ] = 1.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            help="Chooses the draws.",
            callback=_possible_seed,
            rich_help_panel=RECIPE,
        ),
    ] = 0,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat/--no-chat",
            help="Put the prompt into the model's chat template, if it has one.",
            rich_help_panel=RECIPE,
        ),
    ] = True,
    threads: Threads = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Continue PROMPT: the text on stdout as it comes, then tokens a second and memory on stderr."""
    with console_for(as_json) as console:
        import tawny

        def show(piece: str) -> None:
            sys.stdout.write(piece)
            sys.stdout.flush()

        made = tawny.generate(
            model,
            sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            chat=None if chat else False,
            threads=threads,
            on_text=None if as_json else show,
        ).to_dict()
        from tawny.tables import generation_tables

        if as_json:
            console.result(made, generation_tables)
        else:
            show("\n")
            console.aside(generation_tables(made))
