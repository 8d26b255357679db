"""What the tables share: means over seeds, and how a value, a setting and a machine are said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import stdev
from typing import Any

SOLVERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
ALLOCATORS = ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend", "auto")
SHAPE_NAMES = {"1.1b": "LLaMA-shaped, 1.1B", "7b": "LLaMA-shaped, 7B", "smollm2": "SmolLM2-135M"}


def over_seeds(cells: Sequence[Mapping[str, Any]], text: str) -> dict[str, float]:
    """Mean perplexity, and the standard error over windows and seeds together."""
    values = [cell["evaluation"][text]["perplexity"] for cell in cells]
    windows = sum(cell["evaluation"][text]["stderr"] for cell in cells) / len(cells)
    seeds = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"perplexity": sum(values) / len(values), "stderr": (windows**2 + seeds**2) ** 0.5}


def seeds_line(groups: Mapping[str, Iterable[Sequence[Any]]]) -> str:
    """How many seeds each row or column was made with, the exceptions by name."""
    counts = {name: sorted(len(cells) for cells in some) for name, some in groups.items()}
    said = {
        name: str(some[0]) if some[0] == some[-1] else f"{some[0]} to {some[-1]}"
        for name, some in counts.items()
    }
    usual = Counter(said.values()).most_common(1)[0][0]
    others = ", ".join(f"{name} {count}" for name, count in said.items() if count != usual)
    spread = "; ± includes their spread" if max(some[-1] for some in counts.values()) > 1 else ""
    return f"Calibration seeds: {usual}{f' ({others})' if others else ''}{spread}.\n"


def threads_of(result: Mapping[str, Any]) -> str:
    counts = sorted({int(cell["threads"]) for cell in result["cells"].values()})
    return f"{' or '.join(map(str, counts))} thread{'s' * (counts != [1])}"


def setting_line(result: Mapping[str, Any]) -> str:
    seen, measured = result["calibration"], result["evaluation"]
    return (
        f"{result['model']}, calibrated on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']}, measured on "
        f"{measured['windows']} windows of {measured['seqlen']} tokens. ± is the standard error over windows.\n"
    )


def plus_minus(value: Mapping[str, Any]) -> str:
    digits = 2 if value["perplexity"] < 1000 else 0
    return f"{value['perplexity']:,.{digits}f} ± {value['stderr']:,.{digits}f}"


def bold_if(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def machine_line(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"<sub>{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )


def machine_and_note(result: Mapping[str, Any]) -> str:
    """The machine, and what else must be known of these numbers."""
    note = f" {result['note'].capitalize()}." if result.get("note") else ""
    return machine_line(result).removesuffix("</sub>\n") + f"{note}</sub>\n"


def known_order(order: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    """Sorts names that are known as they are known, and others behind them."""
    return lambda name: (order.index(name) if name in order else len(order), name)
