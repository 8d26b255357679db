"""The table of the one real model of 1.5 billion weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMES = {
    "dense": "dense",
    "default": "`tawny prune`",
    "fast": "`tawny prune -c fast`",
    "best": "`-c fast`, blended and refined,",
    "sparsegpt": "SparseGPT, uniform",
    "official-owl-sparsegpt-70": "OWL + SparseGPT (M = 5, λ = 0.08)",
    "2:4": "`tawny prune -p 2:4 -a uniform`",
}


def evidence(result: Mapping[str, Any]) -> str:
    """Quality on four texts, bytes, speed and cost of each model; only what was measured."""
    cells, setting = result["cells"], result["setting"]
    dense = cells["dense"]["texts"]
    texts = list(dense)
    heads = [f"{text.split('.')[0]}, ×" for text in texts]
    limits = sorted({cell["limit"] for cell in cells.values() if "limit" in cell})
    lines = [
        f"Calibration: {setting['samples']} × {setting['seqlen']} tokens, half wiki and half code. Measured on {setting['windows']} windows of "
        f"{setting['eval_seqlen']} tokens of each text. × is of the dense model, with its standard "
        "error where that is more than a fifth.\n",
        f"| | file | {' | '.join(heads)} | KL on {texts[0]} | KL on {texts[-1]} | {'seven tasks | ' if limits else ''}decode, tokens/s "
        "| prefill, tokens/s | made in | peak memory |",
        f"|---|---|{'---|' * len(texts)}---|---|{'---|' if limits else ''}---|---|---|---|",
    ]
    for name, cell in cells.items():
        quality = []
        for text in texts:
            found = cell["texts"][text]
            quality.append(f"{found['perplexity']:.2f}" if name == "dense" else times(found, dense[text]))
        kl = [
            f"{cell['texts'][text]['kl']:.3f}" if name != "dense" else "0" for text in (texts[0], texts[-1])
        ]
        if limits:
            known = "limit" in cell
            kl.append(f"{cell['mean']:.1%} ± {100 * cell['mean_stderr']:.1f}" if known else "–")
        speeds = [
            f"{cell[key]:.1f}" if key in cell else "–"
            for key in ("decode_tokens_per_second", "prefill_tokens_per_second")
        ]
        if name != "dense" and speeds[0] != "–":
            speeds[0] += f" ({speed_up(cell, cells['dense']):.1f} ×)"
        made = f"{cell['seconds'] / 60:.0f} min" if cell["seconds"] > 30 else "–"
        if made != "–" and cell["measured"]["seconds"]["threads"] == 1:
            made += ", one thread"
        if made != "–" and cell["measured"]["seconds"].get("kernel") == "torch":
            made += ", without our compiled passes"
        if made != "–" and (cpu := cell["measured"]["seconds"]["cpu"]) != result["machine"]["cpu"]:
            made += f", {cpu}"
        memory = f"{cell['peak_memory'] / 1e9:.1f} GB" if cell.get("peak_memory") else "–"
        row = [_named(name), f"{cell['bytes'] / 1e9:.2f} GB", *quality, *kl, *speeds, made, memory]
        lines.append(f"| {' | '.join(row)} |")
    tasks = f" Tasks: the mean of {limits[-1]} documents each." if limits else ""
    lines.append(
        f"\n<sub>{result['machine']['cpu']}, {result['machine']['threads']} threads unless a row says one; other work ran at the same time. One seed.{tasks} Decoding × is relative to the dense model in the same run. The file has the dates.</sub>\n"
    )
    return "\n".join(lines)


def speed_up(cell: Mapping[str, Any], dense: Mapping[str, Any]) -> float:
    """Decoding, as a multiple of the dense model in the same run."""
    key = "decode_tokens_per_second"
    return float(cell[key] / cell.get("dense_decode", dense[key]))


def times(found: Mapping[str, Any], dense: Mapping[str, Any]) -> str:
    """A perplexity as a multiple of the dense one, with its standard error where that is more than a fifth of it."""
    ratio, share = found["perplexity"] / dense["perplexity"], found["stderr"] / found["perplexity"]
    return f"{ratio:.2f}" if share <= 0.2 else f"{ratio:.1f} ± {ratio * share:.1f}"


def _named(name: str) -> str:
    """`fast:0.5:int8` in words."""
    if name.startswith("llama:"):
        return f"llama.cpp {name[6:]}"
    if name.startswith("recovered:"):
        _, minutes, *kind = name.split(":")
        return f"blended and refined, 50%, recovered for {minutes} min{''.join(f', packed {one}' for one in kind)}"
    if name.startswith("int"):
        kind, group = name.split(":")
        return f"{kind}, groups of {group}, no zeros"
    if name in NAMES:
        return NAMES[name]
    recipe, sparsity, *kind = name.split(":")
    return f"{NAMES.get(recipe, recipe)} {float(sparsity):.0%}{''.join(f', packed {one}' for one in kind)}"
