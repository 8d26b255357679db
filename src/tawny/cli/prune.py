"""`tawny prune`: prune a model and write it with a report."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tawny
from tawny.cli.console import Console
from tawny.cli.options import OUTPUT, Memory, Model, Out, StartOver, option, packed_values
from tawny.cli.recipe_options import Given, recipe_verb
from tawny.cli.tables_of_pruning import allocation_table, recipe_words
from tawny.errors import UserError
from tawny.kinds import KINDS, names_of, solved_kind
from tawny.process_group import speaks
from tawny.report.form import choice_of_experts
from tawny.report.frames import Frame, Result, facts, parts
from tawny.report.view import loops_words, quality
from tawny.words import duration, percent, size

if TYPE_CHECKING:
    from tawny.recipe.schema import Recipe

EVAL_WINDOWS = 20  # of `tawny prune --eval`; enough for a standard error, few enough to wait for


@recipe_verb(
    "tawny prune smollm2 --out pruned -s 0.5 --calibration wiki --eval wiki",
    "tawny prune Qwen/Qwen3-8B --out packed -s 0.7 -a owl -m wanda -o lambda=0.15 --pack bf16",
    "tawny prune ./model --out pruned -c owl-wanda-mixed-3-8",
)
def prune(
    model: Model,
    console: Console,
    *,
    given: Given,
    out: Out,
    memory: Memory = None,
    overwrite: StartOver = False,
    pack: str | None = option(
        "--pack KIND",
        f"Write a packed folder ({names_of(KINDS.values())}) instead of a dense one; see `tawny pack`. Default: --values.",
        OUTPUT,
    ),
    evaluate: str | None = option(
        "--eval TEXT",
        f"Then compare dense and pruned: perplexity on up to {EVAL_WINDOWS} windows; with -p experts also how often each repeats itself.",
        OUTPUT,
    ),
) -> None:
    """Prune MODEL and write it as a Hugging Face checkpoint with real zeros."""
    chosen = given.recipe()
    values = None if pack is None else packed_values(pack)
    targets = {solved_kind(name).target for name in chosen.values.names}
    packing = values is not None or bool(targets - {"gguf"})
    for end, kind in (("head", chosen.values.head), ("embedding", chosen.values.embedding)):
        if kind is not None and not packing and solved_kind(kind).target != "gguf":
            raise UserError(f"{end}={kind} is of a packed folder: give --pack or --values, too")
    windows = 0 if evaluate is None else _windows(model, evaluate, chosen)
    from tawny.exporting.compressed import TARGET, export_compressed
    from tawny.pruning.packing import prune_and_pack

    with console.progress() as progress:
        keys: dict[str, Any] = {
            "recipe": chosen,
            "progress": progress,
            "overwrite": overwrite,
            "memory": memory,
        }
        if packing:
            exports = values is None and TARGET in targets
            export = partial(export_compressed, progress=progress) if exports else None
            record = prune_and_pack(model, out, values, export=export, **keys)
            if speaks() and not exports:
                unpack = f"tawny unpack {shlex.quote(str(out))}"
                progress.say(f"the dense checkpoint was removed; `{unpack}` writes it again")
        else:
            record = tawny.prune(model, out, **keys)
    if not speaks():  # what follows is done by the first of several processes
        return
    if evaluate is not None:
        words = ["tawny", "eval", str(out), "--text", evaluate, "--against", model]
        console.note(f"{out} is complete; what follows is measured again by `{shlex.join(words)}`")
        record.evaluation = _compare(console, model, out, evaluate, windows, chosen)
        record.evaluation["pruned"] |= {"sparsity": record.sparsity, "rounded": record.rounded}
        record.generated = _samples(console, model, out, evaluate)
        if record.experts:
            with console.progress() as progress:
                progress.say("letting both models write, to see whether they repeat themselves")
                written = tawny.loops(
                    out,
                    evaluate,
                    against=model,
                    compute=chosen.compute,
                    device=chosen.device,
                    progress=progress,
                )
                record.loops = written.to_dict()
        from tawny.report.publish import publish

        console.note(f"report: {publish(record, out)}")
    console.result(record.to_dict(), record_tables)


def _windows(model: str, text: str, recipe: Recipe) -> int:
    """How many windows to compare on; asked before the work, since too short a text should not cost a whole run."""
    from tawny.calibration.mixture import check_texts
    from tawny.evaluation.perplexity import count_windows
    from tawny.evaluation.sources import reads_on
    from tawny.model.context import check_context
    from tawny.model.source import load_tokenizer, resolve
    from tawny.packed.opening import open_stack

    check_texts(text)
    folder = resolve(model)
    if not reads_on(folder):
        raise UserError(
            f"--eval measures perplexity, and {model} predicts no next token: compare its features afterwards, "
            f"tawny eval OUT --against {model}"
        )
    check_context(open_stack(folder).model, recipe.calibration.seqlen)
    tokenizer = load_tokenizer(folder)
    return count_windows(text, recipe.calibration.seqlen, None, tokenizer, most=EVAL_WINDOWS)


def _compare(
    console: Console, model: str, out: Path, text: str, windows: int, recipe: Recipe
) -> dict[str, Any]:
    """Perplexity of both models on the same windows."""
    measured: dict[str, Any] = {}
    for name, source in (("dense", model), ("pruned", str(out))):
        with console.progress() as progress:
            progress.say(f"measuring the {name} model on {text}")
            result = tawny.evaluate(
                source,
                text,
                seqlen=recipe.calibration.seqlen,
                windows=windows,
                compute=recipe.compute,
                device=recipe.device,
                progress=progress,
            )
        measured[name] = result.to_dict()
    return measured


def _samples(console: Console, model: str, out: Path, text: str) -> list[dict[str, str]]:
    """What both models write after the same words of the text."""
    from tawny.calibration.mixture import load_texts
    from tawny.evaluation.samples import prompts_from, text_samples
    from tawny.model.source import load_tokenizer, resolve

    first = load_texts(text, "evaluation", load_tokenizer(resolve(model))).texts[0]
    with console.progress() as progress:
        return text_samples(model, out, prompts_from(first), progress=progress)


def record_tables(record: Result) -> list[Frame]:
    """What `tawny prune` did: the sparsity of every block, the sums, and dense beside pruned if measured."""
    seconds = record["seconds"]
    total = seconds.get("total", sum(seconds.values()))
    expected = record.get("memory", {}).get("estimate")
    rows = [
        ("recipe", recipe_words(record["recipe"], bool(record["text"]), record["text"].get("seqlen", 0))),
        ("sparsity", f"{percent(record['sparsity'])} of {record['prunable']:,} prunable weights"),
        ("time", f"{duration(total)}{parts(seconds, 'total', duration)}"),
        ("peak memory", size(record["peak_memory"]) + (f", {size(expected)} estimated" if expected else "")),
    ]
    if record.get("experts"):
        rows.insert(1, ("experts", choice_of_experts(record)))
    if refined := record.get("refined"):
        better = sum(block["best_epoch"] > 0 for block in refined)
        left = [block["after"] / block["before"] for block in refined if block["before"] > 0]
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
    if record.get("experts"):
        command = shlex.join(["tawny", "eval", record["out"], "--against", record["source"], "--loops"])
        rows.append(
            (
                "repeats itself",
                loops_words(record["loops"]) if record.get("loops") else f"not measured: {command}",
            )
        )
    compared = quality(record["evaluation"])
    return [allocation_table(record["linears"]), facts(rows), *([compared] if compared else [])]
