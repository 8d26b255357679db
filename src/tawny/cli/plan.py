"""`tawny plan VERB`: what the same command would do, and the memory, disk and time that it would take."""

from __future__ import annotations

import typer

import tawny
from tawny.cli.console import Console
from tawny.cli.options import Aim, Memory, Model
from tawny.cli.recipe_options import CHOSEN_BY_FIT, Given, recipe_verb
from tawny.cli.recover import DenseModel, Pruned, TrainingOptions
from tawny.cli.root import app, verb
from tawny.cli.search import Trying, levels_and_windows
from tawny.cli.tables_of_pruning import allocation_table, recipe_words
from tawny.report.frames import Frame, Result, facts, parts, table
from tawny.words import duration, percent, size

plans = typer.Typer(help="Show what the same prune, fit, search or recover would take, without doing it.")
app.add_typer(plans, name="plan")


@recipe_verb(
    "tawny plan prune smollm2 -s 0.7",
    "tawny plan prune ./model -c owl-sparsegpt-70 --memory 6GB",
    "tawny plan prune ./model --values int4",
    among=plans,
)
def prune(model: Model, console: Console, *, given: Given, memory: Memory = None) -> None:
    """Show what the same `tawny prune` would do, and what it would take, without doing it."""
    recipe = given.recipe()
    with console.progress() as progress:
        planned = tawny.plan(model, recipe=recipe, memory=memory, progress=progress)
    console.result(planned.to_dict(), plan_tables)


@recipe_verb(
    "tawny plan fit smollm2 --size 80MB --calibration wiki",
    "tawny plan fit ./model --ram 8GB --context 16384",
    "tawny plan fit ./model --size 700MB --to gguf",
    without=CHOSEN_BY_FIT,
    among=plans,
)
def fit(model: Model, console: Console, *, given: Given, aim: Aim, memory: Memory = None) -> None:
    """Show what the same `tawny fit` would make, and what it would take, before anything is measured."""
    recipe, own = given.of_fit(console.note)
    with console.progress() as progress:
        planned = tawny.plan_fit(model, recipe=recipe, memory=memory, progress=progress, **aim.keys(own))
    console.result(planned.to_dict(), fit_plan_tables)


@recipe_verb(
    "tawny plan search smollm2 -s 0.6 --calibration wiki",
    "tawny plan search ./model -s 0.7 -m sparsegpt --trials 80",
    "tawny plan search ./model -s 0.7 --budget 20m --memory 6GB",
    without=("allocator",),
    among=plans,
)
def search(model: Model, console: Console, *, given: Given, trying: Trying, memory: Memory = None) -> None:
    """Show what the same `tawny search` would take, without trying anything."""
    wanted = trying.wanted(given)
    with console.progress() as progress:
        planned = tawny.plan_search(model, **wanted, memory=memory, progress=progress)
    console.result(planned.to_dict(), search_plan_tables)


@verb(
    "tawny plan recover pruned --teacher smollm2 --text self --minutes 10",
    "tawny plan recover pruned --teacher Qwen/Qwen3-8B --train lora --tokens 5M",
    "tawny plan recover pruned --teacher Qwen/Qwen3-8B -o checkpointing=true",
    among=plans,
)
def recover(pruned: Pruned, console: Console, *, teacher: DenseModel = None, asked: TrainingOptions) -> None:
    """Show what the same `tawny recover` would train, and what it would take, without a step."""
    settings = asked.settings()
    with console.progress() as progress:
        planned = tawny.plan_recovery(pruned, teacher, settings=settings, progress=progress)
    console.result(planned.to_dict(), recovery_plan_tables)


def fit_plan_tables(plan: Result) -> list[Frame]:
    """Sizes by kind, and what would be chosen and taken."""
    kinds = table("all linears and head in", "size", "", title=f"{plan['source']}, {plan['settings']['to']}")
    for row in plan["kinds"]:
        kinds.add(row["kind"], size(row["bytes"]), "fits" if row["fits"] else "too large")
    chosen, disk = plan["chosen"], plan["disk"]
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
    ]
    return [kinds, facts(rows + _ending(plan))]


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
    recipe, disk = plan["recipe"], plan["disk"]
    share = plan["prunable"] / max(plan["parameters"], 1)
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters in {len(plan['blocks'])} blocks"),
        ("recipe", recipe_words(recipe, plan["reads_text"], plan["seqlen"])),
        ("prunable", f"{plan['prunable']:,} weights in {len(plan['linears'])} linears ({percent(share, 0)})"),
        ("removed", f"{plan['removed']:,} weights ({percent(plan['removed'] / max(1, plan['prunable']))})"),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(disk['checkpoint'])} written, {size(disk['peak'])} while it is being written"),
    ]
    tables = [facts(rows + _ending(plan))]
    if plan["allocation"] is not None:
        linears = [{**linear, "sparsity": plan["allocation"][linear["name"]]} for linear in plan["linears"]]
        tables.insert(0, allocation_table(linears))
    return tables


def search_plan_tables(plan: Result) -> list[Frame]:
    """What a search would take."""
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters"),
        ("tries", f"{plan['settings']['trials']} allocations, solved by {plan['solver']}"),
        *levels_and_windows(plan),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(plan['disk']['peak'])} until it is over"),
    ]
    return [facts([*rows, *_ending(plan)])]


def recovery_plan_tables(plan: Result) -> list[Frame]:
    """What a recovery would train, and what it would take."""
    disk, settings = plan["disk"], plan["settings"]
    share = plan["zeros"] / max(1, plan["prunable"])
    steps = f"about {plan['tokens']:,} tokens in {plan['steps']:,} steps of {settings['batch']} × {settings['seqlen']}"
    rows = [
        ("model", f"{plan['source']}: {plan['parameters']:,} parameters"),
        ("sparsity", f"{percent(share)} of {plan['prunable']:,} prunable weights"),
        ("trains", f"{plan['trained']:,} values ({settings['train']}) on {steps}"),
        ("peak memory", _memory_words(plan)),
        ("disk", f"{size(disk['checkpoint'])} written, {size(disk['peak'])} meanwhile"),
    ]
    if plan["written"]:
        rows.insert(3, ("writes first", f"about {plan['written']:,} tokens of its own text"))
    return [facts([*rows, *_ending(plan)])]


def _ending(plan: Result) -> list[tuple[str, str]]:
    seconds = plan["seconds"]
    time = f"about {duration(seconds['total'])}{parts(seconds, 'total', duration)}"
    return [("time", time), *(("note", note) for note in plan["notes"])]


def _memory_words(plan: Result) -> str:
    memory = {key: value for key, value in plan["memory"].items() if key != "smallest"}
    words = f"about {size(memory['peak'])}{parts(memory, 'peak', size)}"
    smallest = plan["memory"].get("smallest", memory["peak"])
    if plan.get("hidden_states") == "disk":
        return f"{words}; hidden states on disk"
    return f"{words}; {size(smallest)} with hidden states on disk" if smallest < memory["peak"] else words
