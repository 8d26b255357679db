"""`tawny recover`: win back what pruning lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import RECIPE, Device, Out, StartOver, shared
from tawny.cli.root import verb
from tawny.kinds import GPU_KINDS, names_of, scaled_kinds
from tawny.machine import check_device
from tawny.report.frames import Frame, Result, facts, parts
from tawny.report.view import measurements, training_speed
from tawny.words import counted, duration, percent, quality_text, size

if TYPE_CHECKING:
    from tawny.recovery.settings import Recovery

TRAINING = "Training"


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is to be trained; None is unset."""

    train: Annotated[
        str | None,
        shared(
            "--train WHAT",
            "survivors, norms (and biases), or lora (masked, then merged). Default: survivors.",
            RECIPE,
        ),
    ] = None
    values: Annotated[
        str | None,
        shared(
            "--values KIND",
            f"Train through the rounding of a packed folder ({names_of(scaled_kinds())}) or of one for GPUs ({names_of(GPU_KINDS.values())}).",
            RECIPE,
        ),
    ] = None
    overrides: Annotated[
        list[str] | None,
        shared(
            "-o --option KEY=VALUE",
            "Any other setting, such as batch=8 or kl=0.9 (see docs/recovery.md); repeatable.",
            RECIPE,
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        shared(
            "--text TEXT[=SHARE]",
            "c4, wikitext2, ptb, wiki, a .txt/.jsonl file, chat:FILE.jsonl, or self (DENSE writes it); repeatable. images:DIR or sample for "
            "models that see. Default: c4.",
            TRAINING,
        ),
    ] = None
    tokens: Annotated[
        str | None, shared("--tokens N", "Tokens to train on, such as 500k. Default: 2M.", TRAINING)
    ] = None
    minutes: Annotated[
        float | None,
        shared("--minutes M", "Stop after so many minutes, if that comes first.", TRAINING),
    ] = None
    seqlen: Annotated[int | None, shared("--seqlen N", "Tokens a window. Default: 512.", TRAINING)] = None
    lr: Annotated[float | None, shared("--lr RATE", "Peak learning rate.", TRAINING)] = None
    device: Device = None

    def settings(self) -> Recovery:
        from tawny.recipe.merge import parse_override
        from tawny.recovery.settings import Recovery

        keys = vars(self) | {"text": self.text or None}
        overrides = dict(parse_override(given) for given in keys.pop("overrides") or ())
        settings = Recovery.make({key: value for key, value in keys.items() if value is not None} | overrides)
        check_device(settings.device)
        return settings


Pruned = Annotated[str, typer.Argument(metavar="PRUNED", help="Folder of a pruned model.")]
DenseModel = Annotated[
    str | None,
    shared(
        "--teacher DENSE",
        "The dense model: folder, hub id, .gguf file, or smollm2. Needed unless -o kl=0.",
        RECIPE,
    ),
]


@verb(
    "tawny recover pruned --teacher smollm2 --out recovered --text wiki --minutes 30",
    "tawny recover pruned --teacher Qwen/Qwen3-8B --out recovered --train lora --tokens 5M",
    "tawny recover pruned --teacher smollm2 --out recovered --text wiki=0.5 --text self=0.5 --minutes 10",
)
def recover(
    model: Pruned,
    console: Console,
    *,
    teacher: DenseModel = None,
    out: Out,
    asked: TrainingOptions,
    overwrite: StartOver = False,
) -> None:
    """Train a pruned model against the dense one; every zero stays zero. Stopped runs go on when repeated."""
    settings = asked.settings()
    with console.progress() as progress:
        record = tawny.recover(model, teacher, out, settings=settings, progress=progress, overwrite=overwrite)
    console.result(record.to_dict(), recovery_tables)


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
