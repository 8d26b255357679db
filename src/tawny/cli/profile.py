"""`tawny profile`: the layerwise outlier distribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import tawny
from tawny.cli.common import check_file
from tawny.cli.console import Console
from tawny.cli.options import DATA, OUTPUT, RECIPE, Model, option, path_named
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.report.frames import Frame, Result, facts, table
from tawny.words import bar, duration, percent

SPARSITY = 0.7


@recipe_verb(
    "tawny profile smollm2 --calibration wiki --samples 16 --seqlen 1024",
    "tawny profile ./model -s 0.7 --allocators owl,dlp,atp,uniform --plot allocation.png",
    "tawny profile pruned --calibration wiki --json",
    without=("sparsity", "allocator", "solver", "pattern"),
)
def profile(
    model: Model,
    console: Console,
    *,
    multiples: list[float] | None = option(
        "-M M", "Outliers are above M times the mean; repeatable. Default: 3, 5, 7, 10.", RECIPE
    ),
    allocators: str | None = option(
        "--allocators NAMES",
        "Allocators whose sparsities to show, such as owl,dlp,uniform. Default: the recipe's, else owl for each M.",
        RECIPE,
    ),
    sparsity: float | None = option(
        "-s --sparsity SHARE",
        f"Sparsity that the allocators share out. Default: the recipe's or pattern's, else {SPARSITY:g}.",
        RECIPE,
    ),
    given: Given,
    seed: int | None = option("--seed N", "Seed that chooses the windows. Default: 0.", DATA),
    plot: Path | None = option("--plot FILE", "Also draw it, as .png or .svg.", OUTPUT, parser=path_named),
) -> None:
    """Measure the layerwise outlier distribution (LOD) of MODEL, dense or pruned."""
    check_file("--plot", plot, ".png", ".svg")
    chosen = given.recipe(sparsity=sparsity, default_sparsity=SPARSITY, seed=seed)
    shown = [name.strip() for name in (allocators or "").split(",") if name.strip()]
    if not shown and given.names_allocator() and chosen.allocator.name != "owl":
        shown = [chosen.allocator.name]
    with console.progress() as progress:
        report = tawny.profile(
            model,
            recipe=chosen,
            Ms=multiples or (3, 5, 7, 10),
            allocators=shown,
            progress=progress,
        ).to_dict()
        if plot is not None:
            from tawny.report.pages import or_say
            from tawny.report.plot import plot_profile

            if or_say(plot, partial(plot_profile, report, plot), progress):
                progress.say(f"drawn to {plot}")
    console.result(report, profile_tables)


def profile_tables(report: Result) -> list[Frame]:
    """The layerwise outlier distribution, each block's share of outliers for each M, with bars for one M."""
    shares: Mapping[str, Sequence[float]] = report["shares"]
    Ms = list(shares)
    drawn = "5" if "5" in Ms else Ms[len(Ms) // 2]  # the paper's choice at high sparsity
    # One allocation, that of the M whose bars are drawn, keeps the table narrow; --json has them all.
    allocations = {k: v for k, v in report["allocations"].items() if "=" not in k or k.endswith(f"={drawn}")}
    zeros = any(share > 0.01 for share in report["zeros"])  # a pruned model; a few zeros are in any dense one
    columns = ["block", *(f"M={M}" for M in Ms), "mean score", "max score", ""]
    frame = table(
        *columns,
        *(["zeros"] if zeros else []),
        *(f"{name} at {percent(report['sparsity'], 0)}" for name in allocations),
        title=f"weights whose |W|·‖X‖ is above M times the block's mean, in % (bars: M={drawn})",
        left=(len(columns) - 1,),
    )
    most = max(shares[drawn], default=0.0) or 1.0
    for block, share in enumerate(shares[drawn]):
        frame.add(
            str(block),
            *(f"{shares[M][block]:.3f}" for M in Ms),
            f"{report['mean_score'][block]:.4g}",
            f"{report['max_score'][block]:.4g}",
            bar(share / most, 16),
            *([percent(report["zeros"][block])] if zeros else []),
            *(percent(ratios[block]) for ratios in allocations.values()),
        )
    text = report["text"]
    seen = f", {text['name']}" if text.get("name") else ""
    return [frame, facts([("measured", f"{report['source']}{seen}, in {duration(report['seconds'])}")])]
