"""The application every verb registers with, and its entry point."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer

from tawny.cli.common import console_for
from tawny.cli.console import Console
from tawny.cli.options import AsJson, TrustRemoteCode


def _examples(*commands: str) -> str:
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


app = typer.Typer(
    name="tawny",
    help="Make language models smaller: every part gets the bits, zeros or channels that it can bear.",
    epilog=_examples(
        "tawny fit smollm2 --size 80MB --out small --calibration wiki",
        "tawny serve small",
        "tawny prune smollm2 --out pruned -s 0.5 --calibration wiki",
    ),
    add_completion=False,
    pretty_exceptions_enable=False,
    # Frames and panels are for a window; a pipe gets plain text.
    rich_markup_mode="rich" if sys.stdout.isatty() else None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def verb(
    *examples: str,
    name: str | None = None,
    cls: Any = None,
    code: bool = True,
    document: bool = True,
    without: Collection[str] = (),
    among: typer.Typer = app,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a verb whose help ends with these examples.

    Its parameter `console` is where it speaks; whatever it raises becomes one line and an exit code. A parameter whose
    annotation is a dataclass stands for its fields: options that several verbs share, and take as one.

    Args:
        code: it opens models, and so has `--trust-remote-code`.
        document: it has a result, and so has `--json`.
        without: fields of a dataclass that are not options of this verb.
        among: the verbs that it is one of.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        options: dict[str, tuple[Any, Any]] = {}  # annotation and default
        groups: dict[str, tuple[Any, list[str]]] = {}
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            kind = parameter.annotation
            if is_dataclass(kind):
                hints = get_type_hints(kind, include_extras=True)
                taken = [field for field in fields(kind) if field.name not in without]
                options |= {field.name: (hints[field.name], field.default) for field in taken}
                groups[parameter.name] = (kind, [field.name for field in taken])
            elif parameter.name != "console":
                options[parameter.name] = (kind, parameter.default)
        if code:
            options["trust_remote_code"] = (TrustRemoteCode, False)
        if document:
            options["as_json"] = (AsJson, False)

        def command(**values: Any) -> None:
            values.pop("trust_remote_code", None)  # the option itself has seen to it
            with console_for(values.pop("as_json", False)) as console:
                for group, (kind, names) in groups.items():
                    values[group] = kind(**{name: values.pop(name) for name in names})
                function(**values, console=console)

        command.__name__, command.__doc__ = function.__name__, function.__doc__
        command.__annotations__ = {option: kind for option, (kind, _) in options.items()}
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
                for option, (kind, default) in options.items()
            ]
        )
        return among.command(name, cls=cls, epilog=_examples(*examples))(command)

    return register


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
        code = getattr(error, "exit_code", 2)
        Console("--json" in sys.argv).error(
            f"{error.format_message()} ({where} --help shows the options)", code
        )
    sys.exit(code if isinstance(code, int) else 0)
