"""`tawny profile`: the layerwise outlier distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tawny.cli.common import check_file, console_for, recipe_from
from tawny.cli.options import (
    OUTPUT,
    RECIPE,
    AsJson,
    CalibrationText,
    Device,
    Model,
    Overrides,
    RecipeFile,
    Samples,
    Seed,
    SeqLen,
    TrustRemoteCode,
)
from tawny.cli.root import RecipeCommand, app

SPARSITY = 0.7


@app.command(
    cls=RecipeCommand,
    epilog="\b\nExamples:\n"
    "  tawny profile smollm2 --calibration wiki --samples 16 --seqlen 1024\n"
    "  tawny profile ./model -s 0.7 --allocators owl,dlp,atp,uniform --plot allocation.png\n"
    "  tawny profile pruned --calibration wiki --json",
)
def profile(
    model: Model,
    multiples: Annotated[
        list[float] | None,
        typer.Option(
            "-M",
            metavar="M",
            help="Outliers are above M times the mean; repeatable. Default: 3, 5, 7, 10.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    allocators: Annotated[
        str | None,
        typer.Option(
            "--allocators",
            metavar="NAMES",
            help="Whose sparsities to show, such as owl,dlp,uniform. Default: owl for each M.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            "-s",
            "--sparsity",
            metavar="SHARE",
            help=f"For the sparsities the allocators give. Default: the recipe's or pattern's, else {SPARSITY:g}.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    recipe: RecipeFile = None,
    option: Overrides = None,
    calibration: CalibrationText = None,
    samples: Samples = None,
    seqlen: SeqLen = None,
    seed: Seed = None,
    device: Device = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw it, as .png or .svg.", rich_help_panel=OUTPUT),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Measure the layerwise outlier distribution (LOD) of MODEL, dense or pruned."""
    with console_for(as_json) as console:
        check_file("--plot", plot, ".png", ".svg")
        chosen = recipe_from(
            recipe,
            option,
            sparsity=sparsity,
            default_sparsity=SPARSITY,
            calibration_text=calibration,
            calibration_samples=samples,
            calibration_seqlen=seqlen,
            seed=seed,
            device=device,
        )
        import tawny

        with console.progress() as progress:
            report = tawny.profile(
                model,
                recipe=chosen,
                Ms=multiples or (3, 5, 7, 10),
                allocators=[name.strip() for name in (allocators or "").split(",") if name.strip()],
                progress=progress,
            ).to_dict()
        from tawny.tables import profile_tables

        console.result(report, profile_tables)
        if plot is not None:
            from tawny.report.plot import plot_profile

            plot_profile(report, plot)
            console.note(f"drawn to {plot}")
