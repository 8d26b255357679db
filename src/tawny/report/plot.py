"""Pictures: the layerwise outlier distribution, and how allocators answer it, block by block.

`plot_allocations` is the paper's Figure 1 (2310.05175) for any set of allocators: outlier shares as bars, sparsities
as lines over them. Both are drawn to .png or .svg, and the same numbers give the same bytes. Names that come from outside
are drawn as they are: two dollar signs in a path are not a formula.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tawny.words import unique_ends

# Okabe and Ito's colours, told apart by every kind of eye, without the yellow that paper swallows; markers and dashes
# repeat what the colour says, for prints in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#44AA99")
_MARKERS = "osD^vPX*"
_DASHES = ("-", "-", "-", "-", (0, (5, 1.5)), (0, (5, 1.5)), (0, (5, 1.5)), (0, (5, 1.5)))
_BARS = "#D5D9DE"


def plot_allocations(
    allocations: Mapping[str, Sequence[float]],
    path: Path,
    *,
    sparsity: float,
    outliers: Sequence[float] = (),
    M: str = "",
    title: str = "",
) -> None:
    """Draw the sparsity that each allocator gives every block, over the blocks' outlier shares.

    Args:
        allocations: by name, one sparsity a block.
        path: .png or .svg.
        sparsity: of the whole model, drawn as a dashed line.
        outliers: share of outliers of every block in %, drawn as bars; none if empty.
        M: what multiple of the mean an outlier is above.
    """
    figure = figure_of(9.0, 5.2)
    _draw_allocations(figure.subplots(), allocations, sparsity, outliers, M)
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    save(figure, path)


def plot_profile(report: Mapping[str, Any], path: Path) -> None:
    """Draw a profile report (`ProfileReport.to_dict()`).

    Left, outlier shares of every block for each M, on a logarithmic axis because they differ by orders of magnitude;
    right, the sparsities that allocators give the blocks, over the shares for one M.
    """
    figure = figure_of(14.0, 5.2)
    outliers, sparsities = figure.subplots(1, 2)
    for number, (M, shares) in enumerate(report["shares"].items()):
        outliers.plot(range(len(shares)), shares, label=f"M = {M}", **style_of(number))
    if all(share > 0 for shares in report["shares"].values() for share in shares):
        outliers.set_yscale("log")
    outliers.set_title("Scores |W|·‖X‖ above M × the block's mean", fontsize=11)
    outliers.set_xlabel("block")
    outliers.xaxis.get_major_locator().set_params(integer=True)
    outliers.set_ylabel("outliers, % of weights")
    outliers.grid(alpha=0.3)
    legend_under(outliers, len(report["shares"]))
    drawn = "5" if "5" in report["shares"] else next(iter(report["shares"]))
    _draw_allocations(sparsities, report["allocations"], report["sparsity"], report["shares"][drawn], drawn)
    figure.suptitle(str(report["source"]), fontsize=13, parse_math=False)
    save(figure, path)


def plot_fit(fitted: Mapping[str, Any], path: Path) -> None:
    """Draw what a fit chose (`Fitted.to_dict()`).

    Left, bits of a survivor of each linear, and its sparsity where zeros were used; right, divergence from the dense model
    against the size of the files: measured of the finalists, and expected of what would be chosen for other sizes.
    """
    roles = fitted["roles"]
    blocks = max(len(row["bits"]) for row in roles.values())
    # Half of the width is for the blocks, and a cell has room for "−50%".
    figure = figure_of(max(14.0, 2.4 + 0.56 * blocks), max(5.2, 1.2 + 0.24 * len(roles)))
    depth, frontier = figure.subplots(1, 2)
    _draw_bits(depth, roles)
    depth.set_title(f"Bits of each linear: {fitted['winner']}", fontsize=11, parse_math=False)
    sizes, expected = zip(*fitted["curve"], strict=True)
    megabytes = [size / 1e6 for size in sizes]
    frontier.plot(megabytes, expected, color="#5F6872", linewidth=1.2, linestyle="--", label="expected")
    for number, row in enumerate(fitted["finalists"]):
        style = {**style_of(number), "linestyle": "none", "markersize": 7}
        frontier.errorbar(row["bytes"] / 1e6, row["kl"], yerr=row["kl_stderr"], label=row["name"], **style)
    if fitted["budget"] is not None:
        frontier.axvline(fitted["budget"] / 1e6, color="black", linewidth=0.8, label="asked for")
    frontier.set_yscale("log")
    frontier.set_xlabel("size of the files, MB")
    frontier.set_ylabel("KL from the dense model, nats a token")
    frontier.grid(alpha=0.3)
    legend_under(frontier, 1)
    figure.suptitle(str(fitted["source"]), fontsize=13, parse_math=False)
    save(figure, path)


def _draw_bits(axes: Any, roles: Mapping[str, Mapping[str, Sequence[float | None]]]) -> None:
    """A square a linear: blocks from left to right, roles from top to bottom."""
    import numpy as np

    # A block without such a linear has None, which becomes NaN and stays white.
    bits = np.array([row["bits"] for row in roles.values()], dtype=float)
    drawn = axes.imshow(bits, cmap="YlGnBu", vmin=2, vmax=8, aspect="auto", interpolation="nearest")
    for y, row in enumerate(roles.values()):
        for x, (number, zeros) in enumerate(zip(row["bits"], row["sparsity"], strict=True)):
            if number is None:
                continue
            label = f"{number:.3g}" + (f"\n−{zeros:.0%}" if zeros else "")
            style = {"fontsize": 5.5 if zeros else 7, "color": "white" if number > 5 else "black"}
            axes.text(x, y, label, ha="center", va="center", **style)
    axes.set_yticks(range(len(roles)), unique_ends(list(roles)))
    axes.set_xlabel("block")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.colorbar(drawn, ax=axes, label="bits of a survivor", extend="max", shrink=0.8)


def _draw_allocations(
    axes: Any,
    allocations: Mapping[str, Sequence[float]],
    sparsity: float,
    outliers: Sequence[float],
    M: str,
) -> None:
    blocks = max([len(outliers), *(len(ratios) for ratios in allocations.values())])
    axes.set_title(f"Sparsity of each block, {sparsity:.0%} of the whole", fontsize=11)
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity, % of the block's weights")
    # The dashed line of the whole model is what uniform gives; only one of them is drawn.
    axes.axhline(100 * sparsity, color="black", linewidth=1.2, linestyle="--", label="uniform", zorder=3)
    others = {name: ratios for name, ratios in allocations.items() if name != "uniform"}
    for number, (name, ratios) in enumerate(others.items()):
        percents = [100 * ratio for ratio in ratios]
        axes.plot(range(len(ratios)), percents, label=name, zorder=4, **style_of(number))
    axes.set_xlim(-0.7, blocks - 0.3)
    axes.grid(axis="y", alpha=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(outliers):
        bars = axes.twinx()
        bars.bar(range(len(outliers)), outliers, width=0.8, color=_BARS, label="outliers")
        bars.set_ylabel(
            f"outliers, % of weights (M = {M})" if M else "outliers, % of weights", color="#5F6872"
        )
        bars.tick_params(axis="y", colors="#5F6872")
        # Lines lie over bars, though the axis of the bars was made last.
        axes.set_zorder(bars.get_zorder() + 1)
        axes.patch.set_visible(False)
        bars.set_ylim(0, 1.15 * max(*outliers, 1e-12))
    legend_under(axes, len(others) + 1)


def style_of(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a line by its number."""
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
        "markersize": 4.5,
        "linewidth": 1.6,
    }


def legend_under(axes: Any, entries: int) -> None:
    """Under the axes, where it hides no data."""
    legend = axes.legend(
        fontsize=9, ncols=min(entries, 5), loc="upper center", bbox_to_anchor=(0.5, -0.13), frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def figure_of(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Figures without pyplot: no window system is looked for, and no global state is left behind.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, path: Path) -> None:
    import matplotlib

    # An SVG names its parts at random and dates itself unless told not to.
    with matplotlib.rc_context({"svg.hashsalt": "tawny"}):
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)
