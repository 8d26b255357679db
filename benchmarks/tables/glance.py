"""The tables of the README: what pruning one model costs and brings, and what it has at the bytes of another tool's file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tables.evidence import speed_up, times
from tables.shared import SHAPE_NAMES
from tables.speed import baseline_of, speed
from tawny.words import kl_text

_SPARSITIES = (0.5, 0.6)
_MODELS = {
    "official-owl-sparsegpt-70:{}": "OWL and SparseGPT (M = 5, λ = 0.08)",
    "fast:{}": "`tawny prune -c fast`",
    "best:{}": "`tawny prune -c best`",
    "recovered:{minutes}": "`tawny prune -c best`, then {minutes} minutes of `tawny recover`",
}
_PACKED = "fast:{}:int8"
_SAME = {
    "llama:Q4_K_M": "llama.cpp Q4_K_M",
    "fit:5": "`tawny fit --bits 5`",
    "llama:Q3_K_M": "llama.cpp Q3_K_M",
    "fit:4.13": "`tawny fit --bits 4.13`",
    "llama:Q2_K": "llama.cpp Q2_K",
    "fit:3.38": "`tawny fit --bits 3.38`",
}
_LARGE, _LARGE_SPARSITY = "7b", 0.7  # the shape whose speed the note adds
_VARIANTS = {"packed bf16": "bf16", "packed int8, int8 head": "int8 with its head"}


def glance(
    evidence: Mapping[str, Any],
    recovery: Mapping[str, Any],
    decode: Mapping[str, Any],
    frontier_qwen: Mapping[str, Any],
) -> str:
    """What pruning one real model costs and brings; and what has the bytes of another tool's file.

    Args:
        evidence, recovery, decode, frontier_qwen: the results files of these names.
    """
    cells, setting = evidence["cells"], evidence["setting"]
    dense = cells["dense"]
    texts = list(dense["texts"])
    trained = (name.split(":") for name in cells if name.startswith("recovered:"))
    minutes = next((parts[1] for parts in trained if len(parts) == 2), "60")

    def row(name: str, pattern: str, shown: Callable[[Mapping[str, Any]], str]) -> str:
        """`–` where nothing was measured. A name without a sparsity stands under 50 %."""
        names = [
            pattern.format(s, minutes=minutes) if "{}" in pattern or s == _SPARSITIES[0] else ""
            for s in _SPARSITIES
        ]
        return f"| {name.format(minutes=minutes)} | {' | '.join(shown(cells[cell]) if cell in cells else '–' for cell in names)} |"

    def quality(cell: Mapping[str, Any]) -> str:
        """On the first text and on the last."""
        return ", ".join(times(cell["texts"][text], dense["texts"][text]) for text in (texts[0], texts[-1]))

    def size(cell: Mapping[str, Any]) -> str:
        return f"{cell['bytes'] / 1e9:.2f} GB"

    def faster(cell: Mapping[str, Any]) -> str:
        return f"{speed_up(cell, dense):.1f}" if "decode_tokens_per_second" in cell else "–"

    rows = [row(name, pattern, quality) for pattern, name in _MODELS.items()]
    unmeasured = "|" + " – |" * len(_SPARSITIES)
    lines = [
        f"| Qwen2.5-Coder-1.5B: perplexity on `wiki` and on code, × dense | {' | '.join(f'{s:.0%}' for s in _SPARSITIES)} |",
        f"|---|{'---|' * len(_SPARSITIES)}",
        *(shown for shown in rows if not shown.endswith(unmeasured)),
        row(f"file size, packed in int8 (dense: {size(dense)})", _PACKED, size),
        row("decoding speed, packed in int8, × dense", _PACKED, faster),
    ]
    return (
        "\n".join(lines)
        + f"\n\n<sub>Calibrated on {setting['samples']} × {setting['seqlen']} tokens, half of each, measured on {setting['windows']} × "
        f"{setting['eval_seqlen']} of each. No calibration saw the measured code. ± is the standard error, where it is more than a fifth. "
        "M and λ are those of OWL's authors for 70%, in our transcription of their method. Decoded on two CPU threads; the dense baseline uses our own tuned kernels. "
        "The gain is a tenth more than the bytes explain, because this baseline does not reach the limit of memory."
        f"{_trained(recovery)}{_large_shape(decode['measurements'])}</sub>\n\n{_same_bytes(frontier_qwen)}"
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
        "([more](docs/results/frontier.md#the-same-on-qwen25-coder-15b)). Settings, errors, other texts and models: "
        "[results](docs/results/README.md).</sub>\n"
    )


def _trained(recovery: Mapping[str, Any]) -> str:
    """What the shortest training makes of that model, and of the dense one, on the trained text first."""
    texts = recovery["evaluation"]["texts"]
    minutes = min(cell["minutes"] for cell in recovery["cells"] if cell["kind"] == "recovered")
    said = []
    for text in texts:
        dense = recovery["dense"]["evaluation"][text]["perplexity"]
        ratios = {
            (cell["kind"], cell["minutes"], cell["sparsity"]): cell["evaluation"][text]["perplexity"] / dense
            for cell in recovery["cells"]
        }
        shown = [
            f"{ratios['one-shot', 0, sparsity]:.2f} → {ratio:.2f} × at {sparsity:.0%}"
            for (kind, after, sparsity), ratio in sorted(ratios.items())
            if (kind, after) == ("recovered", minutes)
        ]
        (control,) = (
            ratio for (kind, after, _), ratio in ratios.items() if (kind, after) == ("control", minutes)
        )
        name = text.split(".")[0]
        said.append(f"{', '.join(shown)} on `{name}` (the dense model, trained alike: {control:.2f} ×)")
    return (
        " A small model loses more, and training recovers more: "
        f"with {minutes:g} minutes of `tawny recover` on `{texts[0]}`, SmolLM2-135M goes from {'; '.join(said)}."
    )


def _large_shape(rows: Sequence[Mapping[str, Any]]) -> str:
    """How much faster a larger model decodes; nothing where that was not measured."""
    most = max(row["threads"] for row in rows)
    mine = [row for row in rows if row["shape"] == _LARGE and row["threads"] == most]
    said = []
    for variant, name in _VARIANTS.items():
        for one in mine:
            base = baseline_of(mine, one, "bf16")
            if one["sparsity"] == _LARGE_SPARSITY and one["variant"] == variant and base is not None:
                said.append(f"{speed(one) / speed(base):.2f} × ({name})")
    return (
        f" {SHAPE_NAMES[_LARGE]} at {_LARGE_SPARSITY:.0%}: {' and '.join(said)} of the dense speed."
        if said
        else ""
    )
