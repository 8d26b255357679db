"""Tables of what pruning takes: time, memory, many processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tables.shared import machine_line


def prune_speed(result: Mapping[str, Any]) -> str:
    setting = result["setting"]
    lines = [
        f"{setting['model']}, {setting['samples']} samples × {setting['seqlen']} tokens, {setting['threads']} threads,"
        f" {setting['sparsity']:.0%} sparsity, medians of {setting['repeats']} runs of each. Memory is the peak above a bare interpreter with its imports.\n",
        "| | both compute in | official flow | Tawny | faster | memory | of which unavoidable matrix products |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        official, ours = row["official"]["median"], row["tawny"]["median"]
        lines.append(
            f"| owl + {row['solver']} | {row['dtype']} | {official['seconds']:.0f} s, {official['memory'] / 1e6:.0f} MB "
            f"| {ours['seconds']:.0f} s, {ours['memory'] / 1e6:.0f} MB | {row['times_faster']:.1f} × "
            f"| {row['memory_ratio']:.2f} × | {row['unavoidable_share']:.0%} of the time |"
        )
    subset = result["profile_subset"]
    lines.append(
        f"\nThe profile uses {subset['samples']} of the {subset['of']} samples. With all of them, no block's "
        f"sparsity differs by more than {subset['largest_difference']:.4f}."
    )
    return "\n".join(lines) + f"\n\n{machine_line(result)}"


def block(result: Mapping[str, Any]) -> str:
    """One block of a large model by each solver: time, the lower limit of that time, and memory."""
    lines = [
        f"One block of the {result['shape'].upper()} shape, {result['samples']} × {result['seqlen']} tokens, 70%:\n",
        "| CPU | limit | forwards in | solver | whole run | × SparseGPT | solving | its products at peak | × products | peak memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def place(row: Mapping[str, Any]) -> tuple[str, str, str]:
        return row["machine"]["cpu"], row["memory"], row["compute"]

    first = {place(row): row["total"] for row in result["rows"] if row["solver"] == "sparsegpt"}
    machines: dict[str, str] = {}
    for row in result["rows"]:
        base = first.get(place(row))
        floor = row["products_at_peak"] + row["factorising_at_peak"]
        times = f"{row['total'] / base:.2f}" if base else "–"
        lines.append(
            f"| {' | '.join(place(row))} | {row['solver']} | {row['total']:.0f} s | {times} | {row['solving']:.0f} s "
            f"| {floor:.0f} s | {row['solving'] / floor:.2f} | {row['peak_memory'] / 1e9:.2f} GB |"
        )
        machine = row["machine"]
        peaks = ", ".join(f"{value / 1e9:.0f} GFLOP/s in {name[6:]}" for name, value in row["speeds"].items())
        machines[machine["cpu"]] = f"{machine['cpu']}, {machine['threads']} threads, {peaks}, {row['date']}"
    return "\n".join(lines) + f"\n\n<sub>{'; '.join(machines.values())}.</sub>\n"


def lsa(result: Mapping[str, Any]) -> str:
    """LSA's reconstruction beside a SparseGPT solve of the same linear."""
    lines = [
        "| linear, out × in | LSA's reconstruction | SparseGPT's solve | ratio |",
        "|---|---|---|---|",
    ]
    for row in result["rows"]:
        shape = " × ".join(str(size) for size in row["shape"])
        lines.append(f"| {shape} | {row['lsa']:.3f} s | {row['sparsegpt']:.3f} s | {row['ratio']:.2f} |")
    return "\n".join(lines) + f"\n\n{machine_line(result)}"


def ranks(result: Mapping[str, Any]) -> str:
    """Several processes beside one: time by phase, and how alike the results are."""
    setting = result["setting"]
    lines = [
        f"{setting['model']}, OWL at {setting['sparsity']:.0%}, {setting['samples']} × {setting['seqlen']} tokens of "
        f"{setting['calibration']}. Perplexity on {setting['windows']} windows of 2048.\n",
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
    return "\n".join(lines) + f"\n\n{machine_line(result)}"


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
    """Models larger than memory: the budget, the estimate and the measured peak."""
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
        plural = "block" if blocks == "1" else "blocks"
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
                f"| {shape.upper()} shape, {blocks} {plural} | owl + {solver}, {asked['samples']} × {asked['seqlen']} "
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
    """The time on many devices, by arithmetic. The assumed rates stand above the table."""
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
