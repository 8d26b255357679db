"""A comparison as one frame, and what stands below it: Markdown and one self-contained HTML page are made of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tawny.report.frames import Frame, Marked, escaped, markdown
from tawny.report.pages import render, write_beside
from tawny.words import SHARES, kl_text, percent, perplexity_text, points_text, score_text, share_text, size

_NOTHING = "–"
Better = Literal["lower", "higher"]
# A number, and how it is written with its spread.
Found = tuple[float, str]


def _differ(models: Sequence[Mapping[str, Any]]) -> bool:
    """Whether models have other tokenizers, so that none agrees with the next token of another."""
    return any("agreement" in model.get("errors", {}) for model in models)


def compared(result: Mapping[str, Any]) -> Frame:
    """A column a model, and every line that at least one of them has a number for; the best of a line is marked."""
    models: Sequence[Mapping[str, Any]] = result["models"]
    frame = Frame(("", *(model["name"] for model in models)), wrapped=range(len(models) + 1))
    frame.add("kind", *(str(model.get("kind", _NOTHING)) for model in models))

    def add(
        name: str,
        unit: str,
        read: Callable[[Mapping[str, Any]], Found | None],
        better: Better | None = None,
        change: Callable[[float, float], str] | None = None,
    ) -> None:
        cells = [_read(read, model) for model in models]
        if any(cells):
            frame.add(name + (f", {unit}" if unit else ""), *_cells(cells, better, change))

    add("sparsity", "", lambda m: (m["sparsity"], percent(m["sparsity"])))
    add("files", "", lambda m: (m["file_bytes"], size(m["file_bytes"])), "lower", _times)
    add("resident memory", "", lambda m: (m["resident_bytes"], size(m["resident_bytes"])), "lower", _times)
    # Where tokenizers differ, perplexities mislead.
    if _differ(models):
        add("perplexity", "", _perplexity)
        add("bits per byte", "", _bits_per_byte, "lower", _times)
    else:
        add("perplexity", "", _perplexity, "lower", _times)
    first = models[0]["name"]
    add(f"KL from {first}", "nats a token", lambda m: _agreed(m, "kl", kl_text), "lower")
    add(f"same next token as {first}", "%", lambda m: _agreed(m, "top1", share_text), "higher")
    add(f"energy lost from {first}", "%", lambda m: _feature(m, "error", share_text), "lower")
    add(f"cosine to {first}", "", lambda m: _feature(m, "cosine", kl_text), "higher")
    add(f"same nearest as {first}", "%", lambda m: _feature(m, "neighbours", share_text), "higher")
    add(f"KL from {first} a sample", "nats", lambda m: _feature(m, "kl", kl_text), "lower")
    add(f"same class as {first}", "%", lambda m: _feature(m, "top1", share_text), "higher")
    add("accuracy", "%", _accuracy, "higher", _points)
    asked = [task for m in models for task in m.get("tasks", {}).get("tasks", ())]
    for name, metric in {task["name"]: task["metric"] for task in asked}.items():
        read = partial(_task, name=name, metric=metric)
        if metric in SHARES:
            add(name, "%", read, "higher", _points)
        else:  # whether less of it is better only its authors know
            add(name, metric, read)
    if any(len(model.get("tasks", {}).get("tasks", ())) > 1 for model in models):
        add("mean of the tasks", "%", _mean_of_tasks, "higher", _points)
    for kind in ("prefill", "decode"):
        add(kind, "tokens/s", partial(_speed, kind=kind), "higher", _times)
    add("a batch", "ms", _latency, "lower", _times)
    return frame


def _read(read: Callable[[Mapping[str, Any]], Found | None], model: Mapping[str, Any]) -> Found | None:
    try:
        cell = read(model)
    except (KeyError, TypeError):  # not measured, or failed
        return None
    return cell if cell and math.isfinite(cell[0]) else None


def _cells(
    found: Sequence[Found | None], better: Better | None, change: Callable[[float, float], str] | None
) -> list[Marked]:
    values = [value[0] for value in found if value is not None]
    best = None
    if better is not None and len(set(values)) > 1:
        best = min(values) if better == "lower" else max(values)
    reference = found[0]
    cells = []
    for index, value in enumerate(found):
        if value is None:
            cells.append(Marked(_NOTHING))
            continue
        difference = change(value[0], reference[0]) if change and index and reference else ""
        cells.append(Marked(value[1], difference, value[0] == best))
    return cells


def _times(value: float, reference: float) -> str:
    return f"× {value / reference:.2f}" if reference else ""


def _points(value: float, reference: float) -> str:
    return points_text(value - reference, 0)


def _agreed(model: Mapping[str, Any], key: str, show: Callable[[float, float], str]) -> Found:
    agreement = model["perplexity"]["agreement"]
    return agreement[key], show(agreement[key], agreement[f"{key}_stderr"])


def _feature(model: Mapping[str, Any], key: str, show: Callable[[float, float], str]) -> Found | None:
    features = model["features"]
    return None if features[key] is None else (features[key], show(features[key], features[f"{key}_stderr"]))


def _accuracy(model: Mapping[str, Any]) -> Found:
    accuracy = model["accuracy"]
    return accuracy["accuracy"], share_text(accuracy["accuracy"], accuracy["stderr"])


def _latency(model: Mapping[str, Any]) -> Found:
    latency = model["latency"]
    low, high = latency["seconds_quartiles"]
    return latency["seconds"], f"{1000 * latency['seconds']:,.2f} ({1000 * low:,.2f}–{1000 * high:,.2f})"


def _perplexity(model: Mapping[str, Any]) -> Found:
    return model["perplexity"]["perplexity"], perplexity_text(model["perplexity"])


def _bits_per_byte(model: Mapping[str, Any]) -> Found | None:
    value = model["perplexity"]["bits_per_byte"]
    return (value, f"{value:.4f}") if value > 0 else None


def _mean_of_tasks(model: Mapping[str, Any]) -> Found:
    tasks = model["tasks"]
    return tasks["mean"], share_text(tasks["mean"], tasks["stderr"])


def _task(model: Mapping[str, Any], name: str, metric: str) -> Found | None:
    task = next((task for task in model["tasks"]["tasks"] if task["name"] == name), None)
    if task is None or task["metric"] != metric:
        return None
    return task["value"], score_text(task)


def _speed(model: Mapping[str, Any], kind: str) -> Found:
    speed = model["speed"]
    value, (low, high) = speed[f"{kind}_tokens_per_second"], speed[f"{kind}_quartiles"]
    digits = 1 if value < 100 else 0
    return value, f"{value:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"


def caption(result: Mapping[str, Any]) -> list[str]:
    """What was asked, and of which machine, in words."""
    models = result["models"]
    said = []
    text = next((m["perplexity"] for m in models if "perplexity" in m), None)
    if text is not None:
        said.append(f"Perplexity on {text['text']}: {text['recipe']}. ± is the standard error over windows.")
        if _differ(models):
            said.append("Tokenizers differ, and perplexities with them: compare the bits per byte.")
    features = next((m["features"] for m in models if "features" in m), None)
    if features is not None:
        said.append(
            f"Features of {features['samples']:,} samples of {features['data']}, {features['seqlen']} positions each. "
            "± is the standard error over samples."
        )
    shown = next((m["accuracy"] for m in models if "accuracy" in m), None)
    if shown is not None:
        said.append(
            f"Accuracy on {shown['samples']:,} pictures of {shown['data']}, {shown['classes']:,} classes. ± is the standard error."
        )
    tasks = next((m["tasks"] for m in models if "tasks" in m), None)
    if tasks is not None:
        some = f", the first {tasks['limit']} documents of each" if tasks["limit"] else ""
        shown_first = [f"{task['name']} {task['shots']}-shot" for task in tasks["tasks"] if task["shots"]]
        shots = f"zero-shot{' but for ' * bool(shown_first)}{', '.join(shown_first)}"
        said.append(f"Accuracy of lm-eval {tasks['lm_eval']}'s tasks, {shots}{some}, ± its standard error.")
    speed = next((m["speed"] for m in models if "speed" in m), None)
    if speed is not None:
        said.append(
            f"Medians of {speed['rounds']} rounds with quartiles, a prompt of {speed['prompt_tokens']} tokens, "
            f"{speed['threads']} threads, kernels {speed['kernel']}."
        )
    batch = next((m["latency"] for m in models if "latency" in m), None)
    if batch is not None:
        of = f" of {batch['tokens']} tokens" if batch["tokens"] else ""
        said.append(
            f"A batch is {batch['batch']} sample{of}: medians of {batch['rounds']} rounds with quartiles, {batch['threads']} threads."
        )
    if len(models) > 1:
        said.append(f"Differences are from {models[0]['name']}; the best of each line is bold.")
    computer, libraries = result["machine"], result["versions"]
    parts = ("perplexity", "features", "accuracy", "tasks")
    computed = next((m[part]["compute"] for part in parts for m in models if part in m), None)
    said.append(
        f"{computer.get('cpu', '')}, torch {libraries.get('torch', '')}, "
        f"transformers {libraries.get('transformers', '')}{f'; computed in {computed}' if computed else ''}."
    )
    return said


def failures(result: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """`(model, part, reason)` of everything that is missing."""
    return [(m["name"], part, why) for m in result["models"] for part, why in m.get("errors", {}).items()]


def to_markdown(result: Mapping[str, Any]) -> str:
    """One table, what was asked below it, and what is missing."""
    sentences = "\n".join(f"{escaped(sentence)}  " for sentence in caption(result)).rstrip()
    parts = [markdown(compared(result)), sentences]
    if missing := failures(result):
        parts.append("\n".join(f"- {escaped(m)}: no {part}: {escaped(why)}" for m, part, why in missing))
    return "\n\n".join(parts) + "\n"


def to_html(result: Mapping[str, Any]) -> str:
    """A page that loads nothing; whatever came from outside is escaped by the template engine."""
    return render(
        "compare.html.j2",
        title=", ".join(model["name"] for model in result["models"]),
        comparison=compared(result),
        caption=caption(result),
        sources=[(model["name"], model["source"]) for model in result["models"]],
        failures=failures(result),
    )


def write(result: Mapping[str, Any], path: Path, make: Callable[[Mapping[str, Any]], str]) -> None:
    """Write beside and rename."""
    write_beside(path, make(result))
