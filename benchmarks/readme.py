"""Put the committed benchmark results into the README and the pages of docs/ that show some: no number in them is typed.

    python benchmarks/readme.py            writes the tables
    python benchmarks/readme.py --check    fails if they are stale

A table stands between `<!-- NAME: … -->` and `<!-- /NAME -->`, NAME being a results file. A result that is not there
yet leaves a line that says so.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


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

    if "compare" not in result:
        return "Not measured to the end yet (`benchmarks/tasks.py`).\n"
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
    names = sorted({cell["allocator"] for cell in cells}, key=_place(_ALLOCATORS))
    rows = sorted(
        {(cell["solver"], cell["sparsity"]) for cell in cells},
        key=lambda row: (_place(_SOLVERS)(row[0]), row[1]),
    )
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["solver"], cell["sparsity"], cell["allocator"]), []).append(cell)
    parts = [
        _setting(result) + _seeds({name: [c for key, c in found.items() if key[2] == name] for name in names})
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
    parts += _what_auto_brings(found, result["evaluation"]["texts"])
    lines = [f"| seconds | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for solver in dict.fromkeys(solver for solver, _ in rows):
        times = [
            [c["seconds"] for c in cells if (c["solver"], c["allocator"]) == (solver, name)] for name in names
        ]
        shown = [f"{sum(some) / len(some):.0f}" if some else "–" for some in times]
        lines.append(f"| {solver} | {' | '.join(shown)} |")
    parts.append(
        f"Whole runs, {_threads(result)} each, mean over sparsities and seeds:\n\n" + "\n".join(lines) + "\n"
    )
    return "\n".join(parts) + f"\n{_with_note(result)}"


def _what_auto_brings(
    found: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]], texts: Sequence[str]
) -> list[str]:
    """A line a text: the searched allocation beside the best single one and beside uniform, over the seeds it was run with."""
    singles = [name for name in dict.fromkeys(name for *_, name in found) if name != "auto"]
    lines = []
    for text in texts:
        over_best, over_uniform = [], []
        for solver, sparsity in [row for *row, name in found if name == "auto"]:
            searched = found[solver, sparsity, "auto"]
            seeds = {cell["seed"] for cell in searched}
            rivals = {}
            for name in singles:
                cells = [c for c in found.get((solver, sparsity, name), ()) if c["seed"] in seeds]
                if len(cells) == len(seeds):
                    rivals[name] = _over_seeds(cells, text)["perplexity"]
            if "uniform" in rivals:
                auto = _over_seeds(searched, text)["perplexity"]
                over_best.append(auto / min(rivals.values()) - 1)
                over_uniform.append(auto / rivals["uniform"] - 1)
        if over_best:
            lines.append(
                f"On {text}, `auto` beside the best single allocator of each row: {min(over_best):+.1%} to "
                f"{max(over_best):+.1%}; beside uniform: {min(over_uniform):+.1%} to {max(over_uniform):+.1%}.\n"
            )
    return lines


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
    parts = [_setting(result)]
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
    return "\n".join(parts) + f"\n{_with_note(result)}"


def recipes(result: Mapping[str, Any]) -> str:
    """One table a text: a row a product, for every sparsity its perplexity and how far from the first row's it is, over the seeds that both have."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in result["cells"].values():
        name = ", ".join([cell["recipe"], *cell["changes"]])
        groups.setdefault((name, cell["sparsity"]), []).append(cell)
    # The authors' choices first, whatever was measured or measured again last: the others are compared with them.
    names = sorted(
        dict.fromkeys(name for name, _ in groups), key=lambda name: not name.startswith("official")
    )
    sparsities = sorted({sparsity for _, sparsity in groups})
    parts = [
        _setting(result)
        + _seeds({name: [c for key, c in groups.items() if key[0] == name] for name in names})
    ]
    for text in result["evaluation"]["texts"]:
        parts.append(f"Perplexity on {text}, dense **{_value(result['dense']['evaluation'][text])}**:\n")
        lines = [
            f"| recipe | {' | '.join(f'{s:.0%}' for s in sparsities)} |",
            f"|---|{'---|' * len(sparsities)}",
        ]
        for name in names:
            shown = []
            for sparsity in sparsities:
                cells, first = groups.get((name, sparsity)), groups.get((names[0], sparsity))
                if not cells:
                    shown.append("–")
                    continue
                change = _change(cells, first, text) if first and name != names[0] else ""
                shown.append(_value(_over_seeds(cells, text)) + change)
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines) + "\n")
    lines = [
        f"| seconds | {' | '.join(f'{s:.0%}' for s in sparsities)} |",
        f"|---|{'---|' * len(sparsities)}",
    ]
    for name in names:
        times = [groups.get((name, sparsity), []) for sparsity in sparsities]
        shown = [f"{sum(c['seconds'] for c in some) / len(some):.0f}" if some else "–" for some in times]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    parts.append("\n".join(lines) + "\n")
    return "\n".join(parts) + f"\n{_with_note(result)}"


def _change(cells: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], text: str) -> str:
    """How far below or above others, over the seeds that both have."""
    shared = {cell["seed"] for cell in cells} & {cell["seed"] for cell in others}
    if not shared:
        return ""
    ours, theirs = (
        _over_seeds([cell for cell in some if cell["seed"] in shared], text)["perplexity"]
        for some in (cells, others)
    )
    return f" ({ours / theirs - 1:+.0%})"


def solvers(result: Mapping[str, Any]) -> str:
    """One table a text: a row a solver and what follows it, a column a sparsity; then errors of linears, and times."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for cell in result["cells"].values():
        steps = [word for word, key in (("refit", "refit"), ("refine", "refine.epochs")) if cell.get(key)]
        name = (cell["solver"], " + ".join([cell["solver"], *steps]))
        groups.setdefault((*name, cell["sparsity"]), []).append(cell)
    names = sorted({name[:2] for name in groups}, key=lambda name: (_place(_SOLVERS)(name[0]), name[1]))
    sparsities = sorted({sparsity for *_, sparsity in groups})
    head = [f"{' | '.join(f'{s:.0%}' for s in sparsities)} |", f"|---|{'---|' * len(sparsities)}"]

    def table(title: str, shown: Callable[[Sequence[Mapping[str, Any]]], str]) -> str:
        lines = [f"| {title} | {head[0]}", head[1]]
        for name in names:
            made = [groups.get((*name, sparsity)) for sparsity in sparsities]
            lines.append(f"| {name[1]} | {' | '.join(shown(some) if some else '–' for some in made)} |")
        return "\n".join(lines) + "\n"

    def mean(cells: Sequence[Mapping[str, Any]], key: str) -> float:
        return float(sum(cell[key] for cell in cells)) / len(cells)

    parts = [
        _setting(result)
        + _seeds({name[1]: [c for key, c in groups.items() if key[:2] == name] for name in names})
    ]
    for text in result["evaluation"]["texts"]:
        dense = _value(result["dense"]["evaluation"][text])
        parts.append(f"Perplexity on {text}, dense **{dense}**:\n")
        parts.append(table("solver", lambda some, text=text: _value(_over_seeds(some, text))))
    parts.append("Share of a linear's output energy that was lost, mean over linears:\n")
    parts.append(table("error", lambda some: f"{mean(some, 'mean_error'):.2%}"))
    parts.append(f"Whole runs, {_threads(result)} each:\n")
    parts.append(table("seconds", lambda some: f"{mean(some, 'seconds'):.0f}"))
    return "\n".join(parts) + f"\n{_with_note(result)}"


def _cells_of(result: Mapping[str, Any], keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of all seeds that have exactly these keys; results lie beside them under other names."""
    measured = {
        "seconds",
        "threads",
        "phases",
        "achieved",
        "mean_error",
        "winner",
        "evaluation",
        "lod",
        "seed",
    }
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


def decode(result: Mapping[str, Any]) -> str:
    """What a user gains: whole models, packed beside dense, and the two warnings that belong beside any such number."""
    rows = result["measurements"]
    most = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == most]
    parts = ["### What you gain\n"]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        for dtype in ("bf16", "f32"):
            parts += _gains(shape, dtype, mine)
    parts.append(
        "*Dense, tuned* is the same model with our best dense matrix–vector kernel in the same decoder: the honest "
        "baseline. *transformers* is its own forward, cache and linears. Ratios are of medians taken in turns in one "
        "process; random weights stand in for the LLaMA shapes, pruned by magnitude. File sizes of those count tensors.\n"
    )
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [
            row["decode_tokens_per_second"]
            for row in rows
            if row["shape"] == shape and row["variant"].startswith("dense shared")
        ]
        if len(own) > 1:
            parts.append(
                f"{SHAPE_NAMES.get(shape, shape)}: each sparsity ran in a process of its own, in turns with a dense model of "
                f"its own ({min(own):.1f} to {max(own):.1f} tokens/s, as the machine's memory speed changed), and the ratios are to "
                "that one. Compare these rows by ratio, not by tokens/s.\n"
            )
    parts.append(_warnings(rows))
    versions = result["versions"]
    parts.append(
        f"<sub>{result['machine']['cpu']}, {most} threads, kernel {result['kernel']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )
    return "\n".join(parts)


SHAPE_NAMES = {"1.1b": "LLaMA-shaped, 1.1B", "7b": "LLaMA-shaped, 7B", "smollm2": "SmolLM2-135M"}


def _gains(shape: str, dtype: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table; nothing where the shape was not measured in this type."""

    def speed(row: Mapping[str, Any] | None) -> float | None:
        return None if row is None else row["decode_tokens_per_second"]

    def find(variant: str, group: int | None = None) -> Mapping[str, Any] | None:
        return next(
            (r for r in rows if r["variant"] == variant and (group is None or r["group"] == group)), None
        )

    kinds = ("packed f32",) if dtype == "f32" else ("packed bf16", "packed int8")
    packed = [row for row in rows if row["variant"].startswith(kinds)]
    theirs, tuned, shared = (find(f"{name} {dtype}") for name in ("transformers", "dense", "dense shared"))
    if not packed or tuned is None:
        return []
    lines = [
        f"{SHAPE_NAMES.get(shape, shape)}, {'float32' if dtype == 'f32' else 'bfloat16'}:\n",
        "| | sparsity | decode, tokens/s | × dense, tuned | × transformers | prefill, tokens/s | memory | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (theirs, tuned, *sorted(packed, key=lambda r: (r["variant"], r["sparsity"]))):
        if row is None:
            continue
        # The baseline of a row's own process where it has one; the chain to transformers goes over it.
        base = find(f"dense shared {dtype}", row["group"]) or find(f"dense {dtype}", row["group"]) or tuned
        over = speed(row) / speed(base)
        chain = None
        if theirs is not None:
            first = shared if base["variant"].startswith("dense shared") and shared is not None else tuned
            chain = over * speed(first) / speed(theirs)
        if row in (theirs, tuned):
            over, chain = speed(row) / speed(tuned), speed(row) / speed(theirs) if theirs else None
        name = {"transformers": "transformers", "dense": "dense, tuned"}.get(
            row["variant"].split()[0], row["variant"]
        )
        sparsity = "" if row["sparsity"] is None else f"{row['sparsity']:.0%}"
        prefill = row.get("prefill_tokens_per_second")
        lines.append(
            f"| {name} | {sparsity} | {speed(row):,.1f} | {over:.2f} | {'–' if chain is None else f'{chain:.2f}'} "
            f"| {'–' if prefill is None else f'{prefill:,.0f}'} | {row['resident_bytes'] / 1e9:.2f} GB "
            f"| {row['file_bytes'] / 1e9:.2f} GB |"
        )
    return ["\n".join(lines) + "\n"]


def _warnings(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two things that a table of ratios hides, with the numbers of the format and of these results."""
    mask, q4 = 1 / 8, 0.5625
    bf16, int8 = 2 * 0.3 + mask, 0.3 + mask
    lines = [
        "Two warnings. **Bytes decide decoding, and 4-bit weights have few of them:** a weight of a 70 % sparse model "
        f"takes {bf16:.3f} bytes packed as bf16 and {int8:.3f} as int8; llama.cpp's dense Q4_0 takes {q4:.4f}. Packed "
        f"int8 is smaller than Q4_0 only above {1 - (q4 - mask):.0%} sparsity, packed bf16 above "
        f"{1 - (q4 - mask) / 2:.0%}."
    ]
    small = {(r["variant"], r["sparsity"]): r["file_bytes"] for r in rows if r["shape"] == "smollm2"}
    dense, plain, headed = (
        small.get(key)
        for key in (("dense bf16", None), ("packed int8", 0.7), ("packed int8, int8 head", 0.7))
    )
    head = "**The head stays dense unless you ask:** embeddings and head are not pruned"
    if dense and plain and headed:
        head += (
            f"; in SmolLM2 they are so large a part that 70 % packed int8 is {plain / dense:.0%} of the dense file, and "
            f"{headed / dense:.0%} with `--head int8`"
        )
    lines.append(head + ". [Why is it not faster?](docs/why-not-faster.md)")
    return " ".join(lines) + "\n"


def kernels(result: Mapping[str, Any]) -> str:
    """One linear: packed beside every other product there is, one token; then more tokens."""
    rows = result["measurements"]
    shape = max((tuple(row["shape"]) for row in rows), key=lambda s: (s == (4096, 4096), s[0] * s[1]))
    rows = [row for row in rows if tuple(row["shape"]) == shape]
    parts = [f"### One linear, {shape[0]} × {shape[1]}\n"]
    for threads in sorted({row["threads"] for row in rows}):
        parts += _one_token([r for r in rows if r["threads"] == threads and r["columns"] == 1], threads)
    parts += _many_tokens(rows)
    machine = result["machine"]
    parts.append(
        f"<sub>{machine['cpu']}, kernel {machine['kernel']}, torch {machine['torch']}, {result['date']}; all sizes, "
        "sparsities and quartiles in benchmarks/results/kernels.json.</sub>\n"
    )
    return "\n".join(parts)


def _one_token(rows: Sequence[Mapping[str, Any]], threads: int) -> list[str]:
    found = {(row["variant"], row["sparsity"]): row for row in rows}
    base, torch_bf16 = found.get(("dense bf16", None)), found.get(("torch bf16", None))
    limit, torch_f32 = found.get(("stream", None)), found.get(("torch f32", None))
    if not (base and torch_bf16 and limit):
        return []
    lines = [
        f"One token, {threads} thread{'s' * (threads > 1)} (streaming limit {limit['gigabytes_per_second']:.1f} GB/s, "
        f"our dense bf16 at {base['gigabytes_per_second'] / limit['gigabytes_per_second']:.0%} of it):\n",
        "| sparsity | packed bf16 × our dense bf16 | × torch bf16 | of the limit | packed int8 × our dense bf16 "
        "| packed f32 × torch f32 | torch CSR × torch f32 |",
        "|---|---|---|---|---|---|---|",
    ]

    def over(row: Mapping[str, Any] | None, other: Mapping[str, Any] | None) -> str:
        return f"{other['microseconds'] / row['microseconds']:.2f}" if row and other else "–"

    for sparsity in sorted({row["sparsity"] for row in rows if row["variant"] == "packed bf16"}):
        packed = found[("packed bf16", sparsity)]
        share = packed["gigabytes_per_second"] / limit["gigabytes_per_second"]
        lines.append(
            f"| {sparsity:.0%} | {over(packed, base)} | {over(packed, torch_bf16)} | {share:.0%} "
            f"| {over(found.get(('packed int8', sparsity)), base)} "
            f"| {over(found.get(('packed f32', sparsity)), torch_f32)} "
            f"| {over(found.get(('torch CSR f32', sparsity)), torch_f32)} |"
        )
    return ["\n".join(lines) + "\n"]


def _many_tokens(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    threads = max(row["threads"] for row in rows)
    found = {
        (row["variant"], row["sparsity"], row["columns"]): row["microseconds"]
        for row in rows
        if row["threads"] == threads
    }
    columns = sorted({key[2] for key in found if ("torch bf16", None, key[2]) in found})
    sparsities = [s for s in (0.5, 0.7, 0.8) if any(("packed bf16", s, c) in found for c in columns)]
    if len(columns) < 2 or not sparsities:
        return []
    lines = [
        f"More tokens at once, {threads} thread{'s' * (threads > 1)}, packed bf16 over torch bf16:\n",
        f"| sparsity | {' | '.join(map(str, columns))} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for sparsity in sparsities:
        cells = []
        for count in columns:
            time = found.get(("packed bf16", sparsity, count))
            cells.append(f"{found[('torch bf16', None, count)] / time:.2f}" if time else "–")
        lines.append(f"| {sparsity:.0%} | {' | '.join(cells)} |")
    return ["\n".join(lines) + "\n"]


def peers(result: Mapping[str, Any]) -> str:
    """Other engines on the same machine, or why there is no number."""
    rows = result["measurements"]
    parts = ["### Peers\n"]
    models = [row for row in rows if row["peer"] == "llama.cpp"]
    if models:
        lines = [
            "| llama.cpp (dense) | decode, tokens/s | prefill, tokens/s | file |",
            "|---|---|---|---|",
        ]
        for row in models:
            lines.append(
                f"| {SHAPE_NAMES.get(row['shape'], row['shape'])}, {row['kind']} "
                f"| {row['decode_tokens_per_second']:,.1f} | {row['prefill_tokens_per_second']:,.0f} "
                f"| {row['file_bytes'] / 1e9:.2f} GB |"
            )
        parts.append("\n".join(lines) + "\n")
    chains = {
        (r["kind"] if r["peer"] == "here" else r["peer"], r["sparsity"]): r for r in rows if "blocks" in r
    }
    if chains:
        kinds = list(dict.fromkeys(kind for kind, _ in chains))
        blocks = next(iter(chains.values()))["blocks"]
        lines = [
            f"Linears of {blocks} blocks of the 1.1B shape, one token, float32, milliseconds:\n",
            f"| sparsity | {' | '.join(kinds)} |",
            f"|---|{'---|' * len(kinds)}",
        ]
        for sparsity in sorted({sparsity for _, sparsity in chains}):
            cells = [chains.get((kind, sparsity)) for kind in kinds]
            shown = " | ".join("–" if cell is None else f"{cell['milliseconds']:.2f}" for cell in cells)
            lines.append(f"| {sparsity:.0%} | {shown} |")
        parts.append("\n".join(lines) + "\n")
    for error in result["errors"]:
        last = error["error"].strip().splitlines()[-1]
        parts.append(f"{error['peer']} could not be measured here: `{last[:200]}`\n")
    parts.append(f"<sub>{result['machine']['cpu']}, {result['date']}.</sub>\n")
    return "\n".join(parts)


_ALLOCATORS = ("uniform", "er", "er-plus", "global", "owl", "dlp", "alpha", "atp", "lsa", "blend", "auto")
_SOLVERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps")


def _place(order: Sequence[str]) -> Callable[[str], tuple[int, str]]:
    """Sorts names that are known as they are known, and others behind them."""
    return lambda name: (order.index(name) if name in order else len(order), name)


def _seeds(groups: Mapping[str, Iterable[Sequence[Any]]]) -> str:
    """How many seeds each row or column was made with, the exceptions by name."""
    counts = {name: max(len(cells) for cells in some) for name, some in groups.items()}
    usual = Counter(counts.values()).most_common(1)[0][0]
    others = ", ".join(f"{name} {count}" for name, count in counts.items() if count != usual)
    spread = "; ± includes their spread" if max(counts.values()) > 1 else ""
    return f"Calibration seeds: {usual}{f' ({others})' if others else ''}{spread}.\n"


def _threads(result: Mapping[str, Any]) -> str:
    counts = sorted({int(cell["threads"]) for cell in result["cells"].values()})
    return f"{' or '.join(map(str, counts))} thread{'s' * (counts != [1])}"


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
        f"<sub>{machine['cpu']}, {machine['threads']} thread{'s' * (machine['threads'] != 1)}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )


def _with_note(result: Mapping[str, Any]) -> str:
    """The machine, and what else must be known of these numbers."""
    note = f" {result['note'].capitalize()}." if result.get("note") else ""
    return _machine(result).removesuffix("</sub>\n") + f"{note}</sub>\n"


_KINDS = {"recovered": "**recovered**", "lora-reprune": "LoRA without a mask, pruned again"}


def _packed(found: Mapping[str, Any] | None) -> str:
    return (
        f"{found['file_bytes'] / 1e6:.0f} MB | {found['decode_tokens_per_second']:.0f}" if found else "– | –"
    )


def recovery(result: Mapping[str, Any]) -> str:
    """One table a text: a row a model, perplexity beside KL and first choices; then the step beside plain training."""
    cells = sorted(result["cells"], key=lambda cell: (cell["sparsity"], cell["minutes"], cell["kind"]))
    seen, measured = result["calibration"], result["evaluation"]
    recipe = f" by recipes/{result['recipe']}" if result["recipe"] else ""
    parts = [
        "### The whole promise\n",
        f"{result['model']}, pruned on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']}{recipe} and trained on that text; "
        f"measured on {measured['windows']} windows of {measured['seqlen']} tokens that chose nothing. KL and top-1 are against "
        "the dense model; size and decoding speed are those of the model packed. The control is the dense model trained alike: "
        "training on a text also adapts to it.\n",
    ]
    for text in measured["texts"]:
        dense = result["dense"]["evaluation"][text]
        lines = [
            f"On {text}:\n",
            "| sparsity | model | perplexity | × dense | KL | top-1 | file | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
            f"| – | dense | {_value(dense)} | 1.00 | – | – | {_packed(result['dense'].get('packed'))} |",
        ]
        for cell in cells:
            value = cell["evaluation"][text]
            name = _KINDS.get(cell["kind"], cell["kind"]) + (
                f", {cell['minutes']:g} min" if cell["minutes"] else ""
            )
            lines.append(
                f"| {'–' if cell['kind'] == 'control' else format(cell['sparsity'], '.0%')} | {name} | {_value(value)} "
                f"| {value['perplexity'] / dense['perplexity']:.2f} | {value['kl']:.3f} | {value['top1']:.1%} "
                f"| {_packed(cell.get('packed'))} |"
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
    return "\n".join(parts) + f"\n{_with_note(result)}"


def block(result: Mapping[str, Any]) -> str:
    """One block of a large model by each solver: time, what of it nothing can go below, and memory."""
    lines = [
        f"One block of the {result['shape'].upper()} shape, {result['samples']} × {result['seqlen']} tokens, 70%:\n",
        "| forwards in | solver | whole run | × SparseGPT | solving | its products at peak | factors and inverses at peak | peak memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = {row["compute"]: row["total"] for row in result["rows"] if row["solver"] == "sparsegpt"}
    for row in result["rows"]:
        base = first.get(row["compute"])
        times = f"{row['total'] / base:.2f}" if base else "–"
        lines.append(
            f"| {row['compute']} | {row['solver']} | {row['total']:.0f} s | {times} | {row['solving']:.0f} s "
            f"| {row['products_at_peak']:.0f} s | {row['factorising_at_peak']:.0f} s | {row['peak_memory'] / 1e9:.2f} GB |"
        )
    speeds = result["rows"][-1]["speeds"]
    peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s with {name[6:]} factors" for name, value in speeds.items())
    machine = result["rows"][-1]["machine"]
    return (
        "\n".join(lines)
        + f"\n\n<sub>{machine['cpu']}, {machine['threads']} threads, {peaks}, {result['date']}.</sub>\n"
    )


def lsa(result: Mapping[str, Any]) -> str:
    """LSA's reconstruction beside a SparseGPT solve of the same linear."""
    lines = [
        "| linear, out × in | LSA's reconstruction | SparseGPT's solve | ratio |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = " × ".join(str(size) for size in row["shape"])
        lines.append(f"| {shape} | {row['lsa']:.3f} s | {row['sparsegpt']:.3f} s | {row['ratio']:.2f} |")
    return "\n".join(lines) + f"\n\n{_machine(result)}"


def ranks(result: Mapping[str, Any]) -> str:
    """Several processes beside one: time by phase, and how alike the results are."""
    setting = result["setting"]
    lines = [
        f"{setting['model']}, OWL at {setting['sparsity']:.0%}, {setting['samples']} × {setting['seqlen']} tokens of "
        f"{setting['calibration']}; perplexity on {setting['windows']} windows of 2048.\n",
        "| solver, forwards in | processes × threads | whole run | times faster | forwards and statistics | solving "
        "| exchange | masks agree | perplexity | peak memory of rank 0 |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for row in result["rows"]:
        seconds = row["seconds"]
        base = first.setdefault(row["solver"], seconds["total"])
        passes = sum(seconds.get(key, 0.0) for key in ("profile", "forward", "observe"))
        lines.append(
            f"| {row['solver']}, {row['compute']} | {row['processes']} × {row['threads']} | {seconds['total']:.0f} s "
            f"| {base / seconds['total']:.2f} | {passes:.0f} s | {seconds.get('solve', 0.0):.0f} s "
            f"| {seconds.get('exchange', 0.0):.1f} s | {row['masks_agree']:.3%} | {row['perplexity']:.2f} "
            f"| {row['peak_memory'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines) + f"\n\n{_machine(result)}"


def scale(result: Mapping[str, Any]) -> str:
    """Where the time of a run goes, by the size of the model."""
    rows = result["rows"]
    lines = [
        "| shape | solver | tokens | whole | read | forwards | statistics | solve | write | rest "
        "| useful | unavoidable | products at |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        phases, total = row["phases"], row["total"]
        shown = " | ".join(
            f"{phases[key]:.1f}" for key in ("read", "forward", "statistics", "solve", "write", "rest")
        )
        useful = sum(phases[key] for key in ("forward", "statistics", "solve")) / total
        lines.append(
            f"| {row['shape'].upper()}, {row['blocks']} blocks | {row['solver']} | {row['samples']} × {row['seqlen']} "
            f"| {total:.1f} s | {shown} | {useful:.0%} | {sum(row['limit'].values()) / total:.0%} "
            f"| {_speeds(row)} |"
        )
    machine = rows[0]["machine"]
    return (
        "\n".join(lines)
        + f"\n\n<sub>{machine['cpu']}, {machine['threads']} threads, {result['date']}.</sub>\n"
    )


def _speeds(row: Mapping[str, Any]) -> str:
    """Share of the machine's speed that the products of a run reach, by dtype."""
    short = {"torch.bfloat16": "bf16", "torch.float32": "f32", "torch.float16": "f16"}
    products = {
        dtype: made
        for dtype, made in row.get("products", {}).items()
        if made["seconds"] > 0.02 * row["total"]
    }
    return ", ".join(f"{short[dtype]} {made['share']:.0%}" for dtype, made in products.items()) or "–"


def large(result: Mapping[str, Any]) -> str:
    """Models larger than memory: what was promised, estimated and taken."""
    lines = [
        "| model | solver | budget | estimate | peak memory | hidden states | time | weights written |",
        "|---|---|---|---|---|---|---|---|",
    ]
    plans = [
        "| whole model, planned | solver | memory, smallest that would do | disk | time |",
        "|---|---|---|---|---|",
    ]
    machine = None
    for key, entry in result.items():
        shape, blocks = key.rsplit("-", 1)
        for solver, row in entry.items():
            if solver == "plan":
                for name, plan in row.items():
                    memory, disk = plan["memory"], plan["disk"]
                    plans.append(
                        f"| {shape.upper()} | owl + {name} | {memory['peak'] / 1e9:.1f} GB, {memory['smallest'] / 1e9:.1f} GB "
                        f"| {disk['peak'] / 1e9:.0f} GB | {plan['seconds']['total'] / 3600:.1f} h |"
                    )
                continue
            machine, asked = row["machine"], row["arguments"]
            lines.append(
                f"| {shape.upper()} shape, {blocks} blocks | owl + {solver}, {asked['samples']} × {asked['seqlen']} "
                f"| {asked['memory']} | {row['memory']['estimate'] / 1e9:.2f} GB | {row['peak_memory'] / 1e9:.2f} GB "
                f"| {row['memory']['hidden_states']} | {row['seconds']['total'] / 60:.0f} min | {row['written'] / 1e9:.1f} GB |"
            )
    made = "\n".join(lines) + "\n"
    if len(plans) > 2:
        made += "\n" + "\n".join(plans) + "\n"
    notes = [row["note"] for entry in result.values() for row in entry.values() if "note" in row]
    note = "".join(f" {line}" for line in dict.fromkeys(notes))
    return made + (f"\n<sub>{machine['cpu']}, {machine['threads']} threads.{note}</sub>\n" if machine else "")


def scaling_model(result: Mapping[str, Any]) -> str:
    """What counting says of many devices; the rates it assumes stand above it."""
    rates = result["rates"]
    lines = [
        f"Assumed: {rates['bf16'] / 1e12:.0f} TFLOP/s in forwards, {rates['f32'] / 1e12:.0f} in Hessians, "
        f"{rates['solve'] / 1e12:.0f} in solves; {rates['node_link'] / 1e9:.0f} GB/s between devices of a node "
        f"({result['per_node']} of them), {rates['between_nodes'] / 1e9:.0f} GB/s between nodes; "
        f"{rates['disk_read'] / 1e9:.1f} GB/s from the disk, {rates['disk_write'] / 1e9:.1f} to it. "
        f"OWL and SparseGPT, {result['tokens']:,} tokens, seconds:\n",
        "| shape | devices | forwards | statistics | solves | exchange | disk, beside them | whole | times faster |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, float] = {}
    for row in result["rows"]:
        base = first.setdefault(row["shape"], row["total"])
        shown = " | ".join(
            f"{row[key]:.0f}" for key in ("forward", "statistics", "solve", "exchange", "disk", "total")
        )
        lines.append(f"| {row['shape'].upper()} | {row['ranks']} | {shown} | {base / row['total']:.1f} |")
    return "\n".join(lines) + "\n"


TABLES: dict[str, dict[str, Callable[[Mapping[str, Any]], str]]] = {
    "README.md": {
        "tasks": tasks,
        "allocators": allocators,
        "recipes": recipes,
        "recipes_gemma": recipes,
        "prune_speed": prune_speed,
        "sizes": sizes,
        "decode": decode,
        "kernels": kernels,
        "peers": peers,
        "recovery": recovery,
    },
    "docs/allocators.md": {"allocators": allocators, "solvers": solvers, "owl_study": owl_study},
    "docs/scaling.md": {
        "large": large,
        "scale": scale,
        "block": block,
        "lsa": lsa,
        "ranks": ranks,
        "scaling_model": scaling_model,
    },
}
# Sections that bring their heading along and are not there at all until they are measured.
OPTIONAL = {
    "allocators",
    "solvers",
    "owl_study",
    "recipes",
    "recipes_gemma",
    "block",
    "lsa",
    "decode",
    "kernels",
    "peers",
    "recovery",
    "large",
    "scale",
    "ranks",
    "scaling_model",
}


def render(page: str, name_of_page: str = "README.md") -> str:
    """The page with every table made anew."""
    for name, table in TABLES[name_of_page].items():
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
            raise SystemExit(f"{name_of_page} has {count} places for {name}, expected one")
    return page


def main() -> int:
    stale = []
    for name in TABLES:
        page = (ROOT / name).read_text(encoding="utf-8")
        made = render(page, name)
        if made != page:
            stale.append(name)
            if "--check" not in sys.argv[1:]:
                (ROOT / name).write_text(made, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        print(f"the tables of {' and '.join(stale)} are stale: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
