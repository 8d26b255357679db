"""`tawny recover`: win back what pruning lost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tawny.cli.common import console_for
from tawny.cli.options import OUTPUT, RECIPE, AsJson, Device, RecipeFile, TrustRemoteCode, folder_named
from tawny.cli.root import app
from tawny.machine import check_device

TRAINING = "Training"


@app.command(
    epilog="\b\nExamples:\n"
    "  tawny recover pruned --teacher smollm2 --out recovered --text wiki --minutes 30\n"
    "  tawny recover pruned --teacher Qwen/Qwen3-8B --out recovered --train lora --tokens 5M\n"
    "  tawny recover smollm2 --teacher smollm2 --out recovered --through 0.4,0.55,0.65,0.7 --text wiki"
)
def recover(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="Folder of a pruned model.")],
    *,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            metavar="DENSE",
            help="The dense model: folder, hub id, .gguf file, or smollm2. Needed unless -o kl=0.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="Folder to write to.", parser=folder_named, rich_help_panel=OUTPUT
        ),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="NAME",
            help="distill keeps the mask; elsa moves it under an exact budget. Default: distill.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            "--train",
            metavar="WHAT",
            help="survivors, norms (and biases), or lora (masked, then merged). Default: survivors.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            "--values",
            metavar="KIND",
            help="int8: train through the packed format's rounding.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    through: Annotated[
        str | None,
        typer.Option(
            "--through",
            metavar="LIST",
            help="Prune in steps, such as 0.4,0.55,0.7, and recover after each; calibrated on --text unless -c says how.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    recipe: RecipeFile = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            "--option",
            metavar="KEY=VALUE",
            help="Any other setting, such as batch=8 or kl=0.9 (docs/recovery.md); repeatable.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="c4, wikitext2, ptb, wiki, or a .txt/.jsonl file. Default: c4.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            metavar="N",
            help="How many to read, such as 500k. Default: 2M.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes", metavar="M", help="End after so long, if that is earlier.", rich_help_panel=TRAINING
        ),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen", metavar="N", help="Tokens a window. Default: 512.", rich_help_panel=TRAINING
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option("--lr", metavar="RATE", help="Highest learning rate.", rich_help_panel=TRAINING),
    ] = None,
    device: Device = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a finished folder, discard an unfinished run.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Train a pruned model against the dense one; every zero stays zero. Stopped runs go on when repeated."""
    with console_for(as_json) as console:
        from tawny.errors import RecipeError
        from tawny.recipe.schema import parse_override
        from tawny.recovery.settings import Recovery

        if recipe is not None and through is None:
            raise RecipeError(
                f"-c {recipe} says how to prune, and without --through nothing is pruned: add --through LIST or leave it out"
            )
        named = dict(parse_override(given) for given in option or ())
        keys = {
            "method": method,
            "train": train,
            "values": values,
            "text": text,
            "tokens": tokens,
            "minutes": minutes,
            "seqlen": seqlen,
            "lr": lr,
            "device": device,
        }
        settings = Recovery.make({key: value for key, value in keys.items() if value is not None} | named)
        check_device(settings.device)
        import tawny

        with console.progress() as progress:
            if through is None:
                record = tawny.recover(
                    model, teacher, out, settings=settings, progress=progress, overwrite=overwrite
                )
            else:
                record = tawny.recover_gradually(
                    model,
                    teacher or model,
                    out,
                    _sparsities(through),
                    recipe=recipe,
                    settings=settings,
                    progress=progress,
                    overwrite=overwrite,
                )
        from tawny.tables import recovery_tables

        console.result(record.to_dict(), recovery_tables)


def _sparsities(text: str) -> list[float]:
    from tawny.errors import RecipeError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--through {text!r} is no list of sparsities; give such as 0.4,0.55,0.7") from None
