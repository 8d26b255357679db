"""The picture of a report: outliers, sparsity and error over depth, as one SVG that lives inside a page.

It is the first figure of the OWL paper (2310.05175) drawn for one run. What is special about it:

- Colours are names of CSS variables of the page around it, so that one picture serves light, dark and paper.
- Text stays text, in the page's own font: it can be selected, found and read aloud.
- The same numbers give the same bytes: no dates, no random ids.
- Above the drawing lies one transparent rectangle a block, with a title; the page's script reads its number.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from markupsafe import Markup, escape

# Colours that matplotlib writes down faithfully and no drawing would use, and what the page calls them.
PALETTE = {
    "ink": "#010203",
    "soft": "#010204",
    "line": "#010205",
    "accent": "#010206",
    "second": "#010207",
    "card": "#010208",
}
# A page has each picture twice; its style shows the one that fits.
WIDTHS = {"wide": 960, "narrow": 340}
_PANEL = 160  # height of one panel


@dataclass(frozen=True)
class DepthRow:
    """One block: its index, its numbers (outliers in %, `felt` in nats, None where unknown), and the same in words, by field."""

    block: int
    linears: int
    before: float | None
    after: float | None
    sparsity: float
    error: float
    felt: float | None
    texts: dict[str, str]

    @property
    def title(self) -> str:
        """The sentence that says its numbers."""
        said = [f"outliers {when} {self.texts[when]}" for when in self.counted]
        keys = ("sparsity", "error") if self.felt is None else ("sparsity", "error", "felt")
        parts = [f"block {self.block}", *said, *(f"{key} {self.texts[key]}" for key in keys)]
        return ", ".join(parts)

    @property
    def counted(self) -> list[str]:
        """When outliers were counted: `before`, `after`, both or never."""
        counts = {"before": self.before, "after": self.after}
        return [when for when, count in counts.items() if count is not None]


def depth_figure(
    rows: Sequence[DepthRow], *, prefix: str, width: int, target: float | None, M: float, error: str
) -> Markup:
    """An inline SVG `width` units wide, made to be shown about that many pixels wide.

    Args:
        rows: the blocks, in order.
        prefix: put before every id, so that several pictures fit into one page.
        target: the sparsity of the whole, drawn as a line; None where nothing was removed.
        M: multiple of the mean above which a score is an outlier.
        error: title of the last panel.
    """
    panels: list[tuple[str, Callable[[Any], None]]] = [(error, partial(_error, rows=rows))]
    if target is not None:
        panels.insert(0, ("Sparsity, %", partial(_sparsity, rows=rows, target=target)))
    if all(row.felt is not None for row in rows):
        panels.insert(0, ("What the output feels of this, nats a token", partial(_felt, rows=rows)))
    if any(row.counted for row in rows):
        panels.insert(0, (f"Outliers, % of weights above {M:g} × the mean", partial(_outliers, rows=rows)))
    limits = (rows[0].block - 0.5, rows[-1].block + 0.5)
    svg, height, x_of = draw_panels(panels, width, "block", until=" of", limits=limits)
    hits = []
    for index, row in enumerate(rows):
        left, right = x_of(row.block - 0.5), x_of(row.block + 0.5)
        hits.append(
            Markup(
                '<rect class="hit" role="img" data-block="{}" x="{:.1f}" y="0" width="{:.1f}" height="{}"{}>'
            ).format(row.block, left, right - left, height, Markup(' tabindex="0"') if not index else "")
            + Markup("<title>{}</title></rect>").format(row.title)
        )
    label = "Outliers, sparsity and error of every block; the table below holds the same numbers"
    return to_page(svg, prefix, width, height, label, Markup("").join(hits))


def draw_panels(
    panels: Sequence[tuple[str, Callable[[Any], None]]],
    width: int,
    unit: str,
    *,
    until: str,
    limits: tuple[float, float] | None = None,
) -> tuple[str, int, Callable[[float], float]]:
    """Panels under each other over one axis: the SVG, its height, and where a position of that axis lies.

    Args:
        panels: title and what draws into the axes.
        unit: of the common axis.
        until: a narrow picture shows a title up to here.
        limits: of the common axis.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = len(panels) * _PANEL + 40
    with matplotlib.rc_context(style_of(width)):
        # Without pyplot: no window system is looked for, and no global state is left behind.
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor="none")
        FigureCanvasSVG(figure)
        # Margins in units of the page: an automatic layout takes ten times as long as the drawing.
        figure.subplots_adjust(
            left=50 / width, right=1 - 9 / width, bottom=46 / height, top=1 - 30 / height, hspace=0.42
        )
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for (title, draw), axis in zip(panels, axes, strict=True):
            draw(axis)
            shown = title if width > 600 else title.partition(until)[0]
            shown += ", logarithmic" if axis.get_yscale() == "log" else ""
            axis.set_title(shown, loc="left", fontsize="medium", pad=8)
            axis.grid(axis="y", linewidth=0.8)
            axis.set_axisbelow(True)
        last = axes[-1]
        last.set_xlabel(unit)
        if limits is not None:
            last.set_xlim(*limits)
            last.xaxis.get_major_locator().set_params(integer=True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    # Positions are known only now that the layout is done.
    return buffer.getvalue(), height, lambda x: float(last.transData.transform((x, 0))[0])


def log_scale(axis: Any, values: Sequence[float], ratio: float) -> None:
    """A logarithmic axis where values differ by more than `ratio`; it has no place for zeros."""
    if values and min(values) > 0 and max(values) > ratio * min(values):
        from matplotlib.ticker import LogLocator

        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_minor_formatter(lambda value, _: "")


def style_of(width: int) -> dict[str, Any]:
    """What matplotlib is to be set to for a picture that `to_page` takes."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "tawny",
        "font.size": 12 if width > 600 else 11,
        "font.family": "sans-serif",
        **dict.fromkeys(("text.color", "axes.titlecolor"), PALETTE["ink"]),
        **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), PALETTE["soft"]),
        **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), PALETTE["line"]),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
        "axes.facecolor": "none",
    }


# --- panels ----------------------------------------------------------------------------------------------


def _outliers(axis: Any, rows: Sequence[DepthRow]) -> None:
    x = [row.block for row in rows]
    lines = (("before", "accent", "o", "-"), ("after", "second", "s", "--"))
    shown: list[float] = []
    for name, colour, marker, dash in lines:
        numbers = [getattr(row, name) if name in row.counted else math.nan for row in rows]
        known = [value for value in numbers if math.isfinite(value)]
        if not known:
            continue
        shown += known
        axis.plot(
            x, numbers, dash, color=PALETTE[colour], marker=marker, markersize=3.5, linewidth=1.4, label=name
        )
    log_scale(axis, shown, 8)
    where = {"loc": "lower right", "bbox_to_anchor": (1.0, 0.98), "borderaxespad": 0}
    axis.legend(frameon=False, ncols=2, handlelength=1.6, **where)


def _sparsity(axis: Any, rows: Sequence[DepthRow], target: float) -> None:
    x, values = [row.block for row in rows], [100 * row.sparsity for row in rows]
    # Stems from the uniform line: what a reader asks is which blocks lose more than that, and which less.
    axis.vlines(x, 100 * target, values, color=PALETTE["accent"], linewidth=2)
    axis.axhline(100 * target, color=PALETTE["soft"], linewidth=1, linestyle=(0, (4, 3)))
    axis.plot(x, values, "o", color=PALETTE["accent"], markersize=4.5)
    spread = max(2.0, *(abs(value - 100 * target) for value in values))
    low, high = 100 * target - 1.25 * spread, 100 * target + 1.25 * spread
    axis.set_ylim(max(low, -4.0), min(high, 104.0))


def _felt(axis: Any, rows: Sequence[DepthRow]) -> None:
    axis.bar(
        [row.block for row in rows],
        [row.felt for row in rows],
        width=0.72,
        color=PALETTE["accent"],
        linewidth=0,
    )
    axis.set_ylim(bottom=0)


def _error(axis: Any, rows: Sequence[DepthRow]) -> None:
    values = [100 * row.error if math.isfinite(row.error) else math.nan for row in rows]
    axis.bar([row.block for row in rows], values, width=0.72, color=PALETTE["second"], linewidth=0)
    axis.set_ylim(bottom=0)


# --- from a file to a part of a page -----------------------------------------------------------------------


def to_page(
    svg: str, prefix: str, width: int, height: int, label: str, above: Markup | None = None
) -> Markup:
    """A file of matplotlib's as a part of a page: its ids prefixed, its colours the page's own.

    Args:
        svg: the file, drawn with `style_of` and colours of `PALETTE`.
        label: what the picture shows, for who cannot see it.
        above: what is put over the drawing.
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    # A style would hold for the whole page.
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', body)
    body = re.sub(r'(xlink:)?href="#([^"]+)"', rf'href="#{prefix}-\2"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", body)
    body = re.sub(r"font: (\d+(?:\.\d+)?px) [^;\"]+", r"font: \1 var(--sans)", body)
    for name, colour in PALETTE.items():
        body = body.replace(colour, f"var(--{name})")
    return Markup(
        f'<svg viewBox="0 0 {width} {height}" role="group" aria-label="{escape(label)}" '
        f'style="stroke-linejoin: round; stroke-linecap: butt">{body}{above or ""}</svg>'
    )
