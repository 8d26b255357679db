"""The frontier's table and picture: divergence from the dense model against the bytes of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "fit": "tawny fit",
    "uniform": "one kind for all",
    "zeros": "50 % zeros, one kind for all",
    "llama": "llama.cpp",
}
SOLVERS = {"sparsegpt": "the column loop", "alps": "ADMM"}


def group_of(name: str) -> str:
    """Which line of the picture a cell lies on."""
    kind, *rest = name.split(":")
    if kind in ("fit", "llama"):
        return kind
    return "zeros" if float(rest[1]) else "uniform"


def named(name: str) -> str:
    """A cell, for a person."""
    kind, *rest = name.split(":")
    if kind == "fit":
        return f"**`tawny fit --bits {rest[0]}`**"
    if kind == "llama":
        return f"llama.cpp {rest[0]}"
    group, sparsity = rest
    columns = f", groups of {group}" if group else ""
    zeros = f", {float(sparsity):.0%} zeros" if float(sparsity) else ""
    return f"{kind}{columns}{zeros}"


def frontier(result: Mapping[str, Any]) -> str:
    """Models by size: KL, top-1 and perplexity on each text."""
    setting, cells = result["setting"], result["cells"]
    texts, first = setting["texts"], next(iter(cells.values()))["texts"]
    dense = ", ".join(f"{first[text]['dense']:.2f} on {text}" for text in texts)
    lines = [
        f"{setting['model']}, channels scaled, so that no side meets the grid of the source again; solved by "
        f"{SOLVERS[setting['solver']]}; {setting['samples']} × {setting['seqlen']} tokens of {setting['calibration']}; judged on "
        f"{setting['windows']} windows of {setting['eval_seqlen']} tokens. Perplexity of the dense model: {dense}. Heads are int8 "
        "but for `tawny fit`, which chooses one.\n",
        "| model | MB | " + " | ".join(f"KL, {text} | top-1 | perplexity" for text in texts) + " |",
        "|---|---|" + "---|---|---|" * len(texts),
    ]
    for name, cell in sorted(cells.items(), key=lambda item: item[1]["bytes"]):
        numbers = " | ".join(
            f"{found['kl']:.3f} ± {found['kl_stderr']:.3f} | {found['top1']:.1%} | {found['perplexity']:.2f}"
            for found in (cell["texts"][text] for text in texts)
        )
        lines.append(f"| {named(name)} | {cell['bytes'] / 1e6:.1f} | {numbers} |")
    machine = result["machine"]
    note = f" {result['note']}." if "note" in result else ""
    lines.append(f"\n<sub>One seed. {machine['cpu']}, {result['date']}.{note}</sub>\n")
    return "\n".join(lines)


def series(result: Mapping[str, Any]) -> dict[str, list[tuple[float, float, float]]]:
    """Megabytes, KL on the first text and its standard error, by the name of a line, smallest first."""
    text = result["setting"]["texts"][0]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for key, label in NAMES.items():
        some = [cell for name, cell in result["cells"].items() if group_of(name) == key]
        points = sorted(
            (cell["bytes"] / 1e6, cell["texts"][text]["kl"], cell["texts"][text]["kl_stderr"])
            for cell in some
        )
        if points:
            found[label] = points
    return found
