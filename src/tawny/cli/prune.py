"""`tawny prune`: the main job."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tawny.cli.common import console_for, recipe_from
from tawny.cli.options import (
    OUTPUT,
    AllocatorName,
    AsJson,
    CalibrationText,
    Device,
    Memory,
    Model,
    Overrides,
    PatternName,
    RecipeFile,
    Samples,
    SeqLen,
    SolverName,
    Sparsity,
    TrustRemoteCode,
    folder_named,
    packed_values,
)
from tawny.cli.root import RecipeCommand, app
from tawny.progress import speaks

if TYPE_CHECKING:
    from tawny.cli.console import Console
    from tawny.packed.format import Values
    from tawny.progress import Progress
    from tawny.recipe.schema import Recipe
    from tawny.record import Record

EVAL_WINDOWS = 20  # of `tawny prune --eval`; enough for a standard error, few enough to wait for


@app.command(
    cls=RecipeCommand,
    epilog="\b\nExamples:\n"
    "  tawny prune smollm2 --out pruned -s 0.5 --calibration wiki --eval wiki\n"
    "  tawny prune Qwen/Qwen3-8B --out packed -s 0.7 -a owl -m wanda -o lambda=0.15 --pack bf16\n"
    "  tawny prune ./model --out pruned -c owl-wanda-mixed-3-8",
)
def prune(
    model: Model,
    *,
    sparsity: Sparsity = None,
    allocator: AllocatorName = None,
    solver: SolverName = None,
    pattern: PatternName = None,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="DIR",
            help="Folder to write the pruned model to.",
            parser=folder_named,
            rich_help_panel=OUTPUT,
        ),
    ],
    device: Device = None,
    memory: Memory = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a finished folder; start an unfinished one over.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    pack: Annotated[
        str | None,
        typer.Option(
            "--pack",
            metavar="KIND",
            help="Write a packed folder (bf16, f16, f32, int8) instead of a dense one; see `tawny pack`.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            "--eval",
            metavar="TEXT",
            help=f"Then compare dense and pruned: perplexity on up to {EVAL_WINDOWS} windows.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Prune MODEL and write it as a Hugging Face checkpoint with real zeros."""
    with console_for(as_json) as console:
        chosen = recipe_from(
            recipe,
            option,
            sparsity=sparsity,
            allocator=allocator,
            solver=solver,
            pattern=pattern,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            device=device,
        )
        values = None if pack is None else packed_values(pack)
        windows = 0 if evaluate is None else _windows(model, evaluate, chosen)
        import tawny

        with console.progress() as progress:
            if values is None:
                record = tawny.prune(
                    model, out, recipe=chosen, progress=progress, overwrite=overwrite, memory=memory
                )
            else:
                record = _prune_and_pack(model, out, chosen, values, progress, overwrite, memory)
        if not speaks():  # what follows is done by the first of several processes
            return
        if evaluate is not None:
            record.evaluation = _compare(console, model, out, evaluate, windows, chosen)
            record.evaluation["pruned"]["sparsity"] = record.sparsity
            record.generated = _samples(console, model, out, evaluate)
            from tawny.report.publish import publish

            console.note(f"report: {publish(record, out)}")
        from tawny.tables import record_tables

        console.result(record.to_dict(), record_tables)


def _prune_and_pack(
    model: str,
    out: Path,
    recipe: Recipe,
    values: Values,
    progress: Progress,
    overwrite: bool,
    memory: str | None,
) -> Record:
    """Prune into `OUT.dense`, pack that into `out`, and remove it: unpacking gives it back."""
    import tawny
    from tawny.errors import OutputError
    from tawny.model.output import named
    from tawny.report.publish import publish

    out = named(out)
    dense = out.with_name(out.name + ".dense")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another --out or pass --overwrite")
    # --overwrite was said of OUT alone.
    if os.path.lexists(dense) and not _made_for(dense, out):
        raise OutputError(
            f"{dense} exists and is not what an earlier run made to be packed into {out}, which needs this place for "
            "the pruned model: move it away or choose another --out"
        )
    if dense.exists() and not overwrite:
        raise OutputError(
            f"{dense} is the pruned model of a run that was stopped while packing: `tawny pack {dense} --out {out} "
            f"--values {values}` goes on, --overwrite starts over"
        )
    record = tawny.prune(model, dense, recipe=recipe, progress=progress, overwrite=overwrite, memory=memory)
    if not speaks():
        return record
    _mark(dense, out)
    report = tawny.pack(dense, out, values, overwrite=overwrite, progress=progress)
    shutil.rmtree(dense)
    progress.say(f"the dense checkpoint was removed; `tawny unpack {out}` writes it again")
    record.out, record.bytes = str(out), report.bytes
    stored = json.loads((out / "run.json").read_text(encoding="utf-8"))
    record.packed, record.files = stored["packed"], stored["files"]
    publish(record, out)
    return record


def _mark(dense: Path, out: Path) -> None:
    """Say in the `run.json` of `OUT.dense` what the folder is for; packing puts its own entry there."""
    from tawny.report.pages import write_beside

    path = dense / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["packed"] = {"into": str(out.absolute())}
    write_beside(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _made_for(dense: Path, out: Path) -> bool:
    try:
        record = json.loads((dense / "run.json").read_text(encoding="utf-8"))
        return bool(record["packed"]["into"] == str(out.absolute()))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _windows(model: str, text: str, recipe: Recipe) -> int:
    """How many windows to compare on; asked before the work, since too short a text should not cost a whole run."""
    from tawny.calibration.context import check_context
    from tawny.calibration.text import load_text
    from tawny.evaluation.perplexity import count_windows
    from tawny.model.source import load_tokenizer, resolve
    from tawny.model.stack import open_stack

    loaded = load_text(text, "evaluation")
    folder = resolve(model)
    check_context(open_stack(folder).model, recipe.calibration.seqlen)
    tokenizer = load_tokenizer(folder)
    return count_windows(loaded, recipe.calibration.seqlen, None, tokenizer, most=EVAL_WINDOWS)


def _compare(
    console: Console, model: str, out: Path, text: str, windows: int, recipe: Recipe
) -> dict[str, Any]:
    """Perplexity of both models on the same windows."""
    import tawny

    measured: dict[str, Any] = {}
    for name, source in (("dense", model), ("pruned", str(out))):
        with console.progress() as progress:
            progress.say(f"measuring the {name} model on {text}")
            result = tawny.evaluate(
                source,
                text,
                seqlen=recipe.calibration.seqlen,
                windows=windows,
                device=recipe.device,
                progress=progress,
            )
        measured[name] = result.to_dict()
    return measured


def _samples(console: Console, model: str, out: Path, text: str) -> list[dict[str, str]]:
    """What both models write after the same words of the text."""
    from tawny.calibration.text import load_text
    from tawny.evaluation.samples import prompts_from, text_samples

    with console.progress() as progress:
        return text_samples(model, out, prompts_from(load_text(text, "evaluation")), progress=progress)
