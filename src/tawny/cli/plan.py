"""`tawny plan`: estimate memory, disk and time of a `prune`."""

from __future__ import annotations

from tawny.cli.common import console_for
from tawny.cli.frames import Frame, Result, facts, parts
from tawny.cli.options import AsJson, Device, Memory, Model, TrustRemoteCode
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.cli.tables_of_pruning import allocation_table, recipe_words
from tawny.words import duration, percent, size


@recipe_verb(
    "tawny plan smollm2 -s 0.7",
    "tawny plan ./model -c owl-sparsegpt-70 --memory 6GB",
    "tawny plan ./model -s 0.6 -a uniform -m wanda -o 'exclude=*.down_proj' --json",
)
def plan(
    model: Model,
    *,
    given: Given,
    device: Device = None,
    memory: Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it."""
    with console_for(as_json) as console:
        chosen = given.recipe(device=device)
        import tawny

        with console.progress() as progress:
            made = tawny.plan(model, recipe=chosen, memory=memory, progress=progress).to_dict()
        console.result(made, plan_tables)


def plan_tables(plan: Result) -> list[Frame]:
    """What would be pruned, and what it would take."""
    recipe, disk, seconds = (plan[key] for key in ("recipe", "disk", "seconds"))
    share = plan["prunable"] / max(plan["parameters"], 1)
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters in {len(plan['blocks'])} blocks"),
        ("recipe", recipe_words(recipe, plan["reads_text"])),
        ("prunable", f"{plan['prunable']:,} weights in {len(plan['linears'])} linears ({percent(share, 0)})"),
        ("removed", f"{plan['removed']:,} weights ({percent(recipe['sparsity'])})"),
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
