"""What a run was: each sentence, list and table of it is made here, once, from the dictionary that `run.json` or
`recover.json` holds. The terminal, the card and the page draw them, and each adds only what is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tawny.kinds import range_of
from tawny.report.form import Form, choice_of_blocks, choice_of_experts, whole_kind
from tawny.report.frames import Frame, table
from tawny.words import begun, counted, duration, kl_text, percent, perplexity_text, quality_text, size

ENDS = ("head", "embedding")
_PHASES = {
    "text": "reading and tokenising the text",
    "profile": "profiling the dense model",
    "read": "reading blocks",
    "backward": "backward walk to ask the output",
    "observe": "forwards that gather statistics",
    "forward": "forwards to the next block",
    "solve": "solving",
    "refine": "refining blocks",
    "search": "searching an allocation",
    "levels": "rounding every linear to every kind",
    "reactions": "measuring what the output loses",
    "error": "measuring errors",
    "outliers": "counting outliers",
    "teacher": "forwards of the dense model",
    "train_forward": "forwards of the trained model",
    "train_loss": "heads of both models, and their losses",
    "train_backward": "backward passes",
    "optimiser": "steps of the optimiser",
    "measure": "measuring on held-out windows",
    "save": "saving the state",
    "write": "writing",
    "hash": "hashing what was written",
}


# --- what was done -----------------------------------------------------------------------------------------


def summary(record: Mapping[str, Any], form: Form, *, recovered: bool, mark: str = "") -> str:
    """What was removed, who decided it, and what became of the other weights, in two sentences.

    Args:
        recovered: the weights were trained afterwards.
        mark: put around names of a recipe.
    """
    recipe, blocks = record["recipe"], len({linear["block"] for linear in record["linears"]})
    allocator, solver = (f"{mark}{recipe[axis]['name']}{mark}" for axis in ("allocator", "solver"))
    grid = (
        f" on the grid of {range_of(form.kinds.values())} ({form.bits:.2f} bits each)" if form.kinds else ""
    )
    # Of a grid, only what was removed is counted, until a recovery counts all zeros.
    went = "were removed" if form.kinds and not recovered else "are zero"
    zeros = f"{record['zeros']:,} of {record['prunable']:,} prunable weights {went} ({percent(record['sparsity'])})"
    if whole_kind(record) == "blocks":
        how = choice_of_blocks(record, mark)
        how += f"; the others are{grid}" if grid else ""
    elif whole_kind(record) == "experts":
        how = choice_of_experts(record, mark)
        zeros = f"{record['zeros']:,} of {record['prunable']:,} weights of experts were cut out ({percent(record['sparsity'])})"
    elif form.pruned:
        how = f"{allocator} shared the budget among {blocks} blocks, {solver} chose the weights"
        how += f" and solved the others{grid}" if grid else ""
        asked = recipe.get("output", {}).get("factor", "none") != "none"
        how += " by what the model's output feels of their errors" if asked else ""
        how += f", pattern {mark}{recipe['pattern']}{mark}"
    else:
        how = f"{solver} solved the weights of {blocks} blocks{grid}"
        if recovered and record["zeros"]:
            zeros += ", all by rounding"
        elif not recovered:
            zeros = f"None of {record['prunable']:,} prunable weights was removed"
    if then := afterwards(record):
        how += f"; the survivors were {then}"
    return f"{zeros}; the model has {record['parameters']:,} parameters in all. {how}."


def afterwards(record: Mapping[str, Any]) -> str:
    """What was done to the survivors once the mask was chosen, after "were"; "" if nothing was."""
    steps = ["refitted by least squares"] if record["recipe"].get("refit") else []
    if refined := record.get("refined"):
        better = sum(block["best_epoch"] > 0 for block in refined)
        steps.append(
            f"trained block by block to give the dense outputs, which helped in {better} of {len(refined)} blocks and was "
            "kept there"
        )
    return " and ".join(steps)


def recovery_words(recovery: Mapping[str, Any], how: str = "Trained after pruning") -> str:
    """What a recovery did, in sentences, from `recover.json` or the shorter `recovery` of `run.json`.

    Args:
        how: the first words.
    """

    def part(key: str) -> Mapping[str, Any]:
        value = recovery.get(key)
        return value if isinstance(value, Mapping) else {}

    words = how
    if _is_number(recovery.get("tokens")):
        words += f" on {recovery['tokens']:,} {counted(part('text'))[1]}"
        text = part("text").get("name", recovery.get("text"))
        words += f" of {text}" if isinstance(text, str) and text not in ("", "tokens") else ""
    settings = {**recovery, **part("settings")}
    method = [str(settings[key]) for key in ("method", "train") if settings.get(key)]
    words += f" ({', '.join(method)})" if method else ""
    words += f" against the dense model {recovery['teacher']}." if recovery.get("teacher") else "."
    perplexities = [part(key).get("perplexity") for key in ("start", "best")]
    if all(map(_is_number, perplexities)):
        words += f" Held-out perplexity {perplexities[0]:,.2f} → {perplexities[1]:,.2f}."
    zeros, before = recovery.get("zeros"), recovery.get("zeros_before")
    if _is_number(zeros) and zeros == before:
        words += f" All {zeros:,} zeros are still there."
    elif _is_number(zeros) and _is_number(before):
        words += f" {zeros:,} weights are zero, {before:,} were before."
    return words


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- how good it is ----------------------------------------------------------------------------------------


def quality(measured: Mapping[str, Any]) -> Frame | None:
    """Dense beside pruned, from the `evaluation` of a record; None where not both were measured."""
    if not {"dense", "pruned"} <= set(measured):
        return None
    both = dense, pruned = measured["dense"], measured["pruned"]
    frame = table("", "dense", "pruned", "change", title=f"perplexity on {dense['text']}, {_windows(dense)}")
    ratio = pruned["perplexity"] / dense["perplexity"]
    frame.add("perplexity", *map(perplexity_text, both), f"× {ratio:.2f}")
    if all(each.get("bits_per_byte") for each in both):
        change = pruned["bits_per_byte"] - dense["bits_per_byte"]
        bits = (f"{each['bits_per_byte']:.4f}" for each in both)
        frame.add("bits per byte", *bits, f"{change:+.4f}".replace("-", "−"))
    if any(each.get("sparsity") is not None for each in both):
        known = (each.get("sparsity") for each in both)
        frame.add("sparsity", *("–" if share is None else percent(share) for share in known), "")
    return frame


def measured_on(record: Mapping[str, Any]) -> str:
    """What both models were measured on, and whether the pruned one was rounded since."""
    dense = record["evaluation"]["dense"]
    return (
        f"{_windows(dense)} of {dense['text']}, text sha256 {dense['text_sha256']}, computed in {dense['compute']}; "
        f"± is the standard error over windows.{rounded_since(record)}"
    )


def _windows(measured: Mapping[str, Any]) -> str:
    return f"{measured['windows']} windows of {measured['seqlen']} tokens{begun(measured)}"


def loops_words(loops: Mapping[str, Any]) -> str:
    """`3 of 64 continuations end in a loop, 1 of the dense model's`, from the `loops` of a record."""
    return f"{loops['looped']} of {loops['prompts']} continuations end in a loop, {loops['dense']} of the dense model's"


def rounded_since(record: Mapping[str, Any]) -> str:
    """A sentence, where packing rounded the model after it was measured; else nothing."""
    if record["evaluation"]["pruned"].get("rounded") == (record.get("rounded") or {}):
        return ""
    return _rounded(record, "The pruned model was")


def recovered_since(record: Mapping[str, Any]) -> str:
    """A sentence, where packing rounded the model after a recovery had measured it; else nothing."""
    before = (record.get("recovery") or {}).get("rounded")
    return "" if before in (None, record.get("rounded") or {}) else _rounded(record, "This was")


def _rounded(record: Mapping[str, Any], what: str) -> str:
    rounded = record.get("rounded") or {}
    if not rounded:
        return ""
    parts = [*rounded.get("values", []), *(f"{end} {rounded[end]}" for end in ENDS if end in rounded)]
    return f" {what} measured before it was rounded to {', '.join(parts)}."


def finalists(fit: Mapping[str, Any]) -> Frame:
    """What `tawny fit` compared; what each was expected to lose stands only in the result of the verb itself."""
    expected = all("expected" in row for row in fit["finalists"])
    columns = ["finalist", "size", "bits a weight", "KL from dense", *["expected"] * expected]
    frame = table(*columns, title="nats a token, on held-out text")
    for row in sorted(fit["finalists"], key=lambda row: row["kl"]):
        cells = [size(row["bytes"]), f"{row['bits']:.3f}", kl_text(row["kl"], row["kl_stderr"])]
        frame.add(row["name"], *cells, *[f"{row['expected']:.4f}" for _ in range(expected)])
    return frame


def fit_facts(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a fit was asked for and what it chose."""
    speed, held = fit["speed"], fit.get("held_out") or {}
    rows = [("asked for", size(fit["budget"]))] if fit.get("budget") and not speed else []
    rows += [("chosen", fit["says"]), ("zeros", fit["zeros"])]
    if held.get("deciding"):
        windows = f"{held['deciding']} windows of {held['tokens']:,} tokens held out of the calibration text"
        rows.append(("judged on", windows))
    return rows + ([("assumed", speed["assumes"])] if speed else [])


def measurements(recovery: Mapping[str, Any], most: int | None = None) -> Frame:
    """What a training measured on its way.

    Args:
        recovery: what `recover.json` holds.
        most: about how many rows to show; the best and the last are always there. All if None.
    """
    settings, text, rows = recovery["settings"], recovery["text"], recovery["measured"]
    samples, units = counted(text)
    taught = any("kl" in entry for entry in rows)
    columns = ["step", units, "time", quality_text(recovery["start"])[0], *["KL", "same next word"] * taught]
    title = f"on {text['held_out']} held-out {samples} of {text['seqlen']} {units} of {text['name']}"
    frame = table(*columns, "", title=title, left=(len(columns),))
    every = 1 if most is None or len(rows) <= most + 2 else -(-len(rows) // most)
    best = recovery["best"]["step"]
    for index, entry in enumerate(rows):
        if index % every and entry["step"] != best and entry is not rows[-1]:
            continue
        seen = int(entry["step"] * settings["batch"] * settings["seqlen"])
        cells = [f"{entry['step']:.0f}", f"{seen:,}", duration(entry["seconds"]), quality_text(entry)[1]]
        cells += [f"{entry['kl']:.4f}", percent(entry["top1"], 1)] if taught else []
        frame.add(*cells, "best" if entry["step"] == best else "")
    return frame


# --- linears and blocks --------------------------------------------------------------------------------------


def by_block(linears: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """The linears of each block, in order."""
    blocks: dict[int, list[Mapping[str, Any]]] = {}
    for linear in linears:
        blocks.setdefault(linear["block"], []).append(linear)
    return sorted(blocks.items())


def mean_of(linears: Sequence[Mapping[str, Any]], key: str) -> float:
    """Weighted by parameters."""
    weights = [int(linear["shape"][0]) * int(linear["shape"][1]) for linear in linears]
    total = sum(linear[key] * weight for linear, weight in zip(linears, weights, strict=True))
    return float(total) / max(1, sum(weights))


# --- time, machine and files -----------------------------------------------------------------------------------


def phases(seconds: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """What took how long and its share of all in %, the longest first."""
    total = seconds.get("total", sum(seconds.values()))
    rows = sorted(((k, v) for k, v in seconds.items() if k != "total"), key=lambda part: -part[1])
    rest = total - sum(spent for _, spent in rows)
    if rest > 0.005 * total:
        rows.append(("everything else", rest))
    return [
        (_PHASES.get(name, name), duration(spent), round(100 * spent / total, 1) if total > 0 else 0.0)
        for name, spent in rows
    ]


def training_speed(record: Mapping[str, Any]) -> str:
    """Of the steps, beside what their matrix products alone would allow on this machine."""
    spent = f"{record['tokens_per_second']:,.0f} {counted(record['text'])[1]} a second while training"
    bound = record.get("products_per_second")
    return f"{spent}; plain matrix products would allow {bound:,.0f}" if bound else spent


def made_with(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Versions and machine."""
    machine = record["machine"]
    cores = f", {machine['cores']} cores" if "cores" in machine else ""
    system = f", {machine['system']}" if machine.get("system") else ""
    return [
        ("made with", ", ".join(f"{name} {version}" for name, version in record["versions"].items())),
        (
            "machine",
            f"{machine.get('cpu', 'unknown')}{cores}, {machine.get('threads', '?')} threads{system}",
        ),
    ]


def trace(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the numbers of a `run.json` come from: recipe, texts, versions, machine, and the files they are of."""
    from tawny.recipe.schema import fingerprint_of

    text = record["text"]
    rows = [("recipe", f"sha256 {fingerprint_of(record['recipe'])}")]
    if text.get("sha256"):
        parts = [(f"{percent(one['share'], 0)} of it", one) for one in text.get("sources", ())]
        rows += [
            (key, f"{one['name']}, sha256 {one['sha256']}")
            for key, one in [("calibration text", text), *parts]
        ]
    rows += made_with(record)
    if record.get("date"):
        rows.append(("date", record["date"]))
    files = record.get("files", {}).items()
    return rows + [(name, f"{size(file['bytes'])}, sha256 {file['sha256']}") for name, file in files]
