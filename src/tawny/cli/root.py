"""The application every verb registers with, and its entry point."""

from __future__ import annotations

__all__ = ["app", "main"]

import io
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(
    name="tawny",
    help="Prune large language models to high sparsity, and measure what is left.",
    epilog="\b\nExamples:\n"
    "  tawny prune smollm2 --out pruned -s 0.5 --calibration wiki\n"
    "  tawny eval pruned --text wiki --windows 8\n"
    "  tawny doctor",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames and panels are for a window; a pipe gets plain text.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class RecipeCommand(TyperCommand):
    """A verb that takes a recipe: `--KEY VALUE` for a recipe key that has no option of its own is `-o KEY=VALUE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {name for param in self.params for name in (*param.opts, *param.secondary_opts)}
        return super().parse_args(ctx, list(_spelled_out(args, known | set(ctx.help_option_names))))


def _spelled_out(args: Sequence[str], known: set[str]) -> Iterator[str]:
    words = deque(args)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        if word == "--":
            yield from (word, *words)
            return
        # What looks like a slip in an option's own name, or lacks a value, is left to the parser, which says so.
        without_value = not equals and (not words or words[0].startswith("--"))
        if not name.startswith("--") or name in known or without_value or _is_slip(name, known):
            yield word
        else:
            yield from ("-o", f"{name[2:].replace('-', '_')}={value if equals else words.popleft()}")


def _is_slip(name: str, known: set[str]) -> bool:
    """Whether a name is rather one of the options', misspelt, than a recipe key."""
    if "." in name or not get_close_matches(name, known, cutoff=0.8):
        return False
    from tawny.recipe.merge import bare_keys

    return name[2:].replace("-", "_") not in bare_keys()


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        import tawny

        print(f"tawny {tawny.__version__}")
        raise typer.Exit()


def main() -> None:
    """The entry point of the `tawny` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    try:
        code = app(standalone_mode=False)
    except Exception as error:
        # typer's own usage errors: what it would say in four lines, in one.
        if not hasattr(error, "format_message"):
            raise
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "tawny"
        from tawny.cli.console import Console

        code = getattr(error, "exit_code", 2)
        Console("--json" in sys.argv).error(
            f"{error.format_message()} ({where} --help shows the options)", code
        )
    sys.exit(code if isinstance(code, int) else 0)
