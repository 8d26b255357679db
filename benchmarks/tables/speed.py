"""Tables of packed models: size, decoding, kernels, other engines."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from tables.shared import SHAPE_NAMES, machine_line


def sizes(result: Mapping[str, Any]) -> str:
    def name(row: Mapping[str, Any]) -> str:
        scales = f", one scale for each {row['group']} columns" if row["group"] else ""
        head = f", head {row['head']}" if row["head"] else ""
        return f"packed {row['values']}{scales}{head}"

    lines = [
        f"{result['model']} at {result['sparsity']:.0%}. *Resident* is the memory that loading adds to a process with its imports.\n",
        "| | file | of the bf16 file | resident once loaded |",
        "|---|---|---|---|",
        f"| bf16 with its zeros | {result['dense_bytes'] / 1e6:.1f} MB | 100 % | |",
    ]
    lines += [
        f"| {name(row)} | {row['bytes'] / 1e6:.1f} MB | {row['ratio'] * 100:.1f} % | {row['resident'] / 1e6:.0f} MB |"
        for row in result["rows"]
    ]
    return "\n".join(lines) + f"\n\n{machine_line(result)}"


def decode(result: Mapping[str, Any]) -> str:
    """Whole models, packed beside dense, and the two warnings that belong beside any such number."""
    rows = result["measurements"]
    most = max(row["threads"] for row in rows)
    rows = [row for row in rows if row["threads"] == most]
    parts = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        for dtype in ("bf16", "f32"):
            parts += _gains(shape, dtype, mine)
    parts.append(
        "*Dense, tuned* is the same model in the same decoder, with our best dense matrix–vector kernel. It is the fair "
        "baseline. *transformers* uses its own forward, cache and linears. Ratios compare medians that were taken in turns "
        "in one process. All models except SmolLM2 have random weights, pruned by magnitude. Their file sizes count tensors.\n"
    )
    for shape in dict.fromkeys(row["shape"] for row in rows):
        own = [
            row["decode_tokens_per_second"]
            for row in rows
            if row["shape"] == shape and row["variant"].startswith("dense shared")
        ]
        if len(own) > 1:
            parts.append(
                f"{SHAPE_NAMES.get(shape, shape)}: each sparsity ran in its own process, in turn with its own dense model. "
                f"That dense model made {min(own):.1f} to {max(own):.1f} tokens/s, because the machine's memory speed changed. The "
                "ratios are to that model. Compare these rows by ratio, not by tokens/s.\n"
            )
    parts.append(_warnings(rows))
    versions = result["versions"]
    parts.append(
        f"<sub>{result['machine']['cpu']}, {most} threads, kernel {result['kernel']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, {result['date']}.</sub>\n"
    )
    return "\n".join(parts)


def speed(row: Mapping[str, Any]) -> float:
    """Tokens a second."""
    return float(row["decode_tokens_per_second"])


def baseline_of(
    rows: Sequence[Mapping[str, Any]], row: Mapping[str, Any], dtype: str
) -> Mapping[str, Any] | None:
    """The tuned dense model that ran in turns with this one; the chain to transformers goes over it."""
    return _find(rows, f"dense shared {dtype}", row["group"]) or _find(rows, f"dense {dtype}", row["group"])


def _find(
    rows: Sequence[Mapping[str, Any]], variant: str, group: int | None = None
) -> Mapping[str, Any] | None:
    return next((r for r in rows if r["variant"] == variant and (group is None or r["group"] == group)), None)


def _gains(shape: str, dtype: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table; nothing where the shape was not measured in this type."""
    kinds = ("packed f32",) if dtype == "f32" else ("packed bf16", "packed int8")
    packed = [row for row in rows if row["variant"].startswith(kinds)]
    theirs, tuned, shared = (
        _find(rows, f"{name} {dtype}") for name in ("transformers", "dense", "dense shared")
    )
    if not packed or tuned is None:
        return []
    cpu = f", on {tuned['cpu']}" if "cpu" in tuned else ""
    lines = [
        f"{SHAPE_NAMES.get(shape, shape)}, {'float32' if dtype == 'f32' else 'bfloat16'}{cpu}:\n",
        "| | sparsity | decode, tokens/s | × dense, tuned | × transformers | prefill, tokens/s | memory | file |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (theirs, tuned, *sorted(packed, key=lambda r: (r["variant"], r["sparsity"]))):
        if row is None:
            continue
        base = baseline_of(rows, row, dtype) or tuned
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
        "Two warnings. **The number of bytes decides decoding speed, and 4-bit weights have few bytes.** At 70 % sparsity a "
        f"weight takes {bf16:.3f} bytes packed as bf16 and {int8:.3f} as int8. llama.cpp's dense Q4_0 takes {q4:.4f}. Packed "
        f"int8 is smaller than Q4_0 only above {1 - (q4 - mask):.0%} sparsity, packed bf16 only above "
        f"{1 - (q4 - mask) / 2:.0%}."
    ]
    small = {(r["variant"], r["sparsity"]): r["file_bytes"] for r in rows if r["shape"] == "smollm2"}
    dense, plain, headed = (
        small.get(key)
        for key in (("dense bf16", None), ("packed int8", 0.7), ("packed int8, int8 head", 0.7))
    )
    head = "**The head stays dense unless you ask.** Embeddings and head are not pruned"
    if dense and plain and headed:
        head += (
            f". In SmolLM2 they are large: at 70 %, the packed int8 file is {plain / dense:.0%} of the dense file, and "
            f"{headed / dense:.0%} with `--head int8`"
        )
    lines.append(head + ". [Why is it not faster?](../why-not-faster.md)")
    return " ".join(lines) + "\n"


def kernels(result: Mapping[str, Any]) -> str:
    """One linear: packed beside every other product there is, one token; then more tokens."""
    rows = result["measurements"]
    shape = max((tuple(row["shape"]) for row in rows), key=lambda s: (s == (4096, 4096), s[0] * s[1]))
    rows = [row for row in rows if tuple(row["shape"]) == shape]
    parts = [f"The linear has {shape[0]} × {shape[1]} weights.\n"]
    for threads in sorted({row["threads"] for row in rows}):
        parts += _one_token([r for r in rows if r["threads"] == threads and r["columns"] == 1], threads)
    parts += _many_tokens(rows)
    machine = result["machine"]
    parts.append(
        f"<sub>{machine['cpu']}, kernel {machine['kernel']}, torch {machine['torch']}, {result['date']}. All sizes, "
        "sparsities and quartiles are in benchmarks/results/kernels.json.</sub>\n"
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
    parts = []
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


def few_bits_speed(result: Mapping[str, Any]) -> str:
    """Few bits beside llama.cpp's quantised files, each shape on each CPU in one run."""
    lines = []
    for cpu, shape in dict.fromkeys((row["cpu"], row["shape"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["cpu"], row["shape"]) == (cpu, shape)]
        base = next((row for row in rows if row["name"] == "Q4_0"), rows[0])
        lines += [
            f"{SHAPE_NAMES[shape]}, {rows[0]['threads']} threads, {cpu}, {rows[0]['date']}:\n",
            f"| | file | decode, tokens/s | × {base['name']} | prefill of 512, tokens/s | × {base['name']} |",
            "|---|---|---|---|---|---|",
        ]
        for row in rows:
            name = row["name"]
            if ":" in name:
                kind, group, sparsity = name.split(":")
                zeros = f", {float(sparsity):.0%} zeros" if float(sparsity) else ""
                name = f"Tawny {kind}, groups of {group}{zeros}"
            else:
                name = f"llama.cpp {name}"
            decode, prefill = row["decode_tokens_per_second"], row["prefill_tokens_per_second"]
            lines.append(
                f"| {name} | {row['bytes'] / 1e9:.2f} GB | {decode:.2f} | {decode / base['decode_tokens_per_second']:.2f} "
                f"| {prefill:.1f} | {prefill / base['prefill_tokens_per_second']:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def serving(result: Mapping[str, Any]) -> str:
    """Served and bare tokens a second by the number of requests, and the time to a first token."""
    lines, groups = [], {}
    for row in result["measurements"]:
        groups.setdefault((row["shape"], row["cpu"], row["date"]), []).append(row)
    for (shape, cpu, date), rows in groups.items():
        first = rows[0]
        prompt = first.get("prompt", 512)
        lines += [
            f"{SHAPE_NAMES[shape]}, {first['threads']} threads, {cpu}, medians of {first['rounds']} rounds, {date}:\n",
            f"| | requests | served, tokens/s | without HTTP | × one request | first token of {prompt:,} | again |",
            "|---|---|---|---|---|---|---|",
        ]
        rate = {(row["variant"], row["requests"]): row["served_tokens_per_second"] for row in rows}
        for row in rows:
            name, cold, bare = (
                row.get(key) for key in ("variant", "first_token_cold_seconds", "bare_tokens_per_second")
            )
            waits = (
                "| | |" if cold is None else f"| {cold:.2f} s | {row['first_token_cached_seconds']:.2f} s |"
            )
            sparse = ", 70 %" if name.startswith("packed") else ""
            served = rate[name, row["requests"]]
            lines.append(
                f"| {name}{sparse} | {row['requests']} | {served:.1f} | {'' if bare is None else f'{bare:.1f}'} "
                f"| {served / rate[name, 1]:.2f} {waits}"
            )
        lines.append("")
    return "\n".join(lines)


def recovery_step(result: Sequence[Mapping[str, Any]]) -> str:
    """A row a model: processor seconds of a training step's forwards, backwards and losses, with the base's losses and today's."""
    lines = [
        "| model | words | tokens a step | base, tokens a CPU second | now | faster | heads alone, faster | tokens a chunk |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in result:
        speeds = {
            side: cell["tokens"] / statistics.median(one[side]["cpu"] for one in cell["rounds"])
            for side in ("base", "now")
        }
        chunks = cell["chunk_tokens"]
        lines.append(
            f"| {cell['model']} | {cell['vocabulary']:,} | {cell['tokens']} | {speeds['base']:.1f} | {speeds['now']:.1f} "
            f"| × {cell['cpu_speedup']:.2f} | × {cell['heads_cpu_speedup']:.2f} | {chunks['base']} → {chunks['now']} |"
        )
    last = result[-1]
    lines.append(
        f"\nMedians over {len(last['rounds'])} rounds, both sides by turns in one process, {last['machine'].get('cpu')}, "
        f"{last['machine'].get('threads')} thread(s), {last['date']}. The machine was busy, so processor time is compared."
    )
    return "\n".join(lines) + "\n"
