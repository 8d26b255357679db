"""Tables of GGUF files: `tawny fit --to gguf` beside llama.cpp's files of the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.frontier import SOLVERS


def gguf_files(result: Mapping[str, Any]) -> str:
    """Files by size: KL, top-1 and perplexity on each text, and what llama-perplexity says of the KL."""
    setting, cells = result["setting"], result["cells"]
    texts, first = setting["texts"], next(iter(cells.values()))
    dense = ", ".join(f"{first['texts'][text]['dense']:.2f} on {text}" for text in texts)
    lines = [
        f"{setting['model']}, channels scaled, so that nobody meets the grid of the source again. Importance matrix and fits have the "
        f"same {setting['samples']} × {setting['seqlen']} tokens of {', '.join(setting['calibration'])}; fits are solved by "
        f"{SOLVERS[setting['solver']]}. Judged on {setting['windows']} windows of {setting['eval_seqlen']} tokens, in float32. "
        f"Perplexity of the dense model: {dense}.\n",
        "| file | MB | " + " | ".join(f"KL, {text} | top-1 | perplexity" for text in texts) + " |",
        "|---" * (2 + 3 * len(texts)) + "|",
    ]
    for name, cell in sorted(cells.items(), key=lambda item: (item[1]["bytes"], item[0])):
        who, _, kind = name.partition(":")
        named = f"llama.cpp {kind}, importance matrix" if who == "llama" else "**`tawny fit --to gguf`**"
        numbers = " | ".join(
            f"{found['kl']:.4f} ± {found['kl_stderr']:.4f} | {found['top1']:.1%} | {found['perplexity']:.2f}"
            for found in (cell["texts"][text] for text in texts)
        )
        lines.append(f"| {named} | {cell['bytes'] / 1e6:.1f} | {numbers} |")
    ratios = [
        both["llama"]["kl"] / both["tawny"]["kl"]
        for cell in cells.values()
        for both in cell["judges"].values()
    ]
    windows = next(iter(first["judges"].values()))["windows"]
    machine = result["machine"]
    note = f" {result['note']}." if "note" in result else ""
    lines.append(
        f"\n<sub>One seed. At the same positions of {windows} windows, llama-perplexity says {min(ratios):.2f} to {max(ratios):.2f} "
        f"times this KL: it rounds activations to 8 bits. {machine['cpu']}, {machine['threads']} threads, {result['date']}.{note}</sub>\n"
    )
    return "\n".join(lines)
