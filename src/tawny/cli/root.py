"""The application every verb registers with, and its entry point."""

from __future__ import annotations

__all__ = ["app", "main", "verb"]

import io
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer


def _examples(*commands: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


app = typer.Typer(
    name="tawny",
    help="Prune large language models to high sparsity, and measure what is left.",
    epilog=_examples(
        "tawny prune smollm2 --out pruned -s 0.5 --calibration wiki",
        "tawny eval pruned --text wiki --windows 8",
        "tawny doctor",
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames and panels are for a window; a pipe gets plain text.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def verb(*examples: str, name: str | None = None, cls: Any = None) -> Callable[[Any], Any]:
    """Register a function as a verb whose help ends with these examples."""
    return app.command(name, cls=cls, epilog=_examples(*examples))


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        import tawny

        print(f"tawny {tawny.__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


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
