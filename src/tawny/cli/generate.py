"""`tawny generate`: text from a model, dense or packed, as it comes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Model, Threads, option, possible_seed
from tawny.cli.root import verb
from tawny.progress import Silent, silent
from tawny.report.frames import Frame, Result, facts
from tawny.words import duration, size


@verb(
    "tawny generate smollm2 'The capital of France is'",
    "tawny generate packed 'Write a poem about owls.' --max-tokens 200 --temperature 0.8 --seed 1",
    "tawny generate packed 'Once upon a time' --no-chat --json",
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.")],
    console: Console,
    max_tokens: int = option("-n --max-tokens N", "Maximum tokens to generate.", RECIPE, default=128, min=1),
    temperature: float = option("-t --temperature T", "0 takes the likeliest token.", RECIPE, default=0.0),
    top_p: float = option(
        "--top-p P", "Draw from the likeliest tokens of this total probability.", RECIPE, default=1.0
    ),
    seed: int = option("--seed N", "Seed of the draws.", RECIPE, default=0, callback=possible_seed),
    chat: bool = option(
        "--chat/--no-chat",
        "Put the prompt into the model's chat template, if it has one.",
        RECIPE,
        default=True,
    ),
    threads: Threads = None,
) -> None:
    """Continue PROMPT: the text on stdout as it comes, then tokens a second and memory on stderr."""

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    text = tawny.generate(
        model,
        sys.stdin.buffer.read().decode(errors="surrogateescape") if prompt == "-" else prompt,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        chat=None if chat else False,
        threads=threads,
        on_text=None if console.as_json else show,
        progress=silent if console.as_json else _Notes(console),
    ).to_dict()

    if console.as_json:
        console.result(text, generation_tables)
    else:
        show("\n")
        console.aside(generation_tables(text))


class _Notes(Silent):
    """What is said while the model is opened. A bar would take the text as well, and write it to stderr."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.note(text)


def generation_tables(made: Result) -> list[Frame]:
    """What a text took; the text itself has been streamed."""
    speed = made["decode_tokens_per_second"]
    ends = {"stop": "the model ended it", "context": "as many as its context holds"}
    count = f"{len(made['tokens'])} tokens ({ends.get(made['finish'], 'as many as asked for')})"
    waited, prompt = duration(made["first_token_seconds"]), made["prompt_tokens"]
    memory = f"{size(made['resident_bytes'])} for the model, {size(made['peak_bytes'])} at most"
    rows = [
        ("decoded", count + ("" if speed is None else f", {speed:,.1f} tokens/s")),
        ("first token", f"{waited} after {prompt} tokens of prompt"),
        ("memory", memory),
        ("with", f"{made['threads']} threads, kernel {made['kernel']}"),
    ]
    return [facts(rows)]
