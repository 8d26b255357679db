"""The tables of the README: six rows about one model, and a larger one at the bytes of another tool's file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tables.shared import SHAPE_NAMES, over_seeds
from tables.speed import baseline_of, speed
from tawny.words import kl_text

_SPARSITIES = (0.5, 0.6, 0.7)
_RECIPES = {
    "official-owl-sparsegpt-70": "OWL and SparseGPT, as their authors run them",
    "fast": "`tawny prune`",
    "best": "`tawny prune -c best`",
}
_SAME = {
    "llama:Q4_K_M": "llama.cpp Q4_K_M",
    "fit:5": "`tawny fit --bits 5`",
    "llama:Q3_K_M": "llama.cpp Q3_K_M",
    "fit:4.13": "`tawny fit --bits 4.13`",
    "llama:Q2_K": "llama.cpp Q2_K",
    "fit:3.38": "`tawny fit --bits 3.38`",
}
_SHAPE, _LARGE = "smollm2", "7b"  # the model of all rows, and the one that the note adds
_VARIANTS = {"packed bf16": "bf16", "packed int8, int8 head": "int8 with its head"}


def glance(
    recipes: Mapping[str, Any],
    recovery: Mapping[str, Any],
    decode: Mapping[str, Any],
    frontier_qwen: Mapping[str, Any],
) -> str:
    """One row for each claim, one column for each sparsity; and what has the same bytes.

    Args:
        recipes, recovery, decode, frontier_qwen: the results files of these names.
    """
    lines = [
        f"| | dense | {' | '.join(f'{sparsity:.0%}' for sparsity in _SPARSITIES)} |",
        f"|---|---|{'---|' * len(_SPARSITIES)}",
        *_perplexities(recipes, recovery),
        *_files(recovery),
        _row("decoding speed, × dense", "1.00", _speeds(decode["measurements"], _SHAPE, "packed bf16")),
    ]
    text = recipes["evaluation"]["texts"][0]
    adapted = min(
        c["evaluation"][text]["perplexity"] / recovery["dense"]["evaluation"][text]["perplexity"]
        for c in recovery["cells"]
        if c["kind"] == "control" and c["minutes"] == _minutes(recovery)
    )
    return (
        "\n".join(lines)
        + f"\n\n<sub>{SHAPE_NAMES[_SHAPE]}, perplexity on `{text}`, packed as bf16, decoded on two CPU cores with AVX-512. The dense baseline uses our own tuned "
        f"kernels. The same {_minutes(recovery):g} minutes of training take the dense model to {adapted:.2f} × on this text."
        f"{_large(decode['measurements'])}</sub>\n\n{_same_bytes(frontier_qwen)}"
    )


def _same_bytes(frontier: Mapping[str, Any]) -> str:
    """llama.cpp's usual files, each above a fit of its size."""
    setting, speeds = frontier["setting"], frontier["speeds"]
    lines = [
        "| 1.5 billion weights, without pruning | file | KL from dense, two texts | decoding, tokens/s |",
        "|---|---|---|---|",
    ]
    for name, shown in _SAME.items():
        cell = frontier["cells"][name]
        kl = ", ".join(kl_text(x["kl"], x["kl_stderr"]) for x in cell["texts"].values())
        speed = speeds["cells"][name]["decode_tokens_per_second"]
        lines.append(f"| {shown} | {cell['bytes'] / 1e6:,.0f} MB | {kl} | {speed:.1f} |")
    return (
        "\n".join(lines)
        + f"\n\n<sub>Qwen2.5-Coder-1.5B, all from the same dense model. KL is of {setting['windows']} windows of "
        f"{setting['eval_seqlen']} tokens of `wiki` and of WikiText-2. Fits are calibrated on `wiki`; "
        "llama.cpp got no importance matrix. The fit of 4.13 bits is an older one, and Q4_K_M and Q3_K_M were judged in bfloat16 "
        "([more](docs/results.md#the-same-on-qwen25-coder-15b)). Settings, errors, other texts and models: "
        "[results](docs/results.md).</sub>\n"
    )


def _minutes(recovery: Mapping[str, Any]) -> float:
    """The shortest recovery."""
    return float(min(c["minutes"] for c in recovery["cells"] if c["kind"] == "recovered"))


def _perplexities(recipes: Mapping[str, Any], recovery: Mapping[str, Any]) -> list[str]:
    text = recipes["evaluation"]["texts"][0]
    dense = recipes["dense"]["evaluation"][text]["perplexity"]
    lines = []
    for recipe, name in _RECIPES.items():
        cells = [c for c in recipes["cells"].values() if c["recipe"] == recipe and not c["changes"]]
        values = [
            over_seeds(some, text)["perplexity"] / dense
            for some in ([c for c in cells if c["sparsity"] == s] for s in _SPARSITIES)
        ]
        lines.append(_row(f"perplexity, × dense: {name}", "1.00", [f"{value:.2f}" for value in values]))
    found = {
        (c["minutes"], c["sparsity"]): c["evaluation"][text]["perplexity"]
        for c in recovery["cells"]
        if c["kind"] == "recovered"
    }
    dense = recovery["dense"]["evaluation"][text]["perplexity"]
    minutes = _minutes(recovery)
    values = [found[minutes, sparsity] / dense for sparsity in _SPARSITIES]
    name = f"`tawny prune`, then {minutes:g} minutes of `tawny recover`"
    return [*lines, _row(f"perplexity, × dense: {name}", "1.00", [f"{value:.2f}" for value in values])]


def _files(recovery: Mapping[str, Any]) -> list[str]:
    sizes = {c["sparsity"]: c["packed"]["file_bytes"] for c in recovery["cells"] if c.get("packed")}
    shown = [f"{sizes[sparsity] / 1e6:.0f} MB" for sparsity in _SPARSITIES]
    dense = recovery["dense"]["packed"]["file_bytes"]
    return [_row("file size, packed", f"{dense / 1e6:.0f} MB", shown)]


def _large(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much faster a larger model decodes at the highest of these sparsities; nothing where that was not measured."""
    found = {name: _speeds(rows, _LARGE, variant)[-1] for variant, name in _VARIANTS.items()}
    said = " and ".join(f"{shown} × ({name})" for name, shown in found.items() if shown != "–")
    return f" {SHAPE_NAMES[_LARGE]} at {_SPARSITIES[-1]:.0%}: {said} of the dense speed." if said else ""


def _speeds(rows: Sequence[Mapping[str, Any]], shape: str, variant: str) -> list[str]:
    """One value for each sparsity, over the tuned dense model."""
    most = max(row["threads"] for row in rows)
    mine = [row for row in rows if row["shape"] == shape and row["threads"] == most]
    found = {row["sparsity"]: row for row in mine if row["variant"] == variant}
    shown = []
    for sparsity in _SPARSITIES:
        base = baseline_of(mine, found[sparsity], "bf16") if sparsity in found else None
        shown.append("–" if base is None else f"{speed(found[sparsity]) / speed(base):.2f}")
    return shown


def _row(name: str, dense: str, values: Sequence[str]) -> str:
    return f"| {name} | {dense} | {' | '.join(values)} |"
