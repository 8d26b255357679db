"""`report.html`: one page about one run, complete in itself, for people who were not there.

`_tiles` has the numbers at its top, `_view` all that templates/report.html.j2 shows. Words that terminal and card share with
it are made in view.py.

What it promises:

- It is made from the dictionary in `run.json` and from nothing else, so it can be made again anywhere:
  `write_report(json.loads(Path("DIR/run.json").read_text()), "DIR")`.
- It loads nothing: styles, script and picture are inside, and a content policy forbids the browser to fetch anything.
- Whatever came from outside (names of models and texts, generated words) is escaped by the template engine.
- Without its script it says the same: every number of the picture is in a table below it.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from markupsafe import Markup

from tawny.kinds import KINDS, range_of, solved_kind
from tawny.recipe.files import dump_yaml
from tawny.record import measured_numbers
from tawny.report.card import opening
from tawny.report.figures import WIDTHS, DepthRow, depth_figure
from tawny.report.form import Form, form_of, samples_shown
from tawny.report.pages import render, write_beside
from tawny.report.view import (
    ENDS,
    by_block,
    finalists,
    fit_facts,
    loops_words,
    mean_of,
    measured_on,
    phases,
    quality,
    recovery_words,
    rounded_since,
    summary,
    trace,
)
from tawny.words import begun, duration, kl_text, percent, perplexity_text, size, unique_ends

NAME = "report.html"


def write_report(record: Mapping[str, Any], folder: str | Path) -> Path:
    """Write `report.html` into `folder`, beside and renamed, and return its path."""
    return write_beside(Path(folder) / NAME, render_report(record))


def render_report(record: Mapping[str, Any]) -> str:
    """The page as text."""
    return render("report.html.j2", **_view(measured_numbers(record)))


def _view(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, as text and numbers ready to be shown."""
    form, fit = form_of(record), record.get("fit") or {}
    recovery = [record["recovery"]] if record.get("recovery") else []
    linears = [
        {**x, "bits": solved_kind(form.kinds[x["name"]]).bits}
        for x in record["linears"]
        if x["name"] in form.kinds
    ]
    M = record.get("outlier_M") or 5.0
    blocks, comparison = _blocks(record, M), quality(record["evaluation"])
    heat = [_heat(linears, "bits", "Bits of a survivor", _linear_scale, "{:.3g}".format)] * (
        len(set(form.kinds.values())) > 1
    )
    heat += [_heat(record["linears"], "sparsity", "Sparsity, %", _linear_scale)] * form.pruned
    heat.append(_heat(record["linears"], "error", error_title(record["linears"]), _log_scale))
    return {
        "title": f"{_name(record)}, {form.title}",
        "summary": " ".join(
            [summary(record, form, recovered=bool(recovery)), *map(recovery_words, recovery)]
        ),
        "numbers": _tiles(record, form),
        "warnings": [*record["warnings"], *fit.get("warnings", [])],
        "asked": _asked(record, form),
        "M": f"{M:g}",
        "blocks": blocks,
        "knows_before": any("before" in row.counted for row in blocks),
        "knows_after": any("after" in row.counted for row in blocks),
        "knows_felt": all(row.felt is not None for row in blocks),
        "figures": {
            name: depth_of(record, width=width, prefix=name) for name, width in WIDTHS.items() if blocks
        },
        "heat": heat,
        "error_kind": _error_kind(record["linears"]),
        "fit": fit
        and {
            "aim": "speed" if fit["speed"] else "size",
            "facts": fit_facts(fit),
            "finalists": finalists(fit),
        },
        "made": "pruned" if form.pruned else "result",
        "comparison": comparison,
        "note": comparison and measured_on(record),
        "generated": record.get("generated", []),
        "loops": f"{loops_words(record['loops'])}." if record.get("loops") else "",
        "spent": phases(record["seconds"]),
        "cost": "To solve what was chosen" if fit else "Time and memory",
        "memory": _memory(record),
        "load": opening(record, repr(str(record["out"] or "DIR"))),
        "command": _command(record),
        "recipe_yaml": dump_yaml(record["recipe"]).strip(),
        "trace": trace(record),
    }


# --- words -----------------------------------------------------------------------------------------------


def _name(record: Mapping[str, Any]) -> str:
    return str(record["source"]).rstrip("/").split("/")[-1] or "model"


def _tiles(record: Mapping[str, Any], form: Form) -> list[tuple[str, str, str]]:
    """Name, value, remark: what a hurried reader takes away."""
    tiles = []
    if form.pruned:
        tiles.append(
            ("sparsity", percent(record["sparsity"], 1), f"{record['parameters']:,} parameters in all")
        )
    if form.kinds:
        tiles.append(("bits of a survivor", f"{form.bits:.2f}", range_of(form.kinds.values())))
    measured, fit = record["evaluation"], record.get("fit") or {}
    name, quality, remark = "perplexity", "not measured", "--eval TEXT measures both models"
    if {"dense", "pruned"} <= set(measured):
        dense, quality = measured["dense"], perplexity_text(measured["pruned"])
        remark = f"dense {perplexity_text(dense)} on {dense['text']}"
        remark += "; measured before packing rounded it" if rounded_since(record) else ""
    elif fit:
        rows = {row["name"]: row for row in fit["finalists"]}
        won = rows.get(fit.get("winner", ""), min(rows.values(), key=lambda row: row["kl"]))
        name, quality, remark = (
            "KL from dense",
            kl_text(won["kl"], won["kl_stderr"]),
            "nats a token, on held-out text",
        )
    whole = (
        fit.get("seconds") if not fit.get("resumed") else None
    )  # of a fit that went on, the last part alone
    seconds = whole or record["seconds"]
    total, threads = seconds.get("total", sum(seconds.values())), record["machine"].get("threads", "?")
    spent = ", the whole fit" if whole else ", to solve what was chosen" if fit else ""
    before = f"{size(record['memory_before'])} before it began"
    tiles += [
        (name, quality, remark),
        ("time", duration(total), f"{threads} threads{spent}"),
        ("peak memory", size(record["peak_memory"]), before),
    ]
    if record["bytes"]:
        packed = (record.get("packed") or {}).get("source_bytes")
        stored = f"packed from {size(packed)}" if packed else record["storage"] or "as they came"
        tiles.append(("weights on disk", size(record["bytes"]), stored))
    return tiles


def _asked(record: Mapping[str, Any], form: Form) -> list[tuple[str, str]]:
    recipe, text = record["recipe"], record["text"]
    calibration = "none: the weights alone decided"
    if text:
        calibration = f"{samples_shown(text)} of {text.get('name')}{begun(text)}"
    rows = [
        ("model", record["source"] + (f" at {record['revision']}" if record.get("revision") else "")),
        *([("sparsity", percent(recipe["sparsity"], 2))] if form.pruned else []),
        *([("values", _values(recipe, form))] if form.kinds else []),
        ("allocator", _choice(recipe["allocator"])),
        ("solver", _choice(recipe["solver"])),
        ("pattern", str(recipe["pattern"])),
        ("calibration", calibration),
        *((key, ", ".join(recipe[key])) for key in ("include", "exclude") if recipe.get(key)),
        ("computed in", str(record["compute"])),
        ("seed", str(recipe["seed"])),
    ]
    return rows


def _values(recipe: Mapping[str, Any], form: Form) -> str:
    ends = [f"{end} {recipe['values'][end]}" for end in ("head", "embedding") if recipe["values"].get(end)]
    return ", ".join([range_of(form.kinds.values()), *ends])


def _choice(choice: Mapping[str, Any]) -> str:
    options = ", ".join(
        f"{k} = {v}" for k, v in choice.items() if k != "name" and v not in (None, False, [], {})
    )
    return f"{choice['name']} ({options})" if options else str(choice["name"])


# --- depth -----------------------------------------------------------------------------------------------


def _numel(linear: Mapping[str, Any]) -> int:
    return int(linear["shape"][0]) * int(linear["shape"][1])


def _by(
    linears: Iterable[Mapping[str, Any]], key: Callable[[Mapping[str, Any]], Any]
) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for linear in linears:
        groups.setdefault(key(linear), []).append(linear)
    return groups


def _blocks(record: Mapping[str, Any], M: float) -> list[DepthRow]:
    """One row a block, with numbers for the picture and words for the table."""
    profiled = (record.get("profile") or {}).get("blocks", [])
    rows = []
    for block, members in by_block(record["linears"]):
        before, after = (_share(members, f"outliers_{when}") for when in ("before", "after"))
        if before is None and block < len(profiled):
            before = profiled[block].get("outlier_share", {}).get(f"{M:g}")
        sparsity, error = mean_of(members, "sparsity"), mean_of(members, "error")
        texts = {
            "before": _share_text(before),
            "after": _share_text(after),
            "sparsity": percent(sparsity),
            "error": _share_text(100 * error),
        }
        notes = [member.get("notes", {}).get("felt") for member in members]
        felt = None if None in notes else sum(notes)
        if felt is not None:
            texts["felt"] = f"{felt:.3g} nats"
        rows.append(DepthRow(block, len(members), before, after, sparsity, error, felt, texts))
    return rows


def _share(members: Sequence[Mapping[str, Any]], key: str) -> float | None:
    counts = [linear.get(key) for linear in members]
    known = [count for count in counts if count is not None]
    return 100 * sum(known) / sum(map(_numel, members)) if len(known) == len(counts) else None


def _share_text(value: float | None) -> str:
    """A number that is in % already, with three digits that mean something."""
    return "–" if value is None else f"{value:.3g} %" if value < 99.95 else f"{value:,.0f} %"


def depth_of(record: Mapping[str, Any], *, width: int, prefix: str = "depth") -> Markup:
    """The picture of a record: outliers, sparsity and error over depth."""
    M = record.get("outlier_M") or 5.0
    rows = _blocks(record, M)
    return depth_figure(
        rows,
        prefix=prefix,
        width=width,
        target=record["sparsity"] if form_of(record).pruned else None,
        M=M,
        error=error_title(record["linears"]),
    )


# --- linears ---------------------------------------------------------------------------------------------


def _role(linear: Mapping[str, Any]) -> str:
    """The linear's name without numbers, which those of all blocks share; experts and the like, too."""
    return re.sub(r"\b\d+\b", "*", str(linear["name"]))


def _heat(
    linears: Sequence[Mapping[str, Any]],
    key: str,
    title: str,
    scale: Callable[[Sequence[float]], Any],
    shown: Callable[[float], str] = lambda share: _short(100 * share),
) -> dict[str, Any]:
    """A table of blocks by linears; `level` is how dark a cell is, 0 to 100."""
    roles = list(_by(linears, _role))
    cells = {
        place: mean_of(members, key)
        for place, members in _by(linears, lambda x: (x["block"], _role(x))).items()
    }
    level = scale([value for value in cells.values() if math.isfinite(value)])
    rows = []
    for block in sorted({block for block, _ in cells}):
        values = [cells.get((block, role)) for role in roles]
        row = [
            {"text": "", "level": 0} if v is None else {"text": shown(v), "level": round(level(v))}
            for v in values
        ]
        rows.append({"block": block, "cells": row})
    parts = [role.split(".") for role in roles]
    columns = zip(*(each[:-1] for each in parts), strict=False)
    common = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))  # the path of the blocks
    heads = [
        {"name": ".".join(each[common:]), "short": short}
        for each, short in zip(parts, unique_ends(roles), strict=True)
    ]
    return {"key": key, "title": title, "roles": heads, "rows": rows}


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "∞"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


def _linear_scale(values: Sequence[float]) -> Callable[[float], float]:
    low, high = min(values, default=0.0), max(values, default=0.0)
    return lambda value: 100 * (value - low) / (high - low) if high > low else 40.0


def _log_scale(values: Sequence[float]) -> Callable[[float], float]:
    """Errors differ by orders of magnitude."""
    positive = [math.log(value) for value in values if value > 0]
    inner = _linear_scale(positive)
    return lambda value: inner(math.log(value)) if 0 < value < math.inf else 100.0 if value > 0 else 0.0


def _error_kind(linears: Sequence[Mapping[str, Any]]) -> str:
    words = {
        "hessian": "tr(ΔHΔᵀ)/tr(WHWᵀ) with the Hessian of the calibration inputs: exact on them",
        "norms": "with the inputs' column norms only, as if inputs were uncorrelated",
        "weights": "of the weights alone; no inputs were seen",
    }
    return "; ".join(words.get(kind, kind) for kind in dict.fromkeys(x["error_kind"] for x in linears))


def error_title(linears: Sequence[Mapping[str, Any]]) -> str:
    """What the errors are shares of; those of a block are the mean of its linears'."""
    alone = all(x["error_kind"] == "weights" for x in linears)
    return "Linears' error, % of the weights lost" if alone else "Linears' error, % of their output lost"


# --- numbers ---------------------------------------------------------------------------------------------


def _memory(record: Mapping[str, Any]) -> str:
    there = record["machine"].get("memory", 0)
    peak, before = size(record["peak_memory"]), size(record["memory_before"])
    has = f" The machine has {size(there)}." if there else ""
    return f"At its peak the process held {peak}; {before} of that before the run began.{has}"


# --- use and repeat ----------------------------------------------------------------------------------------


def _command(record: Mapping[str, Any]) -> str:
    """What to type to get the same bytes again."""
    text = record["text"]
    tensors = bool(text) and not text.get("sha256")  # what was given from Python has no hash
    if tensors or not record["out"] or not record["storage"]:
        return (
            'import tawny\n\nrecipe = tawny.load_recipe("run.json")\n'
            "tawny.prune(model, recipe=recipe, calibration=tokens)  # the same model and tokens as were given"
        )
    source, again = shlex.quote(str(record["source"])), shlex.quote(f"{record['out']}-again")
    packed = record.get("packed") or {}
    how = f" -c {shlex.quote(str(record['out']))}/run.json"
    begun, asked = shlex.quote(f"{record['out']}-again-begun"), record["recipe"].get("values") or {}
    if any(solved_kind(kind).target != "packed" for kind in record["values"].values()):
        return f"tawny prune {source} --out {again}{how}"
    if not packed.get("values"):
        rounded = record.get("rounded") or {}
        if not record["values"] and not rounded:
            return f"tawny prune {source} --out {again}{how}"
        floats = {kind.storage: kind.name for kind in KINDS.values() if not kind.scaled}
        plain = floats.get(record["storage"], "f32")
        kind = "" if record["values"] else f" --pack {(rounded.get('values') or [plain])[-1]}"
        ends = {end: rounded.get(end) for end in ENDS if rounded.get(end) != asked.get(end)}
        kind += "".join(f" -o {end}={value or 'null'}" for end, value in ends.items())
        return f"tawny prune {source} --out {begun}{how}{kind}\ntawny unpack {begun} --out {again}"
    ends = {end: packed.get(end) for end in ENDS if packed.get(end) != asked.get(end)}
    if record["values"]:
        # Such a recipe has what packing is told, which of several kinds goes where, too.
        kind = "" if packed["values"] in record["values"].values() else f" --pack {packed['values']}"
        kind += "".join(f" -o {end}={value or 'null'}" for end, value in ends.items())
        return f"tawny prune {source} --out {again}{how}{kind}"
    given = {key: packed[key] for key in ("values", "group", *ENDS) if packed.get(key)}
    if not ends and "group" not in given:
        return f"tawny prune {source} --out {again}{how} --pack {packed['values']}"
    kinds = "".join(f" --{key} {value}" for key, value in given.items())
    plain = "".join(f" -o {end}=null" for end in ENDS if asked.get(end))
    return f"tawny prune {source} --out {begun}{how}{plain}\ntawny pack {begun} --out {again}{kinds}"
