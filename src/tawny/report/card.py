"""The model card written beside the weights: what was done, how good it is, what it is for, and how to repeat it.

Everything in it comes from `run.json`, but for what the base model's card says about licence, languages and tags:
a pruned model is bound by the licence of the model it was made from.
"""

from __future__ import annotations

__all__ = [
    "CARD",
    "ENDS",
    "afterwards",
    "front_matter",
    "judged_on",
    "model_card",
    "opening",
    "packed_note",
    "recovered_since",
    "recovery_words",
    "rounded_since",
]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tawny.kinds import range_of
from tawny.recipe.files import dump_yaml
from tawny.record import measured_numbers
from tawny.report.form import Form, choice_of_blocks, form_of, samples_shown, whole_kind
from tawny.words import begun, counted, duration, kl_text, percent, perplexity_text, size

CARD = "README.md"
ENDS = ("head", "embedding")
# Facts about what the weights are made of. Results (`model-index`) and widgets are the dense model's own.
_INHERITED = ("license", "license_name", "license_link", "language", "base_model", "datasets", "pipeline_tag")
_INTENDED = (
    "## Intended use and limits\n\n"
    "For what the base model is for, under its licence, where memory or speed matters more than the last bit of "
    "quality; and for research. Pruning and rounding lose quality, and more of it the smaller the model, the "
    "higher the sparsity and the fewer the bits. They can lose unevenly: facts, languages and safety behaviour that calibration text did "
    "not show may suffer more than perplexity says. Biases of the base model remain. Measure the model on your own "
    "task before relying on it."
)


def front_matter(card: str) -> dict[str, Any]:
    """The metadata at the top of a card; empty where there is none or it is not valid YAML."""
    card = card.removeprefix("\ufeff")  # some editors begin a file with it
    if not card.startswith("---"):
        return {}
    head, closed, _ = card[3:].partition("\n---")
    try:
        found = yaml.safe_load(head) if closed else None
    except (yaml.YAMLError, ValueError):  # a ValueError is that of a date such as 2024-13-45
        return {}
    return dict(found) if isinstance(found, Mapping) else {}


def packed_note(card: str) -> str:
    """The block that `tawny pack` puts into a card; empty where there is none."""
    begin, end = (card.find(f"<!-- {mark} -->") for mark in ("packed", "/packed"))
    return card[begin:end] + "<!-- /packed -->\n" if 0 <= begin < end else ""


def model_card(
    record: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    note: str = "",
    recovery: Mapping[str, Any] | None = None,
) -> str:
    """Markdown with hub metadata.

    Args:
        record: what `run.json` holds.
        base: metadata of the base model's card.
        note: what stands between the metadata and the heading.
        recovery: what `recover.json` holds; the `recovery` of the record by default.
    """
    base = base or {}
    recovery = record.get("recovery") if recovery is None else recovery
    record = measured_numbers(record)
    source = str(record["source"])
    metadata: dict[str, Any] = {key: base[key] for key in _INHERITED if base.get(key)}
    if "language" in base and (language := _language(base["language"])):
        metadata["language"] = language
    if _is_hub_id(record):
        metadata["base_model"] = source
    if _classes(record)[0] == "AutoModelForCausalLM":
        metadata.setdefault("pipeline_tag", "text-generation")
    metadata["library_name"] = "transformers"
    tags = base.get("tags") or []
    words = [tag for tag in (tags if isinstance(tags, list) else [tags]) if isinstance(tag, str)]
    form = form_of(record)
    metadata["tags"] = list(dict.fromkeys([*words, *form.tags, "tawny"]))
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip()}\n---",
        *([note.rstrip("\n")] if note else []),
        f"# {_inline(source.rstrip('/').split('/')[-1])}, {form.title}",
        _what(record, form, recovered=bool(recovery)),
        _use(record, form),
        _numbers(record, recovered=bool(recovery)),
        *([_fit(record["fit"])] if record.get("fit") else []),
        *(
            [f"## Recovered\n\n{_inline(recovery_words(recovery) + recovered_since(record))}"]
            if recovery
            else []
        ),
        _INTENDED,
        f"## Recipe\n\n```yaml\n{dump_yaml(record['recipe']).strip()}\n```",
        _trace(record),
    ]
    return "\n\n".join(parts) + "\n"


def _inline(text: str) -> str:
    """A name as words: nothing in it may start a tag, a link or a new line of Markdown."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in flat)


def _is_hub_id(record: Mapping[str, Any]) -> bool:
    """Whether the source is a name on the hub: such a one has a revision, which a path like `models/mine` lacks."""
    source = str(record["source"])
    named = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return bool(named and record.get("revision") and not Path(source).is_dir())


def _language(language: Any) -> Any:
    """Codes as text: YAML reads `no`, which is Norwegian, as false."""
    if isinstance(language, list):
        return [_language(one) for one in language if not isinstance(one, list)]
    return "no" if language is False else language


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def recovery_words(recovery: Mapping[str, Any], how: str = "Trained after pruning") -> str:
    """What a recovery did, in sentences, from `recover.json` or the shorter `recovery` of `run.json`.

    Args:
        how: the first words.
    """

    def part(key: str) -> Mapping[str, Any]:
        found = recovery.get(key)
        return found if isinstance(found, Mapping) else {}

    words = how
    if _is_number(recovery.get("tokens")):
        words += f" on {recovery['tokens']:,} {counted(part('text'))[1]}"
        text = part("text").get("name", recovery.get("text"))
        words += f" of {text}" if isinstance(text, str) and text else ""
    settings = {**recovery, **part("settings")}
    method = [str(settings[key]) for key in ("method", "train") if settings.get(key)]
    words += f" ({', '.join(method)})" if method else ""
    words += f" against the dense model {recovery['teacher']}." if recovery.get("teacher") else "."
    steps = recovery.get("stages")
    if isinstance(steps, list) and len(steps) > 1:
        words += f" That is of {len(steps)} steps of pruning and training; what was measured is of the last."
    perplexities = [part(key).get("perplexity") for key in ("start", "best")]
    if all(map(_is_number, perplexities)):
        words += f" Held-out perplexity {perplexities[0]:,.2f} → {perplexities[1]:,.2f}."
    if _is_number(recovery.get("zeros_before")) and _is_number(recovery.get("zeros")):
        words += f" {recovery['zeros']:,} weights are zero, {recovery['zeros_before']:,} were before."
    return words


def _what(record: Mapping[str, Any], form: Form, recovered: bool) -> str:
    recipe = record["recipe"]
    # Of a grid, only what was removed is counted, until a recovery counts all zeros.
    went = "were removed" if form.kinds and not recovered else "are zero"
    zeros = (
        f"{record['zeros']:,} of {record['prunable']:,} prunable weights {went} ({record['sparsity']:.2%})"
    )
    if whole_kind(record) == "blocks":
        how = choice_of_blocks(record, mark="`")
    elif form.pruned:
        how = f"Allocated by `{recipe['allocator']['name']}`, solved by `{recipe['solver']['name']}`, pattern `{recipe['pattern']}`"
    else:
        zeros += ", all by rounding" if recovered and record["zeros"] else ""
        how = f"Solved by `{recipe['solver']['name']}`"
    if form.kinds:
        how += f", on the grid of {range_of(form.kinds.values())} ({form.bits:.2f} bits each)"
    if then := afterwards(record):
        how += f"; the survivors were {then}"
    return (
        f"{zeros}; the model has {record['parameters']:,} parameters in all. {how}. "
        f"{_untouched(record, recovered)}"
    ).rstrip()


def afterwards(record: Mapping[str, Any]) -> str:
    """What was done to the survivors once the mask was chosen, behind "were"; "" if nothing was."""
    steps = ["refitted by least squares"] if record["recipe"].get("refit") else []
    if made := record.get("refined"):
        better = sum(block["best_epoch"] > 0 for block in made)
        steps.append(
            f"trained block by block to give the dense outputs, which helped in {better} of {len(made)} blocks and was kept "
            "there"
        )
    return " and ".join(steps)


def _untouched(record: Mapping[str, Any], recovered: bool) -> str:
    """What besides the pruned weights is still the source's; empty where nothing is."""
    if record["recipe"].get("dtype"):  # a record does not say what it was before
        return ""
    refined = any(made["also"] for made in record.get("refined") or [])
    packed = {**(record.get("packed") or {}), **(record.get("rounded") or {})}
    biases = not whole_kind(record)
    if packed.get("head"):  # which packs the embedding as well
        kept = "" if refined or recovered else "Norms and biases" if biases else "Norms"
    elif packed.get("embedding"):
        kept = "" if refined or recovered else "Head, norms and biases" if biases else "Head and norms"
    elif recovered:
        kept = "Embeddings and head (not norms and biases, which were trained along)"
    elif refined:
        kept = "Embeddings and head (not the blocks' norms and biases, which were trained along)"
    else:
        kept = "Embeddings, head, norms and biases" if biases else "Embeddings, head and norms"
    return f"{kept} are those of the source, to the bit." if kept else ""


def _use(record: Mapping[str, Any], form: Form) -> str:
    large = "" if record["recipe"].get("dtype") else "is as large as the dense one and "
    if record.get("packed") and form.pruned:
        text = "Zeros are not stored: weights are a bit mask and the survivors, in files and in memory."
    elif record.get("packed"):
        text = "Weights are integers with a scale for each group of columns, in files and in memory."
    elif not form.pruned:
        text = f"This folder {large}opens with plain transformers; `tawny pack` makes it small."
    else:
        text = f"The zeros are stored: this folder {large}opens with plain transformers."
    code = opening(record, '"THIS_FOLDER"')
    return f"## Use\n\n{text}\n\n```python\n{code}\n```"


def opening(record: Mapping[str, Any], folder: str) -> str:
    """Python that opens the model; `folder` is an expression."""
    first = "import tawny  # teaches transformers to open packed weights\n" if record.get("packed") else ""
    classes = _classes(record)
    names = ("model", "tokenizer" if "AutoTokenizer" in classes else "processor")
    lines = [f"{name} = {kind}.from_pretrained({folder})" for name, kind in zip(names, classes, strict=False)]
    return "\n".join([f"{first}from transformers import {', '.join(classes)}", *lines])


def _classes(record: Mapping[str, Any]) -> list[str]:
    """Of transformers, that open the folder, the model's first; older records name none."""
    return list(record.get("opens") or ["AutoModelForCausalLM", "AutoTokenizer"])


def _numbers(record: Mapping[str, Any], recovered: bool) -> str:
    measured = record["evaluation"]
    if not {"dense", "pruned"} <= set(measured):
        known = "Its finalists were compared, below. " if record.get("fit") else "Not measured. "
        return (
            f"## Quality\n\n{known}`tawny eval THIS_FOLDER --text TEXT` gives perplexity ± its standard error, and with "
            "`--against DENSE` the distance from the dense model."
        )
    dense, pruned = measured["dense"], measured["pruned"]
    rows = [
        "| | dense | pruned |",
        "|---|---|---|",
        f"| perplexity | {perplexity_text(dense)} | {perplexity_text(pruned)} |",
    ]
    if dense.get("bits_per_byte") and pruned.get("bits_per_byte"):
        rows.append(f"| bits per byte | {dense['bits_per_byte']:.4f} | {pruned['bits_per_byte']:.4f} |")
    note = (
        f"{dense['windows']} windows of {dense['seqlen']} tokens of {_inline(str(dense['text']))}{begun(dense)}, text sha256 "
        f"`{dense['text_sha256']}`, computed in {dense['compute']}; ± is the standard error over windows."
    )
    if recovered:
        note += " The pruned model was measured before its recovery."
    note += rounded_since(record)
    return "## Quality\n\n" + "\n".join(rows) + f"\n\n{note}"


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


def judged_on(fit: Mapping[str, Any]) -> str:
    """The windows that the finalists of a fit were compared on; "" in a record that does not say."""
    held = fit.get("held_out") or {}
    if not held.get("deciding"):
        return ""
    return f"{held['deciding']} windows of {held['tokens']:,} tokens held out of the calibration text"


def _fit(fit: Mapping[str, Any]) -> str:
    """What the model was chosen from, where `tawny fit` made it."""
    rows = ["| | bytes | bits a weight | KL from dense |", "|---|---|---|---|"]
    for row in fit["finalists"]:
        kl = kl_text(row["kl"], row["kl_stderr"])
        rows.append(f"| {_inline(row['name'])} | {row['bytes']:,} | {row['bits']:.3f} | {kl} |")
    table = "\n".join(rows)
    speed = fit["speed"]
    aim, more = ("speed", [f"Assumed: {speed['assumes']}"]) if speed else ("size", [])
    more += [f"Judged on {judged}"] if (judged := judged_on(fit)) else []
    more += [each for each in (fit["refined"], *fit["warnings"]) if each]
    told = "".join(f"\n\n{_inline(line[0].upper() + line[1:])}." for line in more)
    return f"## Chosen for its {aim}\n\n{_inline(fit['says'])}; {_inline(fit['zeros'])}.\n\n{table}{told}"


def _trace(record: Mapping[str, Any]) -> str:
    text, machine, seconds = record["text"], record["machine"], record["seconds"]
    lines = []
    if text:
        hashed = f", sha256 `{text['sha256']}`" if text.get("sha256") else ""
        lines.append(
            f"Calibrated on {samples_shown(text)} of {_inline(str(text.get('name')))}{hashed}{begun(text)}."
        )
        for one in text.get("sources", ()):
            share, name = percent(one["share"], 0), _inline(str(one["name"]))
            lines.append(f"{share} of it: {name}, sha256 `{one['sha256']}`.")
    else:
        lines.append("No calibration text was needed.")
    if record.get("revision"):
        lines.append(f"Base model at revision `{record['revision']}`.")
    fit = record.get("fit") or {}
    if fit.get("seconds") and not fit.get("resumed"):  # of a fit that went on, the last part alone is known
        seconds = fit["seconds"]
    spent = duration(seconds.get("total", sum(seconds.values())))
    lines.append(
        f"Made in {spent} with {', '.join(f'{k} {v}' for k, v in record['versions'].items())} on "
        f"{_inline(str(machine.get('cpu', 'an unknown processor')))}, {machine.get('threads', '?')} threads."
    )
    for name, file in record.get("files", {}).items():
        lines.append(f"`{name}`: {size(file['bytes'])}, sha256 `{file['sha256']}`.")
    what = "Removed" if form_of(record).kinds and not record.get("recovery") else "Sparsity"
    lines.append(
        f"{what} {percent(record['sparsity'])}; every linear's is in `run.json`, drawn in `report.html`."
    )
    return "## How it was made\n\n" + "\n".join(f"- {line}" for line in lines)
