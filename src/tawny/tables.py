"""What the verbs show: pure functions from a result's dictionary to a table, and the words for numbers.

Nothing here prints; `console.py` does. Tables read the dictionaries that `--json` prints, so that what a person
sees and what a program reads are the same numbers.
"""

from __future__ import annotations

__all__ = [
    "allocation_table",
    "bar",
    "compare_tables",
    "comparison_table",
    "doctor_tables",
    "duration",
    "evaluation_tables",
    "generation_tables",
    "inspection_tables",
    "listing_tables",
    "pack_tables",
    "percent",
    "perplexity_tables",
    "perplexity_text",
    "plan_tables",
    "profile_tables",
    "push_tables",
    "record_tables",
    "recovery_tables",
    "size",
    "speed_tables",
    "stacked",
    "tasks_tables",
    "unpack_tables",
]

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

# --- words for numbers -----------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: GB = 10⁹."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if count >= 99.5 or units[0] == "B" else f"{count:.3g} {units[0]}"


def percent(share: float, digits: int = 2) -> str:
    return f"{share * 100:.{digits}f} %"


def bar(share: float, width: int = 20) -> str:
    """A horizontal bar of `width` cells for a share in [0, 1], in eighths of a cell."""
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def perplexity_text(result: Mapping[str, Any]) -> str:
    """`21.03 ± 0.84`; a standard error of 0 is that of a single window, which has none."""
    value, error = float(result["perplexity"]), float(result["stderr"])
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error else "")


def begun(of: Mapping[str, Any]) -> str:
    """What stands behind a number of windows or samples, of which `bos` says whether each begins with BOS."""
    return ", each begun with BOS" if of.get("bos") else ""


# --- frames ----------------------------------------------------------------------------------------------

# Metrics of tasks that are shares of the questions.
SHARES = ("acc", "acc_norm", "exact_match")
_READABLE = 16  # columns a name needs when it goes on over several lines
_FRAME = 3  # columns between two columns of a table


def _table(*columns: str, title: str | None = None, left: Sequence[int] = (0,)) -> Table:
    """Numbers to the right, the columns in `left` to the left."""
    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        # Names may go on a second line in a narrow window; a bar or a number in two pieces says nothing.
        whole = index not in left or not column
        made.add_column(column, justify="left" if index in left else "right", no_wrap=whole, overflow="fold")
    return made


def _facts(rows: Sequence[tuple[str, str]], title: str | None = None) -> Table:
    """Names and values, without a heading."""
    made = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(name, Text(value))
    return made


def stacked(table: Table, width: int) -> Table | Text:
    """The table, or a few lines a row where `width` would leave its names a letter a line, or cut its numbers."""
    if not table.show_header:  # names and values: the values go on below each other
        return table
    rows = list(zip(*([_words(cell) for cell in column.cells] for column in table.columns), strict=True))
    heads = [_words(column.header) for column in table.columns]
    needed = -1
    for index, column in enumerate(table.columns):
        natural = max(cell_len(text) for text in (heads[index], *(row[index] for row in rows)))
        needed += _FRAME + (natural if column.no_wrap else min(natural, _READABLE))
    if needed <= width:
        return table
    lines = [] if table.title is None else [Text(_words(table.title), style="bold")]
    for first, *rest in rows:
        lines.append(Text(f"{heads[0]} {first}".strip(), style="bold"))
        told = [f"{head} {cell}" for head, cell in zip(heads[1:], rest, strict=True) if head and cell]
        line = ""
        for part in told:
            if line and cell_len(f"  {line}, {part},") > width:
                lines.append(Text(f"  {line},"))
                line = ""
            line += f", {part}" if line else part
        lines.append(Text(f"  {line}"))
    return Text("\n").join(lines)


def _words(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


# --- one function a result -------------------------------------------------------------------------------


def record_tables(record: Mapping[str, Any]) -> list[Table | Text]:
    """What `tawny prune` did: the sparsity of every block, the sums, and dense beside pruned if measured."""
    seconds = record["seconds"]
    total = seconds.get("total", sum(seconds.values()))
    rows = [
        ("recipe", _recipe_words(record["recipe"], bool(record["text"]))),
        ("sparsity", f"{percent(record['sparsity'])} of {record['prunable']:,} prunable weights"),
        ("time", f"{duration(total)}{_parts(seconds, 'total', duration)}"),
        ("peak memory", _peak_words(record)),
    ]
    if refined := record.get("refined"):
        better = sum(made["best_epoch"] > 0 for made in refined)
        left = [made["after"] / made["before"] for made in refined if made["before"] > 0]
        if left:
            share = percent(sum(left) / len(left))
            rows.append(
                ("refined", f"{better} of {len(refined)} blocks; {share} of their held-out loss is left")
            )
    if record["out"]:
        packed = record.get("packed")
        share = (
            f", {percent(packed['ratio'], 1)} of the dense {size(packed['source_bytes'])}" if packed else ""
        )
        rows.append(("written", f"{record['out']} ({size(record['bytes'])}{share})"))
    rows += [("warning", warning) for warning in record["warnings"][:5]]
    if len(record["warnings"]) > 5:
        rows.append(("", f"and {len(record['warnings']) - 5} more warnings in run.json"))
    tables: list[Table | Text] = [allocation_table(record["linears"]), _facts(rows)]
    if {"dense", "pruned"} <= set(record["evaluation"]):
        tables.append(comparison_table(record["evaluation"]["dense"], record["evaluation"]["pruned"]))
    if record.get("search"):  # the last line: who won, and by how much
        tables.append(Text(record["search"]["says"]))
    return tables


def _peak_words(record: Mapping[str, Any]) -> str:
    expected = record.get("memory", {}).get("estimate")
    return size(record["peak_memory"]) + (f", {size(expected)} estimated" if expected else "")


def allocation_table(linears: Sequence[Mapping[str, Any]]) -> Table:
    """Sparsity block by block, with the reconstruction error where it is known.

    Args:
        linears: with `block`, `shape`, `sparsity`, and maybe `error` and `pattern`.
    """
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for linear in linears:
        blocks.setdefault(linear["block"], []).append(linear)
    errors = any("error" in linear for linear in linears)
    made = _table("block", "linears", "sparsity", "", *(["error"] if errors else []), left=(3,))
    for block, members in sorted(blocks.items()):
        weights = [linear["shape"][0] * linear["shape"][1] for linear in members]
        share = _mean([linear["sparsity"] for linear in members], weights)
        # The pattern is worth its place only where blocks may differ in it.
        patterns = {linear.get("pattern", "") for linear in members}
        pattern = f"  {patterns.pop()}" if len(patterns) == 1 and ":" in next(iter(patterns)) else ""
        error = [f"{_mean([linear['error'] for linear in members], weights):.4f}"] if errors else []
        made.add_row(str(block), str(len(members)), percent(share) + pattern, bar(share), *error)
    return made


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)


def comparison_table(dense: Mapping[str, Any], pruned: Mapping[str, Any]) -> Table:
    """Dense beside pruned; each has the keys of a perplexity, and `sparsity` where it is known."""
    title = (
        f"perplexity on {dense['text']}, {dense['windows']} windows of {dense['seqlen']} tokens{begun(dense)}"
    )
    made = _table("", "dense", "pruned", "change", title=title)
    ratio = pruned["perplexity"] / dense["perplexity"]
    made.add_row("perplexity", perplexity_text(dense), perplexity_text(pruned), f"× {ratio:.2f}")
    rows = (("sparsity", "sparsity", percent), ("seconds", "time to evaluate", duration))
    for key, name, show in rows:
        values = [result.get(key) for result in (dense, pruned)]
        if any(value is not None for value in values):
            made.add_row(name, *("–" if value is None else show(value) for value in values), "")
    return made


def recovery_tables(record: Mapping[str, Any]) -> list[Table]:
    """What `tawny recover` did: the measurements on the way, and the sums."""
    settings, text = record["settings"], record["text"]
    title = f"on {text['held_out']} held-out windows of {text['seqlen']} tokens of {text['name']}"
    taught = any("kl" in entry for entry in record["measured"])
    made = _table(
        "step", "time", "perplexity", *(["KL", "top-1"] if taught else []), "", title=title, left=(5,)
    )
    measured = record["measured"]
    # A long run measures often; ten rows show its course.
    shown = measured if len(measured) <= 12 else [*measured[:: -(-len(measured) // 10)], measured[-1]]
    for entry in shown:
        best = "best" if entry["step"] == record["best"]["step"] else ""
        taught_cells = [f"{entry['kl']:.4f}", percent(entry["top1"], 1)] if taught else []
        made.add_row(
            f"{entry['step']:.0f}",
            duration(entry["seconds"]),
            f"{entry['perplexity']:,.2f}",
            *taught_cells,
            best,
        )
    seconds = record["seconds"]
    rows = [
        (
            "perplexity",
            f"{record['start']['perplexity']:,.2f} → {record['best']['perplexity']:,.2f} "
            f"(× {record['best']['perplexity'] / record['start']['perplexity']:.3f})",
        ),
        ("sparsity", f"{percent(record['sparsity'])} of {record['prunable']:,} prunable weights"),
        ("zeros", f"{record['zeros_before']:,} before, {record['zeros']:,} after"),
        (
            "trained",
            f"{record['trained']:,} values ({settings['train']}, {settings['method']}) on {record['tokens']:,} tokens "
            f"in {record['steps']:,} steps; ended by {record['stopped']}",
        ),
        ("time", f"{duration(seconds['total'])}{_parts(seconds, 'total', duration)}"),
        ("speed", f"{record['tokens_per_second']:,.0f} tokens/s while training"),
        ("peak memory", size(record["peak_memory"])),
    ]
    if record["out"]:
        rows.append(("written", f"{record['out']} ({size(record['bytes'])})"))
    rows += [("warning", warning) for warning in record["warnings"]]
    return [made, _facts(rows)]


def perplexity_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `tawny.evaluate` measured; `agreement` where a dense model stood beside it."""
    speed = result["tokens"] / max(result["seconds"], 1e-9)
    rows = [("perplexity", perplexity_text(result))]
    if result.get("bits_per_byte"):
        rows.append(("bits per byte", f"{result['bits_per_byte']:.4f}"))
    if agreement := result.get("agreement"):
        dense = agreement["dense"]
        rows += [
            ("dense perplexity", f"{perplexity_text(dense)} ({agreement['against']})"),
            ("KL from dense", f"{kl_text(agreement['kl'], agreement['kl_stderr'])} nats a token"),
            ("same next token", f"{share_text(agreement['top1'], agreement['top1_stderr'])} %"),
        ]
    rows.append(("text", f"{result['text']} (sha256 {result['text_sha256'][:12]})"))
    rows.append(
        ("windows", f"{result['windows']} of {result['seqlen']} tokens ({result['tokens']:,} predicted)")
    )
    if result.get("recipe"):
        rows.append(("recipe", result["recipe"]))
    rows += [
        ("computed in", result["compute"]),
        ("time", f"{duration(result['seconds'])} ({speed:,.0f} tokens/s)"),
        ("peak memory", size(result["peak_memory"])),
    ]
    return [_facts(rows)]


def kl_text(value: float, error: float) -> str:
    """`0.0431 ± 0.0012`."""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error else "")


def evaluation_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `tawny eval` measured: a perplexity, tasks, or both."""
    tables = perplexity_tables(result) if "perplexity" in result else []
    return tables + (tasks_tables(result["tasks"]) if "tasks" in result else [])


def compare_tables(result: Mapping[str, Any]) -> list[Table]:
    """What `tawny compare` measured: a line a number, a column a model; the best of each line is bold."""
    from tawny.report.comparison import caption, failures, lines_of

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    made.add_column("", no_wrap=False)
    for model in result["models"]:
        made.add_column(Text(model["name"]), justify="right", overflow="fold")
    for line in lines_of(result):
        cells = []
        for cell in line.cells:
            shown = Text(cell.text, style="bold" if cell.best else "")
            if cell.change:
                shown.append(f"  {cell.change}", style="not bold dim")
            cells.append(shown)
        made.add_row(line.name + (f", {line.unit}" if line.unit else ""), *cells)
    rows = [("", sentence) for sentence in caption(result)]
    rows += [("missing", f"{model}: {part}: {why}") for model, part, why in failures(result)]
    rows.append(("time", duration(result["seconds"])))
    return [made, _facts(rows)]


def share_text(value: float, error: float) -> str:
    """`61.2 ± 1.4`, in percent."""
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def tasks_tables(result: Mapping[str, Any]) -> list[Table]:
    """Accuracy of every task in percent, and the mean of those that have one."""
    tasks = result["tasks"]
    normed = any("acc_norm" in task["metrics"] for task in tasks)
    columns = ["task", "accuracy, %", *(["normalised"] if normed else []), "examples", "documents"]
    made = _table(*columns, left=(0, len(columns) - 1))
    for task in tasks:
        norm = task["metrics"].get("acc_norm")
        made.add_row(
            task["name"],
            score_text(task) if task["metric"] in SHARES else f"{task['metric']} {score_text(task)}",
            *([share_text(norm["value"], norm["stderr"]) if norm else ""] if normed else []),
            f"{task['examples']:,}" + ", kept" * bool(task["cached"]),
            f"{task['data']} ({task['split']})" if task["split"] else task["data"],
        )
    rows = [
        ("lm-eval", f"{result['lm_eval']}, zero-shot unless a task says otherwise"),
        ("computed in", f"{result['compute']}, log-probabilities in float32"),
        ("time", duration(result["seconds"])),
    ]
    if len(tasks) > 1 and result["mean"] is not None:
        rows.insert(0, ("mean", f"{share_text(result['mean'], result['stderr'])} % over {len(tasks)} tasks"))
    if result["limit"]:
        rows.insert(1, ("limit", f"the first {result['limit']} documents of each task"))
    return [made, _facts(rows)]


def score_text(task: Mapping[str, Any]) -> str:
    """What a task measured: shares in %, anything else as it is."""
    value, stderr = task["value"], task["stderr"]
    if task["metric"] in SHARES:
        return share_text(value, stderr)
    return f"{value:.4g}" + f" ± {stderr:.2g}" * bool(stderr)


def profile_tables(report: Mapping[str, Any]) -> list[Table]:
    """The layerwise outlier distribution, each block's share of outliers for each M, with bars for one M."""
    shares: Mapping[str, Sequence[float]] = report["shares"]
    Ms = list(shares)
    drawn = "5" if "5" in Ms else Ms[len(Ms) // 2]  # the paper's choice at high sparsity
    # One allocation, that of the M whose bars are drawn, keeps the table narrow; --json has them all.
    allocations = {k: v for k, v in report["allocations"].items() if "=" not in k or k.endswith(f"={drawn}")}
    zeros = any(share > 0.01 for share in report["zeros"])  # a pruned model; a few zeros are in any dense one
    columns = ["block", *(f"M={M}" for M in Ms), "mean score", "max score", ""]
    made = _table(
        *columns,
        *(["zeros"] if zeros else []),
        *(f"{name} at {percent(report['sparsity'], 0)}" for name in allocations),
        title=f"weights whose |W|·‖X‖ is above M times the block's mean, in % (bars: M={drawn})",
        left=(len(columns) - 1,),
    )
    most = max(shares[drawn], default=0.0) or 1.0
    for block, share in enumerate(shares[drawn]):
        made.add_row(
            str(block),
            *(f"{shares[M][block]:.3f}" for M in Ms),
            f"{report['mean_score'][block]:.4g}",
            f"{report['max_score'][block]:.4g}",
            bar(share / most, 16),
            *([percent(report["zeros"][block])] if zeros else []),
            *(percent(ratios[block]) for ratios in allocations.values()),
        )
    text = report["text"]
    seen = f", {text['name']}" if text.get("name") else ""
    return [made, _facts([("measured", f"{report['source']}{seen}, in {duration(report['seconds'])}")])]


def plan_tables(plan: Mapping[str, Any]) -> list[Table]:
    """What would be pruned, and what it would take."""
    recipe, disk, seconds = (plan[key] for key in ("recipe", "disk", "seconds"))
    share = plan["prunable"] / max(plan["parameters"], 1)
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters in {len(plan['blocks'])} blocks"),
        ("recipe", _recipe_words(recipe, plan["reads_text"])),
        ("prunable", f"{plan['prunable']:,} weights in {len(plan['linears'])} linears ({percent(share, 0)})"),
        ("removed", f"{plan['removed']:,} weights ({percent(recipe['sparsity'])})"),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(disk['checkpoint'])} written, {size(disk['peak'])} while it is being written"),
        ("time", f"about {duration(seconds['total'])}{_parts(seconds, 'total', duration)}"),
    ]
    if disk.get("search"):
        rows.append(("search", f"{size(disk['search'])} of solutions on disk until it is over"))
    rows += [("note", note) for note in plan["notes"]]
    tables = [_facts(rows)]
    if plan["allocation"] is not None:
        linears = [{**linear, "sparsity": plan["allocation"][linear["name"]]} for linear in plan["linears"]]
        tables.insert(0, allocation_table(linears))
    return tables


def _memory_words(plan: Mapping[str, Any]) -> str:
    memory = {key: value for key, value in plan["memory"].items() if key != "smallest"}
    words = f"about {size(memory['peak'])}{_parts(memory, 'peak', size)}"
    smallest = plan["memory"].get("smallest", memory["peak"])
    if plan.get("hidden_states") == "disk":
        return f"{words}; hidden states on disk"
    return f"{words}; {size(smallest)} with hidden states on disk" if smallest < memory["peak"] else words


def _recipe_words(recipe: Mapping[str, Any], reads_text: bool) -> str:
    text = recipe["calibration"]
    steps = " + refit" if recipe.get("refit") else ""
    if epochs := recipe.get("refine", {}).get("epochs"):
        steps += f" + {epochs} epoch{'s' * (epochs != 1)} a block"
    seen = f"calibrated on {text['samples']} × {text['seqlen']} tokens of {text['text']}"
    return (
        f"{recipe['allocator']['name']} + {recipe['solver']['name']}{steps}, {recipe['pattern']}, "
        f"{seen if reads_text else 'no text needed'}"
    )


def _parts(sums: Mapping[str, Any], total: str, show: Any) -> str:
    """The largest parts of a sum by name, in brackets behind it."""
    parts = sorted(((v, k) for k, v in sums.items() if k != total and v > 0), reverse=True)
    words = ", ".join(f"{key.replace('_', ' ')} {show(value)}" for value, key in parts[:4])
    return words and f" ({words})"


def inspection_tables(inspection: Mapping[str, Any]) -> list[Table]:
    made = _table("linear", "shape", "zeros", "sparsity", "pattern", "ties", left=(0, 4))
    for linear in inspection["linears"]:
        made.add_row(
            linear["name"],
            "×".join(map(str, linear["shape"])),
            f"{linear['zeros']:,}",
            percent(linear["sparsity"]),
            linear["pattern"],
            f"{linear['ties']:,}",
        )
    rows = [
        ("sparsity", f"{percent(inspection['sparsity'])} of {inspection['prunable']:,} prunable weights"),
        ("linears", f"{len(inspection['linears'])} in {inspection['blocks']} blocks"),
        (
            "parameters",
            f"{inspection['parameters']:,}{', head tied to the embedding' * inspection['tied_head']}",
        ),
        ("files", size(inspection["bytes"])),
    ]
    return [made, _facts(rows)]


def pack_tables(report: Mapping[str, Any]) -> list[Table]:
    """What packing saved, and what it could not pack."""
    linears = report["linears"]
    packed = [linear for linear in linears if linear["form"] == "packed"]
    weights = [linear["shape"][0] * linear["shape"][1] for linear in packed]
    kept = [w * (1 - linear["sparsity"]) for w, linear in zip(weights, packed, strict=True)]
    kind = report["values"] + (f", a scale each {report['group']} columns" if report["group"] else "")
    rows = [
        ("size", f"{size(report['bytes'])}, {percent(report['ratio'], 1)} of {size(report['source_bytes'])}"),
        ("values", kind + (f", head {report['head']}" if report["head"] else "")),
        (
            "packed",
            f"{report['packed']} weights, {percent(1 - sum(kept) / sum(weights), 1)} zeros, "
            f"{8 * sum(linear['bytes'] for linear in packed) / sum(weights):.2f} bits each"
            if packed
            else "nothing",
        ),
    ]
    if report["dense"]:
        rows.append(("dense", f"{report['dense']} linears with too few zeros to pay"))
    if report["untouched"]:
        rows.append(("untouched", f"{len(report['untouched'])} weights stay as they are"))
    rows += [
        ("time", duration(report["seconds"])),
        ("written", f"{report['out']}: `tawny.load`, or `import tawny` before transformers, opens it"),
    ]
    return [_facts(rows)]


def unpack_tables(report: Mapping[str, Any]) -> list[Table]:
    exact = (
        "identical to the checkpoint that was packed, bit for bit"
        if report["exact"]
        else "as the packed values stand for them; what rounding took does not come back"
    )
    rows = [
        ("size", f"{size(report['bytes'])} from {size(report['source_bytes'])} packed"),
        ("weights", exact),
        ("time", duration(report["seconds"])),
        ("written", report["out"]),
    ]
    return [_facts(rows)]


def listing_tables(listing: Mapping[str, Any]) -> list[Table]:
    """One table a kind of choice."""
    tables = []
    for kind, entries in listing.items():
        made = _table("name", "options", "what it is", title=kind, left=(0, 1, 2))
        for entry in entries:
            options = " ".join(
                f"{k}={'none' if v is None else v}" for k, v in entry.get("options", {}).items()
            )
            made.add_row(entry["name"], options, entry["summary"])
        if not any(entry.get("options") for entry in entries):
            made.columns.pop(1)
        tables.append(made)
    return tables


def _default(value: Any) -> str:
    """As it would be written in a recipe; an empty list is as good as nothing."""
    return "none" if value in (None, ()) else str(value).lower() if isinstance(value, bool) else f"{value}"


def push_tables(report: Mapping[str, Any]) -> list[Table]:
    """What was, or would be, uploaded."""
    made = _table("file", "size")
    for name, count in report["files"].items():
        made.add_row(name, size(count))
    done = report["url"] or f"nothing was uploaded: the folder and its card are fit for {report['repo']}"
    rows = [("in all", size(report["bytes"])), *(("note", note) for note in report["notes"])]
    return [made, _facts([*rows, ("dry run" if report["dry_run"] else "uploaded", done)])]


def doctor_tables(report: Mapping[str, Any]) -> list[Table]:
    rows = [(check["name"], ("" if check["ok"] else "✗ ") + check["found"]) for check in report["checks"]]
    missing = [(check["name"], check["remedy"]) for check in report["checks"] if check.get("remedy")]
    tables = [_facts(rows)]
    if missing:
        tables.append(_facts(missing, title="to get what is missing"))
    return tables


def generation_tables(made: Mapping[str, Any]) -> list[Table]:
    """What a text took; the text itself has been streamed."""
    speed = made["decode_tokens_per_second"]
    ends = {"stop": "the model ended it", "context": "as many as its context holds"}
    count = f"{len(made['tokens'])} tokens ({ends.get(made['finish'], 'as many as asked for')})"
    return [
        _facts(
            [
                ("decoded", count + ("" if speed is None else f", {speed:,.1f} tokens/s")),
                (
                    "first token",
                    f"{duration(made['first_token_seconds'])} after {made['prompt_tokens']} tokens of prompt",
                ),
                (
                    "memory",
                    f"{size(made['resident_bytes'])} for the model, {size(made['peak_bytes'])} at most",
                ),
                ("with", f"{made['threads']} threads, kernel {made['kernel']}"),
            ]
        )
    ]


def speed_tables(speed: Mapping[str, Any]) -> list[Table]:
    """Tokens a second with their spread, and bytes."""
    made = _table("", "tokens/s", "quartiles", "ms a token")
    for key, name in (("decode", "decode"), ("prefill", "prefill")):
        value, (low, high) = speed[f"{key}_tokens_per_second"], speed[f"{key}_quartiles"]
        made.add_row(name, f"{value:,.1f}", f"{low:,.1f} – {high:,.1f}", f"{1000 / value:,.2f}")
    packed = ", ".join(f"{count} {kind}" for kind, count in speed["packed"].items())
    rows = [
        (
            "measured",
            f"{speed['rounds']} rounds of {speed['prompt_tokens']} tokens in, {speed['decoded_tokens']} out",
        ),
        ("weights", speed["dtype"] + (f", packed linears: {packed}" if packed else ", no packed linear")),
        ("memory", size(speed["resident_bytes"])),
        ("with", f"{speed['threads']} threads, kernel {speed['kernel']}"),
    ]
    if speed["file_bytes"] is not None:
        rows.insert(2, ("files", size(speed["file_bytes"])))
    return [made, _facts(rows)]
