"""The frontier's table and picture: divergence from the dense model against the bytes of the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.shared import judged_otherwise

NAMES = {
    "fit": "tawny fit",
    "uniform": "one kind for all",
    **{f"{kind} with zeros": f"{kind} with zeros" for kind in ("bf16", "int8", "int4", "int3")},
    "recovered": "after `tawny recover`",
    "llama": "llama.cpp",
}
SOLVERS = {"sparsegpt": "the column loop", "alps": "ADMM"}


def group_of(name: str) -> str:
    """Which line of the picture a cell lies on."""
    if "+" in name:
        return "recovered"
    kind, *rest = name.split(":")
    if kind in ("fit", "llama"):
        return kind
    return f"{kind} with zeros" if float(rest[1]) else "uniform"


def named(name: str) -> str:
    """A cell, for a person."""
    base, recovered, minutes = name.partition("+")
    if recovered:
        return f"{named(base)}, then {minutes} minutes of `tawny recover`"
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
    others, said = judged_otherwise(cells)
    weighted = all(cell.get("matrix") for name, cell in cells.items() if group_of(name) == "llama")
    matrix = f"llama.cpp {'has an importance matrix of the same tokens' if weighted else 'got no importance matrix'}."
    lines = [
        f"{setting['model']}, channels scaled, so that neither tool meets the grid of the source again; solved by "
        f"{SOLVERS[setting['solver']]}; {setting['samples']} × {setting['seqlen']} tokens of {setting['calibration']}; judged on "
        f"{setting['windows']} windows of {setting['eval_seqlen']} tokens. Perplexity of the dense model: {dense}. Heads are int8, "
        f"except those of `tawny fit` and llama.cpp, which choose theirs. {matrix}{said}\n",
    ]
    speeds = result.get("speeds", {"cells": {}})
    head = ["model", "MB", *(f"KL, {text} | top-1 | perplexity" for text in texts)]
    head += ["decode, tokens/s"] * bool(speeds["cells"])
    lines += ["| " + " | ".join(head) + " |", "|---" * (2 + 3 * len(texts) + bool(speeds["cells"])) + "|"]
    for name, cell in sorted(cells.items(), key=lambda item: item[1]["bytes"]):
        numbers = " | ".join(
            f"{found['kl']:.3f} ± {found['kl_stderr']:.3f} | {found['top1']:.1%} | {found['perplexity']:.2f}"
            for found in (cell["texts"][text] for text in texts)
        )
        speed = speeds["cells"].get(name, {}).get("decode_tokens_per_second")
        shown = (f" {speed:.1f} |" if speed else " – |") if speeds["cells"] else ""
        lines.append(
            f"| {named(name)}{' *' * (name in others)} | {cell['bytes'] / 1e6:.1f} | {numbers} |{shown}"
        )
    machine = result["machine"]
    if speeds["cells"]:
        lines.append(
            f"\nSpeeds: in turn in one run, {speeds['threads']} threads, {speeds['cpu']}, {speeds['date']}."
        )
    note = f" {result['note']}." if "note" in result else ""
    lines.append(f"\n<sub>One seed. {machine['cpu']}, {result['date']}.{note}</sub>\n")
    return "\n".join(lines)


def notes(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """What stands beside the points of `series`: which model it is, and how fast it writes."""
    found, cells = result["speeds"]["cells"], result["cells"]
    told: dict[str, list[str]] = {label: [] for label in NAMES.values()}
    for name in sorted(cells, key=lambda name: float(cells[name]["bytes"])):
        kind, _, rest = name.partition(":")
        shown = {"fit": f"--bits {rest}", "llama": rest}.get(kind, name)
        speed = f"\n{found[name]['decode_tokens_per_second']:.0f} tokens/s" if name in found else ""
        told[NAMES[group_of(name)]].append(shown + speed)
    return told


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
