"""`report.html` of a recovered model: what the training did to it, from `recover.json` and nothing else.

It loads nothing, as the report of a pruning does. What was measured on held-out windows is in the table below its picture.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tawny.report.figures import PALETTE, WIDTHS, draw_panels, log_scale, to_page
from tawny.report.html import NAME
from tawny.report.pages import render, write_beside
from tawny.report.view import made_with, measurements, phases, recovery_words, training_speed
from tawny.words import counted, duration, percent, quality_text, size

_DOTS = 400  # points a curve keeps: more than the picture has room for


def write_recovery(record: Mapping[str, Any], folder: str | Path, warning: str = "") -> Path:
    """Write `report.html` into `folder`, beside and renamed, and return its path; `warning` is as of `render_recovery`."""
    return write_beside(Path(folder) / NAME, render_recovery(record, warning))


def render_recovery(record: Mapping[str, Any], warning: str = "") -> str:
    """The page as text; `warning` is of what happened to the model since."""
    record = known(record)
    return render(
        "recovery.html.j2",
        title=f"{Path(record['source']).name or 'model'}, recovered",
        summary=recovery_words(record, "Trained with its zeros kept"),
        numbers=_tiles(record),
        warnings=[*record["warnings"], *([warning] if warning else [])],
        figures={name: curve_figure(record, width=width, prefix=name) for name, width in WIDTHS.items()},
        samples=counted(record["text"])[0],
        measured=measurements(record),
        asked=_asked(record),
        spent=phases(record["seconds"]),
    )


def known(record: Mapping[str, Any]) -> dict[str, Any]:
    """With NaN for what is null in the file: JSON has no word for a loss that was not finite."""

    def entry(plain: Mapping[str, Any]) -> dict[str, Any]:
        return {key: math.nan if value is None else value for key, value in plain.items()}

    lists = {key: [entry(one) for one in record[key]] for key in ("measured", "curve")}
    return {**record, **lists, **{key: entry(record[key]) for key in ("start", "best")}}


def _tokens_at(record: Mapping[str, Any], step: float) -> int:
    return int(step * record["settings"]["batch"] * record["settings"]["seqlen"])


def _tiles(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    start, best, text = record["start"], record["best"], record["text"]
    shown, units = counted(text)
    windows = f"{text['held_out']} {shown} of {text['seqlen']} {units}"
    name, reached = quality_text(best)
    tiles = [(f"held-out {name}", reached, f"from {quality_text(start)[1]}; {windows}")]
    if "kl" in best:
        tiles.append(("KL to the dense model", f"{best['kl']:.3f}", f"from {start['kl']:.3f} nats a token"))
        tiles.append(("same next word", percent(best["top1"], 1), f"from {percent(start['top1'], 1)}"))
    tiles.append(("sparsity", percent(record["sparsity"], 1), f"{record['trained']:,} numbers trained"))
    tiles.append(("time", duration(record["seconds"].get("total", 0.0)), training_speed(record)))
    before = f"{size(record['memory_before'])} before it began"
    tiles.append(("peak memory", size(record["peak_memory"]), before))
    return tiles


def _asked(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    settings = record["settings"]
    rows = [("pruned model", record["source"])]
    if record["teacher"]:
        rows.append(("dense model", str(record["teacher"])))
    shown = {key: value for key, value in settings.items() if value not in (None, "", False)}
    rows += [(key, f"{value:g}" if isinstance(value, float) else str(value)) for key, value in shown.items()]
    rows.append(("ended because of", record["stopped"]))
    return rows + made_with(record)


def curve_figure(record: Mapping[str, Any], *, width: int, prefix: str) -> Markup:
    """Loss, KL and held-out perplexity over training tokens, as an inline SVG about `width` pixels wide."""
    predicts, units = "perplexity" in record["start"], counted(record["text"])[1]
    measured = [
        entry for entry in record["measured"] if math.isfinite(entry["perplexity" if predicts else "loss"])
    ]
    curve = _thinned(record["curve"])
    shown = {"loss": "Energy lost of the features, share: each step, and held out"}
    if predicts:
        shown = {
            "perplexity": "Held-out perplexity",
            "loss": "Next-token loss, nats: each step, and held out",
        }
    if any("kl" in entry for entry in measured):
        shown["kl"] = "KL to the dense model, nats a token: each step, and held out"

    def draw(axis: Any, key: str) -> None:
        if curve and key != "perplexity":
            x = [entry["tokens"] / 1000 for entry in curve]
            axis.plot(x, [entry[key] for entry in curve], color=PALETTE["second"], linewidth=1)
        x = [_tokens_at(record, entry["step"]) / 1000 for entry in measured]
        values = [entry[key] for entry in measured]
        axis.plot(x, values, "o-", color=PALETTE["accent"], markersize=4, linewidth=1.6)
        log_scale(axis, values, 30)

    panels = [(title, partial(draw, key=key)) for key, title in shown.items()]
    svg, height, _ = draw_panels(panels, width, f"thousand {units}", until=":")
    names = ", ".join(title.partition(",")[0].partition(":")[0] for title in shown.values())
    label = f"{names} over training {units}; the table below holds what was measured"
    return to_page(svg, prefix, width, height, label)


def _thinned(curve: Sequence[Mapping[str, float]]) -> Sequence[Mapping[str, float]]:
    """Means over neighbouring steps, where there are more steps than the picture can show."""
    each = -(-len(curve) // _DOTS)
    if each <= 1:
        return [entry for entry in curve if math.isfinite(entry["loss"])]
    groups = [curve[start : start + each] for start in range(0, len(curve), each)]
    return [
        {key: sum(entry[key] for entry in group) / len(group) for key in ("tokens", "loss", "kl")}
        for group in groups
    ]
