"""Tables of quality: perplexity, accuracy and divergence, with what each costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, geometric_mean
from typing import Any

from tables.shared import (
    ALLOCATORS,
    SOLVERS,
    WHOLE_SOLVERS,
    bold_if,
    judged_otherwise,
    known_order,
    machine_and_note,
    machine_line,
    noted,
    over_seeds,
    plus_minus,
    seconds_table,
    seeds_line,
    setting_line,
    threads_of,
)

# What follows a solver in the table's names: a word by the key that a cell has.
REFINED = "fast, blended and refined"  # a recipe of its own when it was measured
STEPS = {"refit": "refit", "refine": "refine.epochs", "repeat": "calibration.repeat"}


def tasks(result: Mapping[str, Any]) -> str:
    """Whether the dense model's accuracies equal those of lm-eval, and the comparison as it was printed."""
    from tawny.report.comparison import to_markdown

    equal, compared, setting = result["equal"], result["compare"], result["setting"]
    verdict = "equal lm-eval's own to the last digit" if equal["exact"] else "differ from lm-eval's own"
    return (
        f"Pruned with {setting['pruning']}. In float32 the dense model's accuracies on {len(equal['tasks'])} tasks "
        f"{verdict}. The whole table took {compared['seconds'] / 60:.1f} minutes.\n\n"
        f"{to_markdown(compared)}\n{machine_line(result)}"
    )


def allocators(result: Mapping[str, Any]) -> str:
    """One table a text: a row a sparsity and solver, a column an allocator; then what each of them costs."""
    cells = list(result["cells"].values())
    names = sorted({cell["allocator"] for cell in cells}, key=known_order(ALLOCATORS))
    rows = sorted(
        {(cell["solver"], cell["sparsity"]) for cell in cells},
        key=lambda row: (known_order(SOLVERS)(row[0]), row[1]),
    )
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for cell in cells:
        found.setdefault((cell["solver"], cell["sparsity"], cell["allocator"]), []).append(cell)
    parts = [
        setting_line(result)
        + seeds_line({name: [c for key, c in found.items() if key[2] == name] for name in names})
    ]
    for text in result["evaluation"]["texts"]:
        parts.append(f"Perplexity on {text}, dense **{plus_minus(result['dense']['evaluation'][text])}**:\n")
        lines = [f"| solver | sparsity | {' | '.join(names)} |", f"|---|---|{'---|' * len(names)}"]
        for solver, sparsity in rows:
            made = [found.get((solver, sparsity, name)) for name in names]
            values = [over_seeds(group, text) if group else None for group in made]
            best = min(value["perplexity"] for value in values if value)
            shown = [bold_if(plus_minus(v), v["perplexity"] == best) if v else "–" for v in values]
            lines.append(f"| {solver} | {sparsity:.0%} | {' | '.join(shown)} |")
        parts.append("\n".join(lines) + "\n")
    parts += _what_auto_brings(found, result["evaluation"]["texts"])
    times = {
        solver: [[c for c in cells if (c["solver"], c["allocator"]) == (solver, name)] for name in names]
        for solver in dict.fromkeys(solver for solver, _ in rows)
    }
    # Other work may have shared the machine: it makes a run slower, never quicker.
    parts.append(
        f"Seconds of whole runs, {threads_of(cells)} each; the fastest run over sparsities and seeds:\n\n"
        + seconds_table(names, times, min)
    )
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


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
                    rivals[name] = over_seeds(cells, text)["perplexity"]
            if "uniform" in rivals:
                auto = over_seeds(searched, text)["perplexity"]
                over_best.append(auto / min(rivals.values()) - 1)
                over_uniform.append(auto / rivals["uniform"] - 1)
        if over_best:
            lines.append(
                f"On {text}, perplexity of `auto` against the best single allocator of each row: {min(over_best):+.1%} to "
                f"{max(over_best):+.1%}; against uniform: {min(over_uniform):+.1%} to {max(over_uniform):+.1%}. "
                f"Against one allocator in all rows (geometric mean over rows and seeds): {_beside_each(found, singles, text)}.\n"
            )
    return lines


def _beside_each(
    found: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]], singles: Sequence[str], text: str
) -> str:
    """How far `auto` is from each single allocator, over all cells that differ in nothing else."""

    def perplexities(name: str) -> dict[tuple[Any, ...], float]:
        return {
            (solver, sparsity, cell["seed"]): cell["evaluation"][text]["perplexity"]
            for (solver, sparsity, allocator), cells in found.items()
            if allocator == name
            for cell in cells
        }

    searched, said = perplexities("auto"), []
    for name in singles:
        theirs = perplexities(name)
        shared = searched.keys() & theirs.keys()
        if shared:
            ratio = geometric_mean(searched[key] / theirs[key] for key in sorted(shared))
            said.append(f"{name} {ratio - 1:+.1%}")
    return ", ".join(said)


_QUESTIONS = {
    "lod": "Outliers after pruning (share of weights above 5 × the mean, averaged over blocks)",
    "granularity": "Granularity: one OWL ratio for each …",
    "order": "OWL against its opposite and older baselines",
    "M": "Sensitivity to M, λ = 0.08",
    "lambda": "Sensitivity to λ, M = 5",
    "sweep": "OWL against uniform by sparsity",
    "calibration": "OWL against uniform by number of calibration samples",
    "cost": "Time of allocators",
}


def owl_study(result: Mapping[str, Any]) -> str:
    """One table a question of benchmarks/owl_study.py; a label's value is the mean over its seeds."""
    parts = [setting_line(result)]
    texts = result["evaluation"]["texts"]
    dense = [plus_minus(result["dense"]["evaluation"][text]) for text in texts]
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
            shown = [plus_minus(over_seeds(group, text)) for text in texts]
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
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


def _cells_of(result: Mapping[str, Any], keys: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The cells of all seeds that have exactly these keys; results lie beside them under other names."""
    measured = {
        "seconds",
        "threads",
        "cpu",
        "measured",
        "phases",
        "achieved",
        "mean_error",
        "winner",
        "evaluation",
        "lod",
        "seed",
        "bos",
    }
    return [
        cell
        for cell in result["cells"].values()
        if {k: v for k, v in cell.items() if k not in measured} == keys
    ]


def _outliers(cell: Mapping[str, Any]) -> str:
    shares = cell["lod"]["shares"]["5"] if "lod" in cell else []
    return f"{sum(shares) / len(shares):.3f} %" if shares else "–"


def recipes(result: Mapping[str, Any]) -> str:
    """One table a text: a row a product, for every sparsity its perplexity and how far from the first row's it is, over the seeds that both have."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for cell in result["cells"].values():
        name = ", ".join([REFINED if cell["recipe"] == "best" else cell["recipe"], *cell["changes"]])
        groups.setdefault((name, cell["sparsity"]), []).append(cell)
    # The authors' choices first, whatever was measured or measured again last: the others are compared with them.
    names = sorted(
        dict.fromkeys(name for name, _ in groups), key=lambda name: not name.startswith("official")
    )
    sparsities = sorted({sparsity for _, sparsity in groups})
    parts = [
        setting_line(result)
        + seeds_line({name: [c for key, c in groups.items() if key[0] == name] for name in names})
    ]
    for text in result["evaluation"]["texts"]:
        parts.append(f"Perplexity on {text}, dense **{plus_minus(result['dense']['evaluation'][text])}**:\n")
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
                shown.append(plus_minus(over_seeds(cells, text)) + change)
            lines.append(f"| {name} | {' | '.join(shown)} |")
        parts.append("\n".join(lines) + "\n")
    times = {name: [groups.get((name, sparsity), []) for sparsity in sparsities] for name in names}
    parts.append(seconds_table([f"{s:.0%}" for s in sparsities], times, fmean))
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


def _change(cells: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], text: str) -> str:
    """How far below or above others, over the seeds that both have."""
    shared = {cell["seed"] for cell in cells} & {cell["seed"] for cell in others}
    if not shared:
        return ""
    ours, theirs = (
        over_seeds([cell for cell in some if cell["seed"] in shared], text)["perplexity"]
        for some in (cells, others)
    )
    return f" ({ours / theirs - 1:+.0%})"


def solvers(result: Mapping[str, Any]) -> str:
    """One table a text: a row a solver and what follows it, a column a sparsity; then errors of linears, and times."""
    groups: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for cell in result["cells"].values():
        steps = [word for word, key in STEPS.items() if cell.get(key)]
        name = (cell["solver"], " + ".join([cell["solver"], *steps]))
        groups.setdefault((*name, cell["sparsity"]), []).append(cell)
    names = sorted({name[:2] for name in groups}, key=lambda name: (known_order(SOLVERS)(name[0]), name[1]))
    sparsities = sorted({sparsity for *_, sparsity in groups})
    head = [f"{' | '.join(f'{s:.0%}' for s in sparsities)} |", f"|---|{'---|' * len(sparsities)}"]

    def table(title: str, shown: Callable[[Sequence[Mapping[str, Any]]], str]) -> str:
        lines = [f"| {title} | {head[0]}", head[1]]
        for name in names:
            made = [groups.get((*name, sparsity)) for sparsity in sparsities]
            lines.append(f"| {name[1]} | {' | '.join(shown(some) if some else '–' for some in made)} |")
        return "\n".join(lines) + "\n"

    parts = [
        setting_line(result)
        + seeds_line({name[1]: [c for key, c in groups.items() if key[:2] == name] for name in names})
    ]
    for text in result["evaluation"]["texts"]:
        dense = plus_minus(result["dense"]["evaluation"][text])
        parts.append(f"Perplexity on {text}, dense **{dense}**:\n")
        parts.append(table("solver", lambda some, text=text: plus_minus(over_seeds(some, text))))
    parts.append("Share of a linear's output energy that pruning removed, mean over linears:\n")
    parts.append(table("error", lambda some: f"{fmean(cell['mean_error'] for cell in some):.2%}"))
    times = {name[1]: [groups.get((*name, sparsity), []) for sparsity in sparsities] for name in names}
    parts.append(f"Seconds of whole runs, {threads_of(result['cells'].values())} each:\n")
    parts.append(seconds_table([f"{s:.0%}" for s in sparsities], times, fmean))
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


def structured(result: Mapping[str, Any]) -> str:
    """One table a text: a row a pattern, solver and allocator, a column a sparsity; then speeds, where they were measured."""
    cells = list(result["cells"].values())
    columns = sorted({cell["sparsity"] for cell in cells})
    rows = sorted(
        {(cell["pattern"], cell["solver"], cell["allocator"]) for cell in cells},
        key=lambda row: (
            row[0] in ("blocks", "rank"),
            row[0],
            WHOLE_SOLVERS.index(row[1]),
            known_order(ALLOCATORS)(row[2]),
        ),
    )
    some = {
        (row, column): [
            c for c in cells if (c["pattern"], c["solver"], c["allocator"]) == row and c["sparsity"] == column
        ]
        for row in rows
        for column in columns
    }
    titles = " | ".join(f"{sparsity:.0%}" for sparsity in columns)
    parts = [
        setting_line(result) + seeds_line({" + ".join(row): [some[row, c] for c in columns] for row in rows})
    ]
    for text in result["evaluation"]["texts"]:
        parts.append(f"Perplexity on {text}, dense **{plus_minus(result['dense']['evaluation'][text])}**:\n")
        lines = [f"| pattern | solver | allocator | {titles} |", f"|---|---|---|{'---|' * len(columns)}"]
        for row in rows:
            shown = [plus_minus(over_seeds(some[row, c], text)) if some[row, c] else "–" for c in columns]
            lines.append(f"| {' | '.join(row)} | {' | '.join(shown)} |")
        parts.append("\n".join(lines) + "\n")
    for pattern in sorted(
        {cell["pattern"] for cell in cells} - {"rank"}, reverse=True
    ):  # of zeros, which it makes none
        apart = max(abs(c["achieved"] - c["sparsity"]) for c in cells if c["pattern"] == pattern)
        parts.append(f"Sparsities of {pattern} are met to {apart:.2%} at most.\n")
    if result.get("speed"):
        parts.append(_slim_speed(result["speed"]))
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


def _slim_speed(speed: Mapping[str, Any]) -> str:
    """The slim model beside the dense one in plain transformers, and what its bytes and operations allow."""
    dense, slim = speed["models"]["dense"], speed["models"]["slim"]
    lines = [
        f"Slim at {speed['sparsity']:.0%} beside dense in plain transformers ({dense['dtype']}), tokens per second. *By weights* is the gain that fewer "
        "bytes alone would give when decoding, and fewer operations for a prompt:\n",
        "| | dense | slim | gain | by weights |",
        "|---|---|---|---|---|",
    ]
    for kind, title, unit in (
        ("decode", "decode", "read_bytes"),
        ("prompt", "prompt of 512", "block_weights"),
    ):
        before, after = (one["tokens_per_second"][kind] for one in (dense, slim))
        gain, most = after / before, dense[unit] / slim[unit]
        lines.append(f"| {title} | {before:.1f} | {after:.1f} | {gain:.2f} × | {most:.2f} × |")
    passes = ""
    if speed["passes"]:
        obs, other = (speed["passes"][name]["total"] for name in ("obs", "sparsegpt"))
        passes = f"One pass over {speed['samples']} × {speed['seqlen']} tokens: obs {obs:.0f} s, SparseGPT {other:.0f} s. "
    cpu, threads = speed["machine"]["cpu"], speed["machine"]["threads"]
    lines.append(f"\n{passes}{cpu}, {threads} threads, {speed['date']}.\n")
    return "\n".join(lines)


_KINDS = {"recovered": "**recovered**", "lora-reprune": "LoRA without a mask, pruned again"}


def recovery(result: Mapping[str, Any]) -> str:
    """One table a text: a row a model, perplexity beside KL and first choices; then the step beside plain training."""
    cells = sorted(result["cells"], key=lambda cell: (cell["sparsity"], cell["minutes"], cell["kind"]))
    seen, measured = result["calibration"], result["evaluation"]
    recipe = f" by recipes/{result['recipe']}" if result["recipe"] else ""
    parts = [
        f"{result['model']}, pruned on {seen['samples']} × {seen['seqlen']} tokens of {seen['text']}{recipe} and trained on that text. "
        f"Measured on {measured['windows']} windows of {measured['seqlen']} tokens that no choice was made on. KL and top-1 compare with "
        "the dense model. File size and decoding speed are those of the packed model. The control is the dense model with the same "
        "training, because training on a text also adapts a model to it.\n",
    ]
    for text in measured["texts"]:
        dense = result["dense"]["evaluation"][text]
        lines = [
            f"On {text}:\n",
            "| sparsity | model | perplexity | × dense | KL | top-1 | file | tokens/s |",
            "|---|---|---|---|---|---|---|---|",
            f"| – | dense | {plus_minus(dense)} | 1.00 | – | – | {_packed(result['dense'].get('packed'))} |",
        ]
        for cell in cells:
            value = cell["evaluation"][text]
            name = _KINDS.get(cell["kind"], cell["kind"]) + (
                f", {cell['minutes']:g} min" if cell["minutes"] else ""
            )
            lines.append(
                f"| {'–' if cell['kind'] == 'control' else format(cell['sparsity'], '.0%')} | {name} | {plus_minus(value)} "
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
            f"A training step at {step['sparsity']:.0%}, {step['batch']} × {step['seqlen']} tokens. Memory is the peak above the "
            f"bare interpreter. The teacher's forwards are not included ({step['tawny']['teacher_seconds']:.0f} s for "
            f"{step['steps']} steps).\n\n| | memory | tokens/s |\n|---|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts) + f"\n{machine_and_note(result)}"


def _packed(found: Mapping[str, Any] | None) -> str:
    return (
        f"{found['file_bytes'] / 1e6:.0f} MB | {found['decode_tokens_per_second']:.0f}" if found else "– | –"
    )


def recovery_texts(result: Mapping[str, Any]) -> str:
    """A row a model: what it was calibrated and trained on, and × dense with the divergence on each text."""
    setting, cells = result["setting"], result["cells"].values()
    texts = setting["texts"]
    first = next(iter(cells))["texts"]
    dense = ", ".join(f"{first[text]['dense']:.2f} on {text}" for text in texts)
    mixes = "; ".join(f"*{name}* is {' '.join(parts)}" for name, parts in result["mixes"].items())
    lines = [
        f"{setting['model']}, calibrated on {setting['samples']} × {setting['seqlen']} tokens of a mix and trained on more of it. "
        f"Measured on {setting['windows']} windows of {setting['eval_seqlen']} tokens: perplexity in times of the dense model's "
        f"({dense}), and KL. Mixes: {mixes}.\n",
        "| sparsity | mix | model | tokens | " + " | ".join(f"{text} | KL" for text in texts) + " |",
        "|---|---|---|---:|" + "---:|---:|" * len(texts),
    ]
    for cell in sorted(cells, key=lambda cell: (cell["sparsity"], cell["tokens"])):
        weight = {0.5: "", 1.0: ", KL alone"}.get(cell["kl"], f", {cell['kl']:g} KL")
        name = cell["method"] + (weight if cell["method"] != "one-shot" else "")
        found = (cell["texts"][text] for text in texts)
        shown = " | ".join(f"{x['perplexity'] / x['dense']:.2f} | {x['kl']:.3f}" for x in found)
        tokens = f"{cell['tokens']:,}" if cell["tokens"] else "–"
        lines.append(f"| {cell['sparsity']:.0%} | {cell['mix']} | {name} | {tokens} | {shown} |")
    return "\n".join(lines) + f"\n\n{noted(machine_line(result), result)}"


def few_bits(result: Mapping[str, Any]) -> str:
    """Kinds by solver: bits a weight, bytes, seconds, KL and perplexity on each text."""
    setting, cells = result["setting"], result["cells"]
    texts = setting["texts"]
    first = next(iter(cells.values()))["texts"]
    dense = ", ".join(f"{first[text]['dense']:.2f} on {text}" for text in texts)
    others, said = judged_otherwise(cells)
    lines = [
        f"{setting['model']}, head {setting.get('head', 'int8')}, {setting['samples']} × {setting['seqlen']} tokens of {setting['calibration']}, "
        f"{setting['windows']} windows of {setting['eval_seqlen']} tokens. Perplexity of the dense model: {dense}.{said}\n",
        "| values | zeros | solver | bits a weight | file | seconds | "
        + " | ".join(f"KL, {text} | perplexity" for text in texts)
        + " |",
        "|---|---|---|---|---|---|" + "---|---|" * len(texts),
    ]
    names = {"magnitude": "best scale", "sparsegpt": "column loop", "alps": "ADMM"}

    def place(name: str) -> tuple[float, str, int]:
        kind, solver, _ = name.split()
        return -round(cells[name]["bits"], 2), kind, list(names).index(solver)

    for name in sorted(cells, key=place):
        cell, (kind, solver, _) = cells[name], name.split()
        values, group, sparsity = kind.split(":")
        numbers = " | ".join(
            f"{cell['texts'][text]['kl']:.3f} ± {cell['texts'][text]['kl_stderr']:.3f} "
            f"| {cell['texts'][text]['perplexity']:.2f}"
            for text in texts
        )
        lines.append(
            f"| {values}, groups of {group} | {float(sparsity):.0%} | {names[solver]}{' *' * (name in others)} | {cell['bits']:.2f} "
            f"| {cell['bytes'] / 1e6:.0f} MB | {cell['seconds']:.0f} | {numbers} |"
        )
    lines.append(f"\n{machine_and_note(result)}")
    return "\n".join(lines)


def mixed_bits(result: Mapping[str, Any]) -> str:
    """Allocators that share bits, by KL: the mean over seeds, and the least and the most where there are several."""
    setting, cells = result["setting"], result["cells"]
    texts = setting["texts"]
    by_name: dict[str, list[Any]] = defaultdict(list)
    for name, cell in cells.items():
        by_name[name.split()[0]].append(cell)

    def mean(name: str, text: str) -> float:
        return fmean(cell["texts"][text]["kl"] for cell in by_name[name])

    def shown(name: str, text: str) -> str:
        found = [cell["texts"][text] for cell in by_name[name]]
        if len(found) == 1:
            return f"{found[0]['kl']:.3f} ± {found[0]['kl_stderr']:.3f}"
        kls = [x["kl"] for x in found]
        return f"{mean(name, text):.3f} ({min(kls):.3f} to {max(kls):.3f}, {len(kls)} seeds)"

    lines = [
        f"{setting['model']}, int3, int4 and int8 at a mean of {setting['mean']:g} bits, groups of 32, column loop, head int8, "
        f"{setting['samples']} × {setting['seqlen']} tokens of {setting['calibration']}, {setting['windows']} windows of "
        f"{setting['eval_seqlen']} tokens.\n",
        "| bits shared by | file | " + " | ".join(f"KL, {text}" for text in texts) + " |",
        "|---|---:|" + "---:|" * len(texts),
    ]
    for name in sorted(by_name, key=lambda name: mean(name, texts[0])):
        numbers = " | ".join(shown(name, text) for text in texts)
        lines.append(f"| {name} | {by_name[name][0]['bytes'] / 1e6:.1f} MB | {numbers} |")
    lines.append(f"\n{machine_and_note(result)}")
    return "\n".join(lines)
