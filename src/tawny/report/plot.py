"""The layerwise outlier distribution as a picture, beside the sparsities it leads to."""

from __future__ import annotations

__all__ = ["plot_profile"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def plot_profile(report: Mapping[str, Any], path: Path) -> None:
    """Draw a profile report (`ProfileReport.to_dict()`) to a .png or .svg file.

    Left, outlier shares of every block for each M, on a logarithmic axis because they differ by orders of magnitude;
    right, the sparsity that OWL would give each block.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figures without pyplot: no window system is looked for, and no global state is left behind.
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    outliers, sparsities = figure.subplots(1, 2)
    for M, shares in report["shares"].items():
        outliers.plot(range(len(shares)), shares, marker="o", markersize=3, label=f"M = {M}")
    if all(share > 0 for shares in report["shares"].values() for share in shares):
        outliers.set_yscale("log")
    outliers.set(xlabel="block", ylabel="outliers, % of weights", title="Scores |W|·‖X‖ above M × mean")
    for name, ratios in report["allocations"].items():
        sparsities.plot(range(len(ratios)), ratios, marker="o", markersize=3, label=name)
    sparsities.axhline(report["sparsity"], color="grey", linewidth=1, linestyle="--", label="uniform")
    sparsities.set(xlabel="block", ylabel="sparsity", title=f"Allocation at {report['sparsity']:.0%}")
    for axes in (outliers, sparsities):
        axes.grid(alpha=0.3)
        # Under the axes, where it hides no line.
        axes.legend(fontsize="small", ncols=5, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figure.suptitle(str(report["source"]))
    figure.savefig(path, dpi=150)
