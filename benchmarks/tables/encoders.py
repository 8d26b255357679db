"""Encoders: which families run, and whether sparsity that differs by block pays on real ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.models import in_words
from tables.shared import ALLOCATORS, SOLVERS, machine_line, noted


def encoders(result: Mapping[str, Any]) -> str:
    """A row for each outcome."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in result["rows"]:
        why = row.get("error") or (in_words(row["refused"]) if "refused" in row else "")
        done = ("yes", f"{row['packed']:.0%}") if row.get("pruned") else ("no", "no")
        rows.setdefault((f"`{row['input']}`", *done, why), []).append(row["family"])
    lines = ["| families | takes | pruned | packed | why not |", "|---|---|---|---|---|"]
    for row, names in sorted(rows.items(), key=lambda item: (bool(item[0][-1]), item[0])):
        lines.append(f"| {'; '.join(names)} | {' | '.join(row)} |")
    pruned = sum(bool(row.get("pruned")) for row in result["rows"])
    return (
        f"Of {len(result['rows'])} tried {pruned} are pruned and packed.\n\n"
        + "\n".join(lines)
        + f"\n\n{machine_line(result)}"
    )


def vision_study(result: Mapping[str, Any]) -> str:
    """For each model and sparsity the energy that features have lost, and the samples whose nearest stayed the same."""
    setting, parts = result["setting"], []
    for name, model in result["models"].items():
        cells = list(model["cells"].values())
        solvers = [x for x in SOLVERS if any(cell["solver"] == x for cell in cells)]
        lines = [
            f"**{name}** ({model['class']}), {setting['samples']} samples of {model['data']}; measured on {setting['windows']} others.\n",
            f"| sparsity | allocator | {' | '.join(solvers)} |",
            "|---|---|" + "---:|" * len(solvers),
        ]
        for sparsity in sorted({cell["sparsity"] for cell in cells}):
            for allocator in ALLOCATORS:
                some = [
                    cell for cell in cells if (cell["sparsity"], cell["allocator"]) == (sparsity, allocator)
                ]
                if some:
                    shown = [
                        _shown([cell for cell in some if cell["solver"] == solver]) for solver in solvers
                    ]
                    lines.append(f"| {sparsity:.0%} | {allocator} | {' | '.join(shown)} |")
        shares = ", ".join(f"{share:.2f}" for share in model["lod"])
        parts.append("\n".join(lines) + f"\n\nOutliers of its dense blocks, in %: {shares}.\n")
    return (
        "Energy of the features that is lost, in %, and in brackets the samples whose nearest neighbour stayed the same, in %.\n\n"
        + "\n".join(parts)
        + f"\n{noted(machine_line(result), result)}"
    )


def encoder_speed(result: Mapping[str, Any]) -> str:
    """Milliseconds of a sentence of so many tokens, or of a picture, and how many times as fast as float32 that is."""
    parts = []
    for name, model in result["models"].items():
        kinds = list(model["rows"][0]["seconds"])
        lines = [f"| {name} | {' | '.join(kinds)} |", "|---|" + "---:|" * len(kinds)]
        for row in model["rows"]:
            dense = row["seconds"]["float32"]
            shown = (
                f"{1000 * seconds:.1f}" + ("" if kind == "float32" else f" ({dense / seconds:.2f} ×)")
                for kind, seconds in row["seconds"].items()
            )
            count = row["tokens"]
            what = f"{count} token{'s' * (count > 1)}" if count else "a picture"
            lines.append(f"| {what} | {' | '.join(shown)} |")
        sizes = ", ".join(f"{size / 1e6:.1f} MB with {kind}" for kind, size in model["bytes"].items())
        lines.append(f"\nFiles: {4 * model['weights'] / 1e6:.1f} MB in float32, {sizes}.\n")
        parts.append("\n".join(lines))
    threads = next(iter(result["models"].values()))["threads"]
    return (
        f"Milliseconds, medians of {result['rounds']} rounds in turns, {threads} threads, and how many times as fast as "
        "float32 in transformers. `bfloat16` is transformers, too.\n\n"
        + "\n".join(parts)
        + f"\n{machine_line(result)}"
    )


def _shown(cells: list[Mapping[str, Any]]) -> str:
    """Means over seeds."""
    if not cells:
        return "–"
    error, same = (sum(cell[key] for cell in cells) / len(cells) for key in ("error", "neighbours"))
    return f"{100 * error:.1f} ({100 * same:.0f})"
