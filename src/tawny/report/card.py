"""The model card written beside the weights: what was done, how good it is, what it is for, and how to repeat it.

Everything in it comes from `run.json`, but for what the base model's card says about licence, languages and tags:
a pruned model is bound by the licence of the model it was made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tawny.kinds import solved_kind
from tawny.recipe.files import dump_yaml
from tawny.record import measured_numbers
from tawny.report.form import Form, form_of, samples_shown, whole_kind
from tawny.report.frames import escaped, facts, markdown
from tawny.report.view import (
    finalists,
    fit_facts,
    loops_words,
    measured_on,
    quality,
    recovered_since,
    recovery_words,
    summary,
    trace,
)
from tawny.words import begun, duration, percent

CARD = "README.md"
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
        front = yaml.safe_load(head) if closed else None
    except (yaml.YAMLError, ValueError):  # a ValueError is that of a date such as 2024-13-45
        return {}
    return dict(front) if isinstance(front, Mapping) else {}


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
        f"# {escaped(source.rstrip('/').split('/')[-1])}, {form.title}",
        f"{summary(record, form, recovered=bool(recovery), mark='`')} {_untouched(record, bool(recovery))}".rstrip(),
        _use(record, form),
        _numbers(record, recovered=bool(recovery)),
        *([_fit(record["fit"])] if record.get("fit") else []),
        *(
            [f"## Recovered\n\n{escaped(recovery_words(recovery) + recovered_since(record))}"]
            if recovery
            else []
        ),
        _INTENDED,
        f"## Recipe\n\n```yaml\n{dump_yaml(record['recipe']).strip()}\n```",
        _trace(record),
    ]
    return "\n\n".join(parts) + "\n"


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
    if _for_gpus(record):
        text = "Weights are integers in words of 32 bits, for vLLM, SGLang, and transformers with the package compressed-tensors."
    elif record.get("packed") and form.pruned:
        text = "Zeros are not stored: weights are a bit mask and the survivors, in files and in memory."
    elif record.get("packed"):
        text = "Weights are integers with a scale for each group of columns, in files and in memory."
    elif "compressed-tensors" in {solved_kind(kind).target for kind in form.kinds.values()}:
        text = f"This folder {large}opens with plain transformers; `tawny export --to compressed-tensors` makes it small."
    elif not form.pruned:
        text = f"This folder {large}opens with plain transformers; `tawny pack` makes it small."
    else:
        text = f"The zeros are stored: this folder {large}opens with plain transformers."
    code = opening(record, '"THIS_FOLDER"')
    return f"## Use\n\n{text}\n\n```python\n{code}\n```"


def _for_gpus(record: Mapping[str, Any]) -> bool:
    return "format" in (record.get("packed") or {})


def opening(record: Mapping[str, Any], folder: str) -> str:
    """Python that opens the model; `folder` is an expression."""
    first = (
        "import tawny  # teaches transformers to open packed weights\n"
        if record.get("packed") and not _for_gpus(record)
        else ""
    )
    classes = _classes(record)
    names = ("model", "tokenizer" if "AutoTokenizer" in classes else "processor")
    lines = [f"{name} = {kind}.from_pretrained({folder})" for name, kind in zip(names, classes, strict=False)]
    return "\n".join([f"{first}from transformers import {', '.join(classes)}", *lines])


def _classes(record: Mapping[str, Any]) -> list[str]:
    """Of transformers, that open the folder, the model's first; older records name none."""
    return list(record.get("opens") or ["AutoModelForCausalLM", "AutoTokenizer"])


def _numbers(record: Mapping[str, Any], recovered: bool) -> str:
    frame = quality(record["evaluation"])
    if frame is None:
        known = "Its finalists were compared, below. " if record.get("fit") else "Not measured. "
        return (
            f"## Quality\n\n{known}`tawny eval THIS_FOLDER --text TEXT` gives perplexity ± its standard error, and with "
            "`--against DENSE` the distance from the dense model."
        )
    note = measured_on(record) + " The pruned model was measured before its recovery." * recovered
    if record.get("loops"):
        note += f" {loops_words(record['loops'])}."
    return f"## Quality\n\n{markdown(frame)}\n\n{escaped(note)}"


def _fit(fit: Mapping[str, Any]) -> str:
    """What the model was chosen from, where `tawny fit` made it."""
    rows = [*fit_facts(fit), *(("warning", warning) for warning in fit["warnings"])]
    aim = "speed" if fit["speed"] else "size"
    return f"## Chosen for its {aim}\n\n{markdown(facts(rows))}\n\n{markdown(finalists(fit))}"


def _trace(record: Mapping[str, Any]) -> str:
    text, seconds, fit = record["text"], record["seconds"], record.get("fit") or {}
    if fit.get("seconds") and not fit.get("resumed"):  # of a fit that went on, the last part alone is known
        seconds = fit["seconds"]
    calibration = (
        f"{samples_shown(text)} of {text.get('name')}{begun(text)}" if text else "no text was needed"
    )
    rows = [("calibration", calibration)]
    rows += [("revision of the base model", record["revision"])] if record.get("revision") else []
    rows += [*trace(record), ("time", duration(seconds.get("total", sum(seconds.values()))))]
    what = "removed" if form_of(record).kinds and not record.get("recovery") else "sparsity"
    rows.append((what, f"{percent(record['sparsity'])}; run.json has every linear's, report.html shows them"))
    return f"## How it was made\n\n{markdown(facts(rows))}"
