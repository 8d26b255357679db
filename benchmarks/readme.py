"""Put the committed benchmark results into the README: no number in it is typed.

    python benchmarks/readme.py            writes the tables
    python benchmarks/readme.py --check    fails if they are stale

A table stands between `<!-- NAME: … -->` and `<!-- /NAME -->`, NAME being a results file. A result that is not there
yet leaves a line that says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"


def quality(result: Mapping[str, Any]) -> str:
    """One table a text: a row a sparsity and solver, a column an allocator; the best of each row is bold."""
    cells = result["cells"]
    allocators = list(dict.fromkeys(cell["allocator"] for cell in cells))
    rows = list(dict.fromkeys((cell["sparsity"], cell["solver"]) for cell in cells))
    found = {(cell["sparsity"], cell["solver"], cell["allocator"]): cell for cell in cells}
    parts = [_setting(result)]
    for text in result["evaluation"]["texts"]:
        dense = result["dense"][text]
        parts.append(f"Perplexity on {text}, dense **{_value(dense)}**:\n")
        lines = [
            f"| sparsity | solver | {' | '.join(allocators)} | time |",
            f"|---|---|{'---|' * len(allocators)}---|",
        ]
        for sparsity, solver in rows:
            made = [found.get((sparsity, solver, allocator)) for allocator in allocators]
            values = [cell["evaluation"][text] if cell else None for cell in made]
            best = min(value["perplexity"] for value in values if value)
            shown = [_mark(_value(v), v["perplexity"] == best) if v else "–" for v in values]
            seconds = max(cell["seconds"] for cell in made if cell)
            lines.append(f"| {sparsity:.0%} | {solver} | {' | '.join(shown)} | {seconds:.0f} s |")
        parts.append("\n".join(lines) + "\n")
    note = f" {result['note'].capitalize()}." if result.get("note") else ""
    return "\n".join(parts) + f"\n{_machine(result)}".removesuffix("</sub>\n") + f"{note}</sub>\n"


def prune_speed(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    lines = [
        f"{setting['model']}, {setting['samples']} samples × {setting['seqlen']} tokens, {setting['threads']} threads,"
        f" {setting['sparsity']:.0%} sparsity; memory is peak memory above the bare interpreter with its imports.\n",
        "| | official flow | Tawny | faster | memory | of which unavoidable matrix products |",
        "|---|---|---|---|---|---|",
    ]
    for solver, row in result["solvers"].items():
        official, ours = row["official"]["median"], row["tawny"]["median"]
        lines.append(
            f"| owl + {solver} | {official['seconds']:.0f} s, {official['memory'] / 1e6:.0f} MB "
            f"| {ours['seconds']:.0f} s, {ours['memory'] / 1e6:.0f} MB | {row['times_faster']:.1f} × "
            f"| {row['memory_ratio']:.2f} × | {row['unavoidable_share']:.0%} of the time |"
        )
    subset = result["profile_subset"]
    lines.append(
        f"\nThe profile is taken on {subset['samples']} of the {subset['of']} samples; taken on all of them, no block's "
        f"sparsity differs by more than {subset['largest_difference']:.4f}."
    )
    return "\n".join(lines) + f"\n\n{_machine(result)}"


def sizes(result: Mapping[str, Any]) -> str:
    def name(row: Mapping[str, Any]) -> str:
        scales = f", a scale each {row['group']} columns" if row["group"] else ""
        head = f", head {row['head']}" if row["head"] else ""
        return f"packed {row['values']}{scales}{head}"

    lines = [
        f"{result['model']} at {result['sparsity']:.0%}; resident is what loading it adds to a process with its imports.\n",
        "| | file | of the bf16 file | resident once loaded |",
        "|---|---|---|---|",
        f"| bf16 with its zeros | {result['dense_bytes'] / 1e6:.1f} MB | 100 % | |",
    ]
    lines += [
        f"| {name(row)} | {row['bytes'] / 1e6:.1f} MB | {row['ratio'] * 100:.1f} % | {row['resident'] / 1e6:.0f} MB |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + f"\n\n{_machine(result)}"


def tasks(result: Mapping[str, Any]) -> str:
    """Whether the dense model's accuracies are lm-eval's own, and the comparison as it was printed."""
    from tawny.report.comparison import to_markdown

    equal, compared, setting = result["equal"], result["compare"], result["setting"]
    verdict = "equal lm-eval's own to the last digit" if equal["exact"] else "differ from lm-eval's own"
    return (
        f"Pruned with {setting['pruning']}. In float32 the dense model's accuracies on {len(equal['tasks'])} tasks "
        f"{verdict}. The whole table took {compared['seconds'] / 60:.1f} minutes.\n\n"
        f"{to_markdown(compared)}\n{_machine(result)}"
    )


def allocators(result: Mapping[str, Any]) -> str:
    """One table a text: a row a sparsity and solver, a column an allocator; then what each of them costs."""
    cells = list(result["cells"].values())
    names = list(dict.fromkeys(cell["allocator"] for cell in cells))
    rows = list(dict.fromkeys((cell["solver"], cell["sparsity"]) for cell in cells))
    seeds = len({cell["seed"] for cell in cells})
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["solver"], cell["sparsity"], cell["allocator"]), []).append(cell)
    parts = [
        "### Every allocator\n",
        _setting(result) + f"Calibration seeds: {seeds}; ± includes their spread.\n",
    ]
    for text in result["evaluation"]["texts"]:
        parts.append(f"Perplexity on {text}, dense **{_value(result['dense']['evaluation'][text])}**:\n")
        lines = [f"| solver | sparsity | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for solver, sparsity in rows:
            made = [found.get((solver, sparsity, name)) for name in names]
            values = [_over_seeds(group, text) if group else None for group in made]
            best = min(value["perplexity"] for value in values if value)
            shown = [_mark(_value(v), v["perplexity"] == best) if v else "–" for v in values]
            lines.append(f"| {solver} | {sparsity:.0%} | {' | '.join(shown)} |")
        parts.append("\n".join(lines) + "\n")
    lines = [f"| seconds | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for solver in dict.fromkeys(solver for solver, _ in rows):
        times = [
            [c["seconds"] for c in cells if (c["solver"], c["allocator"]) == (solver, name)] for name in names
        ]
        shown = [f"{sum(some) / len(some):.0f}" if some else "–" for some in times]
        lines.append(f"| {solver} | {' | '.join(shown)} |")
    parts.append("Whole runs, mean over sparsities and seeds:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) + f"\n{_machine(result)}"


_QUESTIONS = {
    "lod": "Outliers left by pruning (share of weights above 5 × the mean, averaged over blocks)",
    "granularity": "One OWL ratio for each …",
    "order": "OWL against its opposite and the old baselines",
    "M": "Sensitivity to M, λ = 0.08",
    "lambda": "Sensitivity to λ, M = 5",
    "sweep": "Sparsity",
    "calibration": "Calibration samples",
    "cost": "What an allocator costs",
}


def owl_study(result: Mapping[str, Any]) -> str:
    """One table a question of benchmarks/owl_study.py; a label's value is the mean over its seeds."""
    parts = ["### The claims of OWL, one by one\n", _setting(result)]
    texts = result["evaluation"]["texts"]
    dense = [_value(result["dense"]["evaluation"][text]) for text in texts]
    for question, labels in result["questions"].items():
        groups = {label: _cells_of(result, keys) for label, keys in labels.items()}
        groups = {label: group for label, group in groups.items() if group}
        if not groups:
            continue
        extra = {"lod": ["outliers"], "cost": ["allocating", "whole run"]}.get(question, [])
        lines = [f"| | {' | '.join([*texts, *extra])} |", f"|---|{'---|' * (len(texts) + len(extra))}"]
        if question == "lod":
            lines.append(f"| dense | {' | '.join([*dense, _outliers(result['dense'])])} |")
        for label, group in groups.items():
            shown = [_value(_over_seeds(group, text)) for text in texts]
            if question == "lod":
                shown.append(_outliers(group[0]))
            if question == "cost":
                phases = [cell["phases"] for cell in group]
                shown += [
                    f"{sum(p.get('profile', 0) + p.get('search', 0) for p in phases) / len(phases):.1f} s",
                    f"{sum(cell['seconds'] for cell in group) / len(group):.0f} s",
                ]
            lines.append(f"| {label} | {' | '.join(shown)} |")
        parts.append(f"{_QUESTIONS[question]}:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts) + f"\n{_machine(result)}"


def _cells_of(result: Mapping[str, Any], keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of all seeds that have exactly these keys; results lie beside them under other names."""
    measured = {"seconds", "phases", "achieved", "mean_error", "winner", "evaluation", "lod", "seed"}
    return [
        cell
        for cell in result["cells"].values()
        if {k: v for k, v in cell.items() if k not in measured} == keys
    ]


def _outliers(cell: Mapping[str, Any]) -> str:
    shares = cell["lod"]["shares"]["5"] if "lod" in cell else []
    return f"{sum(shares) / len(shares):.3f} %" if shares else "–"


def _over_seeds(cells: Sequence[Mapping[str, Any]], text: str) -> dict[str, float]:
    """Mean perplexity, and the standard error over windows and seeds together."""
    values = [cell["evaluation"][text]["perplexity"] for cell in cells]
    windows = sum(cell["evaluation"][text]["stderr"] for cell in cells) / len(cells)
    seeds = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"perplexity": sum(values) / len(values), "stderr": (windows**2 + seeds**2) ** 0.5}


def _setting(result: Mapping[str, Any]) -> str:
    seen, measured = result["calibration"], result["evaluation"]
    return (
        f"{result['model']}, calibrated on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']}, measured on "
        f"{measured['windows']} windows of {measured['seqlen']} tokens. ± is the standard error over windows.\n"
    )


def _value(value: Mapping[str, Any]) -> str:
    digits = 2 if value["perplexity"] < 1000 else 0
    return f"{value['perplexity']:,.{digits}f} ± {value['stderr']:,.{digits}f}"


def _mark(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _machine(result: Mapping[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    return (
        f"<sub>{machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )


def recovery(result: Mapping[str, Any]) -> str:
    """One table a text: a row a model, perplexity beside KL and first choices; then the step beside plain training."""
    cells = sorted(result["cells"], key=lambda cell: (cell["sparsity"], cell["minutes"], cell["kind"]))
    seen, measured = result["calibration"], result["evaluation"]
    parts = [
        f"{result['model']}, pruned on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']} and trained on that text; "
        f"measured on {measured['windows']} windows of {measured['seqlen']} tokens. KL and top-1 are against "
        "the dense model. The control is the dense model trained alike.\n"
    ]
    for text in measured["texts"]:
        dense = result["dense"]["evaluation"][text]
        lines = [
            f"Perplexity on {text}, dense **{_value(dense)}**:\n",
            "| sparsity | model | perplexity | × dense | KL | top-1 | packed | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for cell in cells:
            value, packed = cell["evaluation"][text], cell.get("packed")
            name = cell["kind"] + (f", {cell['minutes']:g} min" if cell["minutes"] else "")
            sizes = "– | –"
            if packed:
                sizes = f"{packed['file_bytes'] / 1e6:.0f} MB | {packed['decode_tokens_per_second']:.0f}"
            lines.append(
                f"| {cell['sparsity']:.0%} | {name} | {_value(value)} | {value['perplexity'] / dense['perplexity']:.2f} "
                f"| {value['kl']:.3f} | {value['top1']:.1%} | {sizes} |"
            )
        parts.append("\n".join(lines) + "\n")
    if step := result.get("step"):
        names = {
            "plain-float32": "plain, float32",
            "plain-bfloat16": "plain, bfloat16 autocast",
            "tawny": "Tawny",
        }
        rows = [
            f"| {name} | {step[key]['memory'] / 1e6:.0f} MB | {step[key]['tokens_per_second']:.0f} |"
            for key, name in names.items()
        ]
        parts.append(
            f"A training step at {step['sparsity']:.0%}, {step['batch']} × {step['seqlen']} tokens; memory is peak memory above the "
            f"bare interpreter. The teacher's forwards come on top ({step['tawny']['teacher_seconds']:.0f} s for "
            f"{step['steps']} steps).\n\n| | memory | tokens/s |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts) + f"\n{_machine(result)}"


TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "quality": quality,
    "tasks": tasks,
    "allocators": allocators,
    "owl_study": owl_study,
    "prune_speed": prune_speed,
    "sizes": sizes,
    "recovery": recovery,
}
# Sections that bring their heading along and are not there at all until they are measured.
OPTIONAL = {"allocators", "owl_study", "recovery"}


def render(page: str) -> str:
    """The page with every table made anew."""
    for name, table in TABLES.items():
        path = RESULTS / f"{name}.json"
        if path.is_file():
            made = table(json.loads(path.read_text(encoding="utf-8")))
        elif name in OPTIONAL:
            made = ""
        else:
            made = f"Not measured yet (`benchmarks/{name}.py`).\n"
        head = f"<!-- {name}: made by benchmarks/readme.py from benchmarks/results/{name}.json -->"
        block = f"{head}\n\n{made}\n<!-- /{name} -->" if made else f"{head}\n<!-- /{name} -->"
        pattern = rf"<!-- {name}:.*?<!-- /{name} -->"
        page, count = re.subn(pattern, lambda _, block=block: block, page, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md has {count} places for {name}, expected one")
    return page


def main() -> int:
    page = README.read_text(encoding="utf-8")
    made = render(page)
    if "--check" in sys.argv[1:]:
        if made != page:
            print("the tables of README.md are stale: run `make docs`", file=sys.stderr)
        return int(made != page)
    README.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
