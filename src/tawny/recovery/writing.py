"""Write the recovered checkpoint: the source's files with the trained tensors replaced, its records, card and page.

`recover.json` is the training's own record. `run.json`, where pruning left one, goes on describing the folder it lies in:
its files are hashed anew, and `recovery` sums up what became of them. Card and page come from the two.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tawny.model import durable
from tawny.model.durable import writing
from tawny.record import finite, record_in, weight_files
from tawny.recovery.coordinates import Coordinates, Factors
from tawny.recovery.methods import METHODS
from tawny.recovery.record import RecoveryRecord
from tawny.recovery.student import Student
from tawny.report.card import CARD, front_matter, model_card, packed_note
from tawny.report.form import whole_kind
from tawny.report.view import recovery_words
from tawny.run.writer import CheckpointWriter

_OUTSIDE = "outside"
_RUN = "run.json"
# Of `recover.json`, what `run.json` sums up.
_SUMMARY = (
    "source",
    "teacher",
    "settings",
    "text",
    "steps",
    "tokens",
    "zeros_before",
    "zeros",
    "sparsity",
    "start",
    "best",
    "stopped",
    "seconds",
    "warnings",
)


@torch.no_grad()
def write(
    output: CheckpointWriter,
    student: Student,
    folder: Path | None,
) -> int:
    """Write the model; returns the bytes of its tensors. Tensors keep the dtype they are stored in."""
    stack = student.stack
    if folder is None or stack.checkpoint is None:
        stack.model.save_pretrained(output.folder)
        return sum(path.stat().st_size for path in output.folder.glob("*.safetensors"))
    checkpoint = stack.checkpoint
    trained: dict[str, list[Coordinates]] = {}
    for one in student.coordinates:
        trained.setdefault(one.linear.key if isinstance(one, Factors) else one.name, []).append(one)
    left = set(checkpoint.files)
    names = []
    for index in range(len(stack)):
        tensors: dict[str, Tensor] = {}
        for unit in checkpoint.units_of(stack.name(index)):
            parameters = checkpoint.load(unit, stack.model)
            for name in unit.targets:
                parameters[name] = _trained(parameters[name], trained.get(name, []))
            tensors.update(checkpoint.store(unit, parameters, stack.model))
            left -= set(unit.sources)
        names.append(f"{index:05d}")
        output.write_block(names[-1], tensors)
    outside = checkpoint.read(sorted(left))
    for unit in checkpoint.units:
        if unit.converter is None and unit.targets[0] in trained and unit.sources[0] in left:
            outside[unit.sources[0]] = _trained(outside[unit.sources[0]], trained[unit.targets[0]])
    output.write_block(_OUTSIDE, outside)
    size = output.assemble(output.plan_shards([_OUTSIDE, *names]))
    output.carry(folder, (_RUN, "recipe.yaml"))
    return size


def _trained(stored: Tensor, coordinates: list[Coordinates]) -> Tensor:
    weight = stored
    for one in coordinates:
        if isinstance(one, Factors):
            weight = weight.clone()
            one.linear.view(weight).copy_(one.weight())
        else:
            weight = one.value().to("cpu", stored.dtype)
    return weight


def card(record: RecoveryRecord, folder: Path | None, made: Path) -> str:
    """The card of what was recovered.

    Where the source's is as Tawny made it, it is made again from the `run.json` in `made`, so that no hash in it is of the
    weights before. What a person wrote is kept, with a section about the recovery after it.
    """
    if folder is None or not (folder / CARD).is_file():
        return _section(record)
    # As `tawny prune` reads it: one wrong byte in a text is no reason to lose a training.
    old = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    run = record_in(made)
    if run and is_made(folder):
        return model_card(run, front_matter(old))
    return f"{old.rstrip()}\n\n{_section(record)}"


def is_made(folder: Path) -> bool:
    """Whether a folder's card is the one that Tawny makes from its `run.json`, and no person's."""
    run = record_in(folder)
    if not run or not (folder / CARD).is_file():
        return False
    text = (folder / CARD).read_text(encoding="utf-8", errors="replace")
    with suppress(KeyError, TypeError, ValueError):  # of a run.json that another version wrote
        # `tawny.pack` notes what it rounds, and leaves the card.
        cards = [model_card(one, front_matter(text)) for one in (run, {**run, "rounded": {}})]
        return _body(text) in map(_body, cards)
    return False


def _body(text: str) -> list[str]:
    """A card's lines but for its metadata and what packing and unpacking change without making the card again."""
    text = text.partition("\n---\n")[2] if text.startswith("---\n") else text
    if note := packed_note(text):
        text = text.replace(note, "")
    text = re.sub(r"^## Use\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    return [
        line for line in text.splitlines() if line.strip() and not re.match(r"- .*sha256 [0-9a-f]{64}", line)
    ]


def _section(record: RecoveryRecord) -> str:
    return (
        f"## Recovered\n\n{recovery_words(record.to_dict(), 'Trained with its zeros kept')}\n\n"
        "What the sections above say about unchanged weights held before this training. `recover.json` has every setting and "
        "the curve, `report.html` shows them.\n"
    )


def tell_run(
    folder: Path, record: RecoveryRecord, zeros: Mapping[str, int], *, off_grid: bool = False
) -> None:
    """Make the carried `run.json` that of the recovered model; one that is not Tawny's is left alone.

    Args:
        zeros: of every linear.
        off_grid: weights were trained past what packing had rounded them to.
    """
    run = record_in(folder)
    if not run:
        return
    if off_grid:
        run["rounded"] = {key: kind for key, kind in (run.get("rounded") or {}).items() if key != "values"}
    run["files"], run["bytes"], run["out"] = weight_files(folder), record.bytes, record.out
    # Experts that are left have other numbers than in the source, and what left stays away.
    linears = [] if whole_kind(run) == "experts" else run.get("linears", [])
    for entry in linears:
        if entry["name"] in zeros:
            entry["zeros"] = zeros[entry["name"]]
            entry["sparsity"] = entry["zeros"] / math.prod(entry["shape"])
    if linears:
        # Of those that pruning chose; training knows all of the model's.
        run["zeros"] = sum(entry["zeros"] for entry in run["linears"])
        run["sparsity"] = run["zeros"] / max(1, run["prunable"])
    if kind := record.settings.get("values"):
        run["values"] = {entry["name"]: kind for entry in run.get("linears", [])}
    _put_run(folder, run, record, run.get("rounded") or {})


def retell(folder: Path, record: RecoveryRecord, *, base: Path | None = None) -> None:
    """Tell again of a folder that was made under other names than it will have.

    Args:
        base: folder whose card has the metadata that the new one inherits; None leaves the card as it is.
    """
    _put(folder / "recover.json", record.to_json())
    run = record_in(folder)
    if run:
        run["out"] = record.out
        # Nothing is known of it where another version made the folder on the way.
        _put_run(folder, run, record, run.get("recovery", {}).get("rounded", run.get("rounded") or {}))
    if run and base is not None:
        text = base / CARD
        old = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else ""
        _put(folder / CARD, model_card(run, front_matter(old), note=packed_note(old)))


def _put_run(folder: Path, run: dict[str, Any], record: RecoveryRecord, rounded: Mapping[str, Any]) -> None:
    """Put the summary of a recovery into `run.json`; `rounded` is how the model was when the recovery measured it."""
    plain, earlier = record.to_dict(), run.get("recovery") or {}
    run["recovery"] = finite({key: plain[key] for key in _SUMMARY})
    run["recovery"]["rounded"] = dict(rounded)
    method = METHODS.get(record.settings.get("train", ""))
    if (
        method is not None and method.weights == "kept"
    ):  # on the grid that an earlier recovery trained them for
        trained = earlier.get("grid") or earlier.get("settings", {})
        run["recovery"]["grid"] = {key: trained.get(key) for key in ("values", "group_size")}
    _put(folder / _RUN, json.dumps(run, indent=1, ensure_ascii=False) + "\n")


def _put(path: Path, text: str) -> None:
    with writing(path):
        durable.write(path, text.encode())
