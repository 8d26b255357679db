"""Draw the pictures of the docs with the code that draws reports, from a committed record of a real run.

    python scripts/docs_images.py [RUN_JSON]

With a RUN_JSON the parts of it that are drawn are committed first (benchmarks/results/example_run.json, no times).
The allocations are drawn from what `tawny profile --json` gave (benchmarks/results/example_profile.json), the bits of a fit
from what its `fit.json` holds (benchmarks/results/example_fit.json).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tawny.report.html import depth_of
from tawny.report.plot import figure_of, legend_under, plot_allocations, plot_fit, save, style_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from tables.frontier import NAMES, notes, series  # noqa: E402
from tables.glance import picture as glance  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
EXAMPLE = RESULTS / "example_run.json"
IMAGES = ROOT / "docs" / "img"
# The colours of the report's page, which a picture outside of it has to bring along.
_STYLE = """<style>
  svg { --sans: system-ui, sans-serif; --ink: #2b2118; --soft: #685848; --line: #e4d9ca; --accent: #a14f0d; --second: #33647c; --card: #fffdfa; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #f1e8dc; --soft: #bcac98; --line: #3d3329; --accent: #f0a155; --second: #8cc0d8; --card: #1f1914; }
  }
  .ground { fill: var(--card); } .hit { fill-opacity: 0; }
</style><rect class="ground" width="100%" height="100%" rx="10"/>"""
_LINEAR = ("name", "shape", "block", "sparsity", "error", "error_kind", "outliers_before", "outliers_after")


def trimmed(record: dict[str, Any]) -> dict[str, Any]:
    """What the picture needs, and where it comes from."""
    kept = {
        key: record[key]
        for key in ("recipe", "source", "text", "versions", "sparsity", "outlier_M", "profile")
    }
    kept["linears"] = [{key: linear[key] for key in _LINEAR} for linear in record["linears"]]
    return kept


def picture(record: dict[str, Any]) -> str:
    """The report's first figure as a file of its own."""
    svg = str(depth_of(record, width=960))
    head, _, body = svg.partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{_STYLE}{body}\n'


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def plot_frontier(
    lines: Mapping[str, Sequence[tuple[float, float, float]]],
    path: Path,
    *,
    text: str,
    title: str,
    notes: Mapping[str, Sequence[str]] | None = None,
    apart: Collection[str] = (),
) -> None:
    """Draw divergence from the dense model against size.

    Args:
        lines: by name, points of megabytes, nats a token and their standard error, smallest first.
        text: what they were measured on.
        notes: by name of a line, what stands beside each of its points; the first line's stand below it, others' above.
        apart: names whose points are of no one kind, and so are joined by no line.
    """
    figure = figure_of(8.0, 5.0)
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        sizes, values, errors = zip(*points, strict=True)
        style = style_of(number) | ({"linestyle": "none"} if name in apart else {})
        axes.errorbar(sizes, values, yerr=errors, label=name, capsize=2, **style)
        away, align = ((-7, -7), ("right", "top")) if number == 0 else ((7, 5), ("left", "bottom"))
        for x, y, note in zip(sizes, values, (notes or {}).get(name, ()), strict=False):
            where = {"xytext": away, "textcoords": "offset points", "ha": align[0], "va": align[1]}
            axes.annotate(note, (x, y), fontsize=9, color=style["color"], **where)
    axes.set_yscale("log")
    axes.margins(x=0.22 if notes else None, y=0.1 if notes else None)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("size of the files, MB")
    axes.set_ylabel("KL from the dense model, nats a token")
    axes.set_title(f"{title}, on {text}", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    legend_under(axes, len(lines))
    save(figure, path)


def draw_glance(path: Path) -> None:
    """The picture of the README: how many next tokens stay the same in files of each size, whoever made them."""
    figure = figure_of(8.0, 4.6)
    axes = figure.subplots()
    lines = glance(_result("frontier_qwen"), _result("evidence"))
    for number, (name, points) in enumerate(lines.items()):
        style = style_of(number)
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], label=name, **style | {"markersize": 7}
        )
        # Names stand above the upper one of two lines that lie close to each other, and below the lower one.
        away, align = (
            ((0, 8), "bottom") if name in ("tawny fit", "pruned, then recovered") else ((0, -8), "top")
        )
        for x, y, note in points:
            where = {"xytext": away, "textcoords": "offset points", "ha": "center", "va": align}
            axes.annotate(note, (x, y), fontsize=9, color=style["color"], **where)
    axes.margins(x=0.1, y=0.13)
    axes.set_xlabel("size of the files, MB")
    axes.set_ylabel("same next token as the original, %")
    axes.set_title("Qwen2.5-Coder-1.5B (original: 3,554 MB), on wiki", fontsize=11, parse_math=False)
    axes.grid(alpha=0.3)
    legend_under(axes, len(lines))
    save(figure, path)


def plot_outliers(shares: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the outlier shares of the blocks of several models, from the first block to the last.

    Args:
        shares: by the name of a model, one share in % a block.
    """
    figure = figure_of(8.0, 4.6)
    axes = figure.subplots()
    for number, (name, values) in enumerate(shares.items()):
        depth = [100 * (block + 0.5) / len(values) for block in range(len(values))]
        axes.plot(depth, values, label=f"{name}, {len(values)} blocks", **style_of(number))
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("depth, % of the blocks")
    axes.set_ylabel("outliers, % of the block's weights")
    axes.grid(alpha=0.3)
    legend_under(axes, len(shares))
    save(figure, path)


def draw_allocations(path: Path) -> None:
    """Sparsity against depth for several allocators, over the outliers: the paper's Figure 1."""
    report = _result("example_profile")
    plot_allocations(
        report["allocations"],
        path,
        sparsity=report["sparsity"],
        outliers=report["shares"]["5"],
        M="5",
        title="SmolLM2-135M",
    )


def draw_frontier(name: str, title: str) -> None:
    """Divergence against bytes, from benchmarks/frontier.py, and how fast the models write where that was measured."""
    result = _result(name)
    how = {"text": result["setting"]["texts"][0], "title": title}
    beside = notes(result) if "speeds" in result else None
    plot_frontier(series(result), IMAGES / f"{name}.svg", **how, notes=beside, apart=[NAMES["recovered"]])


def draw_outliers(path: Path) -> None:
    """How outliers lie over depth in a language model and in encoders, all dense, M = 5."""
    encoders = {name: model["lod"] for name, model in _result("vision_study")["models"].items()}
    plot_outliers({"smollm2": _result("structured")["dense"]["lod"]["shares"]["5"], **encoders}, path)


def main() -> int:
    if len(sys.argv) > 1:
        record = trimmed(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        EXAMPLE.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8")
    record = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    IMAGES.mkdir(parents=True, exist_ok=True)
    (IMAGES / "depth.svg").write_text(picture(record), encoding="utf-8")
    draw_allocations(IMAGES / "allocators.svg")
    draw_frontier("frontier", "SmolLM2-135M")
    draw_frontier("frontier_qwen", "Qwen2.5-Coder-1.5B")
    draw_glance(IMAGES / "glance.svg")
    plot_fit(_result("example_fit"), IMAGES / "fit.svg")
    draw_outliers(IMAGES / "outliers.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
