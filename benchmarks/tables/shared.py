"""What the tables share: means over seeds, and how a value, a setting and a machine are said."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import stdev
from typing import Any

SOLVERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")
WHOLE_SOLVERS = ("obs", "flap", "wanda", "magnitude", "divergence", "influence", "svd")
ALLOCATORS = ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend", "auto")
SHAPE_NAMES = {
    "1.1b": "LLaMA-shaped, 1.1B",
    "7b": "LLaMA-shaped, 7B",
    "smollm2": "SmolLM2-135M",
    "qwen3-moe": "128 experts, two blocks of the shape of Qwen3-30B-A3B",
}


def over_seeds(cells: Sequence[Mapping[str, Any]], text: str) -> dict[str, float]:
    """Mean perplexity, and the standard error over windows and seeds together."""
    values = [cell["evaluation"][text]["perplexity"] for cell in cells]
    windows = sum(cell["evaluation"][text]["stderr"] for cell in cells) / len(cells)
    seeds = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"perplexity": sum(values) / len(values), "stderr": (windows**2 + seeds**2) ** 0.5}


def seeds_line(groups: Mapping[str, Iterable[Sequence[Any]]]) -> str:
    """How many seeds the cells of each row or column were made with, the exceptions by name."""
    made = {name: sorted(len(cells) for cells in some if cells) for name, some in groups.items()}
    counts = {name: some for name, some in made.items() if some}
    named: dict[str, list[str]] = {}
    for name, some in counts.items():
        said = str(some[0]) if some[0] == some[-1] else f"{some[0]} to {some[-1]}"
        named.setdefault(said, []).append(name)
    usual = max(named, key=lambda said: len(named[said]))
    others = "; ".join(f"{said}: {', '.join(names)}" for said, names in named.items() if said != usual)
    spread = "; ± includes their spread" if max(some[-1] for some in counts.values()) > 1 else ""
    return f"Calibration seeds: {usual}{f' ({others})' if others else ''}{spread}.\n"


def threads_of(cells: Iterable[Mapping[str, Any]]) -> str:
    counts = sorted({int(cell["threads"]) for cell in cells})
    return f"{' or '.join(map(str, counts))} thread{'s' * (counts != [1])}"


def cpus_of(cells: Iterable[Mapping[str, Any]]) -> list[str]:
    """The CPUs that cells were made on, that of most of them first."""
    return [cpu for cpu, _ in Counter(cell["cpu"] for cell in cells).most_common()]


def seconds_table(
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    value: Callable[[Sequence[float]], float],
) -> str:
    """What whole runs took; times of two CPUs or two numbers of threads cannot be compared, so each has rows of its own.

    Args:
        rows: by label, the cells of each column.
        value: of the seconds that cells of one machine and one place in the table took.
    """
    every = [cell for places in rows.values() for cells in places for cell in cells]
    cpus, counts = cpus_of(every), sorted({int(cell["threads"]) for cell in every}, reverse=True)
    lines = [f"| seconds | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for cpu, count in itertools.product(cpus, counts):
        where = f", {cpu}" * (len(cpus) > 1)
        where += f", {count} thread{'s' * (count > 1)}" * (len(counts) > 1)
        for label, places in rows.items():
            times = [
                [cell["seconds"] for cell in cells if (cell["cpu"], cell["threads"]) == (cpu, count)]
                for cells in places
            ]
            if any(times):
                shown = [f"{value(some):.0f}" if some else "–" for some in times]
                lines.append(f"| {label}{where} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def setting_line(result: Mapping[str, Any]) -> str:
    seen, measured = result["calibration"], result["evaluation"]
    begun = ", each begun with BOS" if measured.get("bos") else ""
    return (
        f"{result['model']}, calibrated on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']}, measured on "
        f"{measured['windows']} windows of {measured['seqlen']} tokens{begun}. ± is the standard error over windows.\n"
    )


def plus_minus(value: Mapping[str, Any]) -> str:
    digits = 2 if value["perplexity"] < 1000 else 0
    return f"{value['perplexity']:,.{digits}f} ± {value['stderr']:,.{digits}f}"


def bold_if(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def machine_line(result: Mapping[str, Any]) -> str:
    return _machine_line(result, [result["machine"]["cpu"]], [result["machine"]])


def _machine_line(
    result: Mapping[str, Any], cpus: Sequence[str], threads: Iterable[Mapping[str, Any]]
) -> str:
    versions = result["versions"]
    return (
        f"<sub>{' and '.join(cpus)}, {threads_of(threads)}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )


def machine_and_note(result: Mapping[str, Any]) -> str:
    """The machine, or the machines where a study's cells say theirs, and what else must be known of these numbers."""
    cells = result["cells"]
    if isinstance(cells, Mapping):
        line = _machine_line(result, cpus_of(cells.values()), cells.values())
    else:
        line = machine_line(result)
    return noted(line, result)


def noted(line: str, result: Mapping[str, Any]) -> str:
    """A line about the machine, with what else must be known of these numbers."""
    said = result.get("note", "")
    note = f" {said[0].upper()}{said[1:]}." if said else ""
    return line.removesuffix("</sub>\n") + f"{note}</sub>\n"


def judged_otherwise(cells: Mapping[str, Any]) -> tuple[set[str], str]:
    """The rows beside which the dense model has another perplexity than beside the first, and a sentence that says so.

    They were judged on another machine, in products of other types.
    """
    first, *_ = cells.values()
    text, found = next(iter(first["texts"].items()))
    others = {
        name: measured["texts"][text]["dense"]
        for name, measured in cells.items()
        if abs(measured["texts"][text]["dense"] / found["dense"] - 1) > 1e-4
    }
    if not others:
        return set(), ""
    dense = " or ".join(f"{value:.2f}" for value in sorted(set(others.values())))
    return set(others), (
        f" Rows with * were judged in other arithmetic, in which the dense model has {dense} on {text}: a small difference between "
        "a row with * and a row without is not significant."
    )


def known_order(order: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    """Sorts known names in their order, and others after them."""
    return lambda name: (order.index(name) if name in order else len(order), name)
