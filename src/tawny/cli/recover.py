"""`tawny recover`: win back what pruning lost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Device, Out, RecipeFile, StartOver, option
from tawny.cli.root import verb
from tawny.kinds import names_of, scaled_kinds
from tawny.machine import check_device
from tawny.report.frames import Frame, Result, facts, parts
from tawny.report.view import measurements, training_speed
from tawny.words import counted, duration, percent, quality_text, size

TRAINING = "Training"


@verb(
    "tawny recover pruned --teacher smollm2 --out recovered --text wiki --minutes 30",
    "tawny recover pruned --teacher Qwen/Qwen3-8B --out recovered --train lora --tokens 5M",
    "tawny recover smollm2 --teacher smollm2 --out recovered --through 0.4,0.55,0.65,0.7 --text wiki",
)
def recover(
    model: Annotated[str, typer.Argument(metavar="PRUNED", help="Folder of a pruned model.")],
    console: Console,
    *,
    teacher: str | None = option(
        "--teacher DENSE",
        "The dense model: folder, hub id, .gguf file, or smollm2. Needed unless -o kl=0.",
        RECIPE,
    ),
    out: Out,
    train: str | None = option(
        "--train WHAT",
        "survivors, norms (and biases), or lora (masked, then merged). Default: survivors.",
        RECIPE,
    ),
    values: str | None = option(
        "--values KIND", f"Train through the packed format's rounding: {names_of(scaled_kinds())}.", RECIPE
    ),
    through: str | None = option(
        "--through LIST",
        "Prune to these sparsities in turn, such as 0.4,0.55,0.7, and recover after each; calibrated on --text unless -c says otherwise.",
        RECIPE,
    ),
    recipe: RecipeFile = None,
    overrides: list[str] | None = option(
        "-o --option KEY=VALUE",
        "Any other setting, such as batch=8 or kl=0.9 (see docs/recovery.md); repeatable.",
        RECIPE,
    ),
    text: list[str] | None = option(
        "--text TEXT[=SHARE]",
        "c4, wikitext2, ptb, wiki, a .txt/.jsonl file, chat:FILE.jsonl, or self (DENSE writes it); repeatable. images:DIR or sample for "
        "models that see. Default: c4.",
        TRAINING,
    ),
    tokens: str | None = option("--tokens N", "Tokens to train on, such as 500k. Default: 2M.", TRAINING),
    minutes: float | None = option(
        "--minutes M", "Stop after so many minutes, if that comes first.", TRAINING
    ),
    seqlen: int | None = option("--seqlen N", "Tokens a window. Default: 512.", TRAINING),
    lr: float | None = option("--lr RATE", "Peak learning rate.", TRAINING),
    device: Device = None,
    overwrite: StartOver = False,
) -> None:
    """Train a pruned model against the dense one; every zero stays zero. Stopped runs go on when repeated."""
    from tawny.errors import RecipeError
    from tawny.recipe.merge import parse_override
    from tawny.recovery.settings import Recovery

    if recipe is not None and through is None:
        raise RecipeError(
            f"-c {recipe} says how to prune, and without --through nothing is pruned: add --through LIST or leave it out"
        )
    named = dict(parse_override(given) for given in overrides or ())
    keys: dict[str, Any] = {
        "train": train,
        "values": values,
        "text": text or None,
        "tokens": tokens,
    }
    keys |= {"minutes": minutes, "seqlen": seqlen, "lr": lr, "device": device}
    settings = Recovery.make({key: value for key, value in keys.items() if value is not None} | named)
    check_device(settings.device)
    with console.progress() as progress:
        how: dict[str, Any] = {"settings": settings, "progress": progress, "overwrite": overwrite}
        if through is None:
            record = tawny.recover(model, teacher, out, **how)
        else:
            steps = _sparsities(through)
            record = tawny.recover_gradually(model, teacher or model, out, steps, recipe=recipe, **how)
    console.result(record.to_dict(), recovery_tables)


def _sparsities(text: str) -> list[float]:
    from tawny.errors import RecipeError

    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--through {text!r} is not a list of sparsities; give one such as 0.4,0.55,0.7"
        ) from None


def recovery_tables(record: Result) -> list[Frame]:
    """What `tawny recover` did: the measurements on the way, and the sums."""
    units, name = counted(record["text"])[1], quality_text(record["start"])[0]
    seconds = record["seconds"]
    measure = "perplexity" if "perplexity" in record["start"] else "loss"
    ratio = record["best"][measure] / record["start"][measure]
    start, best = (quality_text(record[when])[1] for when in ("start", "best"))
    rows = [
        (name, f"{start} → {best} (× {ratio:.3f})"),
        ("sparsity", f"{percent(record['sparsity'])} of {record['prunable']:,} prunable weights"),
        ("zeros", f"{record['zeros_before']:,} before, {record['zeros']:,} after"),
        (
            "trained",
            f"{record['trained']:,} values ({record['settings']['train']}) on {record['tokens']:,} {units} "
            f"in {record['steps']:,} steps; ended by {record['stopped']}",
        ),
        ("time", f"{duration(seconds['total'])}{parts(seconds, 'total', duration)}"),
        ("speed", training_speed(record)),
        ("peak memory", size(record["peak_memory"])),
    ]
    if record["out"]:
        rows.append(("written", f"{record['out']} ({size(record['bytes'])})"))
    if skipped := record["text"].get("skipped"):
        rows.append(("skipped", f"{len(skipped)} that cannot be read, first {skipped[0]}"))
    rows += [("warning", warning) for warning in record["warnings"]]
    return [measurements(record, most=10), facts(rows)]
