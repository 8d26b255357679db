"""`tawny plan`: estimate memory, disk and time of a `prune`, or of a `fit`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tawny.cli.common import console_for
from tawny.cli.frames import Frame, Result, facts, parts, table
from tawny.cli.options import (
    AsJson,
    Device,
    FitBits,
    FitMeasured,
    FitSize,
    FitSpeed,
    Memory,
    Model,
    TrustRemoteCode,
)
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.cli.tables_of_pruning import allocation_table, recipe_words
from tawny.words import duration, percent, size

if TYPE_CHECKING:
    from tawny.cli.console import Console


@recipe_verb(
    "tawny plan smollm2 -s 0.7",
    "tawny plan ./model -c owl-sparsegpt-70 --memory 6GB",
    "tawny plan ./model --size 700MB --json",
)
def plan(
    model: Model,
    *,
    given: Given,
    bytes_: FitSize = None,
    bits: FitBits = None,
    speed: FitSpeed = None,
    measured: FitMeasured = None,
    device: Device = None,
    memory: Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it.

    With --size, --bits or --speed it is what the same `tawny fit` would do.
    """
    fits = {"size": bytes_, "bits": bits, "speed": speed, "measured": measured}
    with console_for(as_json) as console:
        if any(value is not None for value in fits.values()):
            console.result(_plan_fit(model, given, fits, device, memory, console), fit_plan_tables)
            return
        chosen = given.recipe(device=device)
        import tawny

        with console.progress() as progress:
            made = tawny.plan(model, recipe=chosen, memory=memory, progress=progress).to_dict()
        console.result(made, plan_tables)


def _plan_fit(
    model: str, given: Given, fits: dict[str, Any], device: str | None, memory: str | None, console: Console
) -> Result:
    recipe, own = given.of_fit(console.note, device)
    import tawny

    keys = {f"fit.{key}": value for key, value in own.items()}
    with console.progress() as progress:
        made = tawny.plan_fit(model, recipe=recipe, memory=memory, progress=progress, **{**fits, **keys})
    return made.to_dict()


def fit_plan_tables(plan: Result) -> list[Frame]:
    """Sizes by kind, and what would be chosen and taken."""
    kinds = table("all linears and head in", "size", "", title=f"{plan['source']}, packed")
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
