"""`tawny plan`: estimate memory, disk and time of a `prune`, or of a `fit`."""

from __future__ import annotations

from typing import Any

import tawny
from tawny.cli.console import Console
from tawny.cli.options import Aim, Memory, Model
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.cli.tables_of_pruning import allocation_table, recipe_words
from tawny.report.frames import Frame, Result, facts, parts, table
from tawny.words import duration, percent, size


@recipe_verb(
    "tawny plan smollm2 -s 0.7",
    "tawny plan ./model -c owl-sparsegpt-70 --memory 6GB",
    "tawny plan ./model --size 700MB --to gguf",
)
def plan(
    model: Model,
    console: Console,
    *,
    given: Given,
    aim: Aim,
    memory: Memory = None,
) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it.

    With --size, --bits, --speed or --ram it is what the same `tawny fit` would do.
    """
    fits = any(value is not None for value in vars(aim).values())
    recipe, own = given.of_fit(console.note) if fits else (given.recipe(), {})
    with console.progress() as progress:
        keys: dict[str, Any] = {"recipe": recipe, "memory": memory, "progress": progress}
        if not fits:
            planned: Any = tawny.plan(model, **keys)
        else:
            keys |= {**vars(aim), **{f"fit.{key}": value for key, value in own.items()}}
            planned = tawny.plan_fit(model, **keys)
    console.result(planned.to_dict(), fit_plan_tables if fits else plan_tables)


def fit_plan_tables(plan: Result) -> list[Frame]:
    """Sizes by kind, and what would be chosen and taken."""
    kinds = table("all linears and head in", "size", "", title=f"{plan['source']}, {plan['settings']['to']}")
    for row in plan["kinds"]:
        kinds.add(row["kind"], size(row["bytes"]), "fits" if row["fits"] else "too large")
    chosen, seconds, disk = plan["chosen"], plan["seconds"], plan["disk"]
    shares = ", ".join(f"{kind} {percent(share, 0)}" for kind, share in chosen["kinds"].items())
    basis = "if all weights mattered alike" if plan["expected"] is None else "by what was measured"
    zeros = f"; zeros in {percent(chosen['zeros'])}" if chosen["zeros"] else ""
    ends = f"; head {chosen['head_kind'] or 'as it is'}"
    ends += f", embedding {chosen['embedding_kind']}" if chosen["embedding_kind"] else ""
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters"),
        ("asked", _asked_words(plan)),
        (
            "smallest",
            f"{size(plan['smallest'])}, {8 * plan['smallest'] / plan['parameters']:.3f} bits a weight",
        ),
        (
            "would be",
            f"about {size(chosen['bytes'])}, {chosen['bits']:.3f} bits a weight: blocks {size(chosen['blocks'])}, "
            f"head {size(chosen['head'])}, "
            + (f"embedding {size(chosen['embedding'])}, " if chosen["embedding"] else "")
            + f"all else {size(chosen['rest'])}",
        ),
        ("kinds", f"{basis}, of weights in blocks {shares}{ends}{zeros}"),
    ]
    if plan["expected"] is not None:
        rows.append(("KL", f"{plan['expected']:.4f} nats a token expected from the dense model"))
    if plan["assumes"]:
        rows.append(("assumed", plan["assumes"]))
    rows += [
        ("finalists", "; ".join(plan["finalists"])),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(disk['packed'])} written, {size(disk['peak'])} meanwhile"),
        ("time", f"about {duration(seconds['total'])}{parts(seconds, 'total', duration)}"),
    ]
    return [kinds, facts(rows + [("note", note) for note in plan["notes"]])]


def _asked_words(plan: Result) -> str:
    asked = plan["asked"]
    if asked["speed"] is not None:
        return f"{asked['speed']:g} tokens a second"
    bits = "" if asked["bits"] is None else f", {asked['bits']:g} bits a weight"
    if asked["ram"] is not None:
        bits = f", what {asked['context']:,} tokens and the program leave of {size(asked['ram'])}"
    return f"{size(plan['budget'])}{bits}"


def plan_tables(plan: Result) -> list[Frame]:
    """What would be pruned, and what it would take."""
    recipe, disk, seconds = (plan[key] for key in ("recipe", "disk", "seconds"))
    share = plan["prunable"] / max(plan["parameters"], 1)
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters in {len(plan['blocks'])} blocks"),
        ("recipe", recipe_words(recipe, plan["reads_text"], plan["seqlen"])),
        ("prunable", f"{plan['prunable']:,} weights in {len(plan['linears'])} linears ({percent(share, 0)})"),
        ("removed", f"{plan['removed']:,} weights ({percent(plan['removed'] / max(1, plan['prunable']))})"),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(disk['checkpoint'])} written, {size(disk['peak'])} while it is being written"),
        ("time", f"about {duration(seconds['total'])}{parts(seconds, 'total', duration)}"),
    ]
    rows += [("note", note) for note in plan["notes"]]
    tables = [facts(rows)]
    if plan["allocation"] is not None:
        linears = [{**linear, "sparsity": plan["allocation"][linear["name"]]} for linear in plan["linears"]]
        tables.insert(0, allocation_table(linears))
    return tables


def _memory_words(plan: Result) -> str:
    memory = {key: value for key, value in plan["memory"].items() if key != "smallest"}
    words = f"about {size(memory['peak'])}{parts(memory, 'peak', size)}"
    smallest = plan["memory"].get("smallest", memory["peak"])
    if plan.get("hidden_states") == "disk":
        return f"{words}; hidden states on disk"
    return f"{words}; {size(smallest)} with hidden states on disk" if smallest < memory["peak"] else words
