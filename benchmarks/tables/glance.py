"""The two tables of the README: what a fit has beside another tool's file of its size, and what OWL's shares gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.evidence import times

_FILES = {
    "llama:Q4_K_M": "llama.cpp Q4_K_M",
    "fit:5": "**`tawny fit --bits 5`**",
    "llama:Q3_K_M": "llama.cpp Q3_K_M",
    "fit:4.13": "**`tawny fit --bits 4.13`**",
    "fit:3.38": "**`tawny fit --bits 3.38`**",
}
_SOLVERS = {
    "sparsegpt": "SparseGPT, every block alike",
    "official-owl-sparsegpt-70": "OWL's shares and SparseGPT",
    "fast": "`tawny prune -c fast`",
    "default": "`tawny prune`",
}
_SPARSITIES = (0.5, 0.6)


def glance(frontier_qwen: Mapping[str, Any], evidence: Mapping[str, Any]) -> str:
    """llama.cpp's usual files, each above a fit of its size.

    Args:
        frontier_qwen, evidence: the results files of these names.
    """
    setting, speeds, cells = (frontier_qwen[key] for key in ("setting", "speeds", "cells"))
    dense = evidence["cells"]["dense"]
    text = setting["texts"][0]
    tokens = setting["windows"] * (setting["eval_seqlen"] - 1)
    lines = [
        "| a model of 1.5 billion weights | size | same next token as the original | tokens/s |",
        "|---|---|---|---|",
    ]
    shares = []
    for name, shown in _FILES.items():
        cell = cells[name]
        share = cell["texts"][text]["top1"]
        shares.append(share)
        speed = speeds["cells"][name]["decode_tokens_per_second"]
        lines.append(f"| {shown} | {cell['bytes'] / 1e6:,.0f} MB | {share:.1%} | {speed:.1f} |")
    error = 100 * max((share * (1 - share) / tokens) ** 0.5 for share in shares)
    return (
        "\n".join(lines)
        + f"\n\n<sub>Qwen2.5-Coder-1.5B on {tokens:,} tokens of `{text}`: ± {error:.1f} points at most (binomial), one seed. "
        f"The original has {dense['bytes'] / 1e9:.2f} GB and makes {dense['decode_tokens_per_second']:.1f} tokens/s in a run of its own. "
        f"Two threads of an {speeds['cpu'].replace('(R)', '')}. Fits are calibrated on `{text}`; llama.cpp has an importance matrix of the same tokens. "
        "[Settings, KL and other texts](docs/results/frontier.md#the-same-on-qwen25-coder-15b).</sub>\n"
    )


def picture(
    frontier_qwen: Mapping[str, Any], evidence: Mapping[str, Any]
) -> dict[str, list[tuple[float, float, str]]]:
    """Megabytes, the share of equal next tokens in % and a name, by the line of the picture, smallest first."""
    text = frontier_qwen["setting"]["texts"][0]
    found: dict[str, list[tuple[float, float, str]]] = {}
    for name, cell in frontier_qwen["cells"].items():
        kind, _, rest = name.partition(":")
        shown, note = {"fit": ("tawny fit", f"--bits {rest}"), "llama": ("llama.cpp", rest)}[kind]
        found.setdefault(shown, []).append((cell["bytes"] / 1e6, 100 * cell["texts"][text]["top1"], note))
    for name, cell in evidence["cells"].items():
        if name.endswith(":int8"):
            recipe, number, _ = name.split(":")
            recovered = recipe == "recovered"
            shown = "pruned, then recovered" if recovered else "tawny prune, int8"
            note = f"{number} min" if recovered else f"{float(number):.0%} zeros"
            found.setdefault(shown, []).append((cell["bytes"] / 1e6, 100 * cell["texts"][text]["top1"], note))
    return {shown: sorted(points) for shown, points in found.items()}


def owl(evidence: Mapping[str, Any]) -> str:
    """The paper's claim on the larger model: unequal shares keep more than equal ones.

    Args:
        evidence: the results file of this name.
    """
    cells, setting = evidence["cells"], evidence["setting"]
    text = next(iter(cells["dense"]["texts"]))
    dense = cells["dense"]["texts"][text]
    lines = [
        f"| Qwen2.5-Coder-1.5B | {' | '.join(f'{s:.0%} zeros: same next token | perplexity, × original' for s in _SPARSITIES)} |",
        f"|---|{'---|---|' * len(_SPARSITIES)}",
    ]
    for name, shown in _SOLVERS.items():
        row = [shown]
        for sparsity in _SPARSITIES:
            cell = cells.get(f"{name}:{sparsity}")
            found = cell and cell["texts"][text]
            row += [f"{found['top1']:.1%}", times(found, dense)] if found else ["–", "–"]
        lines.append(f"| {' | '.join(row)} |")
    return (
        "\n".join(lines)
        + f"\n\n<sub>{setting['windows']} windows of {setting['eval_seqlen']} tokens of `{text}`, one seed; ± is the standard error, where it is more than a fifth. "
        "OWL's M and λ are its authors' for 70%, in our transcription. "
        "[All of it](docs/results/qwen.md).</sub>\n"
    )
