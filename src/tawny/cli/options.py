"""The options that several verbs share: one name, one help text, one panel each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from tawny.model.trust import trusting

if TYPE_CHECKING:
    from tawny.packed.format import Values

# Panels of `--help`.
RECIPE, DATA, OUTPUT = "What to do", "Calibration", "Output and machine"
MOST_THREADS = 1024  # OpenMP ends the process where the system refuses it a thread

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Folder, hub id, .gguf file, or smollm2 (packaged).")
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "-s",
        "--sparsity",
        metavar="SHARE",
        help="Share of weights to remove, in [0, 1).",
        rich_help_panel=RECIPE,
    ),
]
AllocatorName = Annotated[
    str | None,
    typer.Option(
        "-a",
        "--allocator",
        metavar="NAME",
        help="How blocks share the budget. Default: atp.",
        rich_help_panel=RECIPE,
    ),
]
SolverName = Annotated[
    str | None,
    typer.Option(
        "-m",
        "--solver",
        metavar="NAME",
        help="How a linear is pruned. Default: alps.",
        rich_help_panel=RECIPE,
    ),
]
PatternName = Annotated[
    str | None,
    typer.Option(
        "-p",
        "--pattern",
        metavar="PATTERN",
        help="Legal masks: unstructured, or n:m (n kept of every m) such as 2:4. Default: unstructured.",
        rich_help_panel=RECIPE,
    ),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "-c",
        "--recipe",
        metavar="RECIPE",
        help="Recipe to start from: a YAML file, or a name of `tawny list recipes`.",
        rich_help_panel=RECIPE,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--option",
        metavar="KEY=VALUE",
        help="Any other recipe key, such as seed=1 or include=*.mlp.*; repeatable. --KEY VALUE is the same.",
        rich_help_panel=RECIPE,
    ),
]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="c4, wikitext2, ptb, wiki, or a .txt/.jsonl file. Default: c4.",
        rich_help_panel=DATA,
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", metavar="N", help="Windows of text. Default: 128.", rich_help_panel=DATA),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seqlen", metavar="N", help="Tokens a window. Default: 2048.", rich_help_panel=DATA),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", help="Chooses the windows. Default: 0.", rich_help_panel=DATA),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps … Default: cpu.", rich_help_panel=OUTPUT
    ),
]


def _possible_threads(count: int | None) -> int | None:
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise typer.BadParameter(
            f"{count} given, expected 1 to {MOST_THREADS}; leave it out for torch's own choice"
        )
    return count


Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        help="Default: torch's own choice.",
        callback=_possible_threads,
        rich_help_panel=OUTPUT,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Peak memory not to pass, such as 6GB; the result does not depend on it.",
        rich_help_panel=OUTPUT,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout.", rich_help_panel=OUTPUT)
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a finished folder.", rich_help_panel=OUTPUT)
]


def _trust(context: typer.Context, asked_for: bool) -> bool:
    context.with_resource(trusting(asked_for))  # until the verb ends
    return asked_for


TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Let code that lies in a model's folder run; it is refused otherwise.",
        callback=_trust,
        rich_help_panel=OUTPUT,
    ),
]


def folder_named(text: str) -> Path:
    """The folder of `--out`; an empty text would be the one the command runs in."""
    if not text.strip():
        raise typer.BadParameter("it is empty; give a folder to write, such as ./pruned")
    return Path(text)


def packed_values(text: str) -> Values:
    """A kind of packed values by name, in capitals or not.

    Raises:
        UserError: there is no such kind.
    """
    from tawny.errors import UserError, nearest
    from tawny.packed.format import Values

    kind = text.lower()
    if kind not in get_args(Values):
        raise UserError(
            f"packed values {text!r} are not known{nearest(kind, get_args(Values))}; "
            f"choose one of {', '.join(get_args(Values))}"
        )
    return cast(Values, kind)
