"""`tawny chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys

from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Model, Threads, option, possible_seed
from tawny.cli.root import verb
from tawny.errors import TextError


@verb(
    "tawny chat packed",
    "tawny chat smollm2 --system 'Answer in one sentence.' --temperature 0",
    document=False,
)
def chat(
    model: Model,
    console: Console,
    system: str = option("--system TEXT", "System prompt.", RECIPE),
    max_tokens: int = option(
        "-n --max-tokens N", "Maximum tokens of an answer.", RECIPE, default=1024, min=1
    ),
    context: int | None = option(
        "--context N", "Tokens of the conversation. Default: the model's, at most 8192.", RECIPE, min=2
    ),
    temperature: float = option("-t --temperature T", "0 takes the likeliest token.", RECIPE, default=0.7),
    top_p: float = option(
        "--top-p P", "Draw from the likeliest tokens of this total probability.", RECIPE, default=0.95
    ),
    seed: int = option("--seed N", "Seed of the draws.", RECIPE, default=0, callback=possible_seed),
    threads: Threads = None,
) -> None:
    """Talk with MODEL. Ctrl-C ends an answer, Ctrl-D the conversation."""
    from tawny.decoding.conversation import Conversation

    with console.progress() as progress:
        talk = Conversation(
            model,
            system=system,
            max_tokens=max_tokens,
            context=context,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            threads=threads,
            progress=progress,
        )
    cut = {
        "length": f"the answer was cut at {max_tokens} tokens; --max-tokens allows more",
        "context": "the answer was cut because the context is full",
    }
    shown = sys.stdin.isatty()
    if shown:
        import readline  # noqa: F401  arrow keys and what was typed before

        console.note("Ctrl-C ends an answer, Ctrl-D the conversation")
    while True:
        try:
            said = input("> " if shown else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if not said.strip():
            continue
        try:
            for piece in talk.say(said):
                sys.stdout.write(piece)
                sys.stdout.flush()
        except KeyboardInterrupt:
            pass
        except TextError as error:
            console.note(str(error))
            continue
        print()
        if talk.finish in cut:
            console.note(cut[talk.finish])
