"""`tawny export --template`: a checkpoint in a GGUF file that someone else's converter laid out."""

from __future__ import annotations

__all__ = ["export_through"]

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tawny.errors import ModelError, TawnyError, UserError
from tawny.exporting.gguf import (
    ExportReport,
    Target,
    check,
    check_apart,
    check_out,
    kind_for,
    known_type,
    stored,
)
from tawny.exporting.template import Matrices, Payload, Rows, Template
from tawny.model.source import gguf_behind, resolve
from tawny.packed.opening import open_checkpoint
from tawny.progress import Progress

_ROWS = 4096  # converted at a time


def export_through(
    source: str | Path,
    out: Path,
    *,
    template: str | Path,
    type: str | None = None,
    overwrite: bool,
    progress: Progress,
) -> ExportReport:
    """`export` to GGUF with a template."""
    started = time.perf_counter()
    kind = known_type(type)
    given = gguf_behind(template)
    if given is None:
        raise UserError(f"--template {template}: expected a GGUF file")
    check_out(out, overwrite, given, gguf_behind(source))
    folder = resolve(source, progress.say)
    check_apart(out, folder)
    ours = _open(folder)
    dense = _dense(folder, progress.say)
    theirs = ours if dense == folder else _open(dense)
    every = [*ours.linears, *(end for end in (ours.embedding, ours.head) if end is not None)]
    _check_same(ours, theirs, every, folder, dense)
    changed, zeros = _changed(ours, theirs, every, progress)
    # What stays as it is need not be found: some converters take such matrices apart.
    names = [name for name in every if kind is not None or not changed or name in changed]
    filled = Template.of(given, theirs.checkpoint, theirs.model, names, progress)
    kinds = {
        name: kind_for(places[0].slot[0], ours.shape(name), kind or str(filled.kind_of(name)))
        for name, places in filled.places.items()
        if places
    }
    replaced = {name for name in kinds if name in changed or kinds[name] != filled.kind_of(name)}
    for together in filled.alike:
        if replaced.intersection(together):
            replaced.update(together)
    payloads = {
        name: Payload(kinds[name], _rows(ours, name, kinds[name])) for name in kinds if name in replaced
    }
    types = filled.fill(out, payloads, progress)
    return ExportReport(
        source=str(source),
        out=str(out),
        to="gguf",
        architecture=filled.architecture,
        tokenizer=str(given),
        types=types,
        tensors=len(filled.tensors),
        bytes=out.stat().st_size,
        source_bytes=ours.checkpoint.bytes_in(None),
        zeros=zeros,
        seconds=time.perf_counter() - started,
    )


def _open(folder: Path) -> Matrices:
    from tawny.model.skeleton import open_skeleton

    checkpoint, model = open_checkpoint(folder), open_skeleton(folder, torch.float32)
    checkpoint.map_to(model)
    return Matrices(checkpoint, model)


def _dense(folder: Path, say: Callable[[str], None]) -> Path:
    """The folder that a pruned one was made from, whose values a template has; a folder that nothing says this of is it itself.

    Raises:
        ModelError: it is not there any more.
    """
    seen: list[Path] = []
    while folder not in seen:
        seen.append(folder)
        try:
            record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            source = str(record["source"])
        except (OSError, ValueError, KeyError, TypeError):
            break
        try:
            folder = resolve(source, say)
        except TawnyError as error:
            raise ModelError(
                f"{folder} was made from {source}, with which a template is compared, and it cannot be opened: {error}"
            ) from error
    return folder


def _changed(ours: Matrices, theirs: Matrices, names: list[str], progress: Progress) -> tuple[set[str], int]:
    """Matrices that are not as in the dense model, with all others of the same parameter; and the zeros of all."""
    keys, zeros = set(), 0
    progress.phase("comparing", len(names), "matrices")
    for name in names:
        values = ours.read(name)
        zeros += int((values == 0).sum())
        if ours is not theirs and not torch.equal(values, theirs.read(name).to(values.dtype)):
            keys.add(ours.key(name))
        progress.step(name)
    return {name for name in names if ours.key(name) in keys}, zeros


def _check_same(ours: Matrices, theirs: Matrices, names: list[str], folder: Path, dense: Path) -> None:
    """Refuse a model of which something else than matrices `names` changed, such as norms that were trained: a template keeps it.

    Raises:
        ModelError: names the first.
    """
    if ours is theirs:
        return
    wanted = {ours.key(name) for name in names}
    mine, source = ({t: u for u in x.checkpoint.units for t in u.targets} for x in (ours, theirs))
    changed = next((target for target in mine if target not in source), None)
    changed = changed or next((target for target in source if target not in mine), None)
    for target, unit in mine.items():
        if changed is None and target in wanted:
            shapes = [x.model.get_parameter(target).shape for x in (ours, theirs)]
            changed = target if shapes[0] != shapes[1] else None
        elif changed is None:
            values = ours.checkpoint.load(unit, ours.model)[target]
            before = theirs.checkpoint.load(source[target], theirs.model)[target]
            changed = None if torch.equal(values, before.to(values.dtype)) else target
    if changed is not None:
        raise ModelError(
            f"{changed!r} of {folder} is not as in {dense}, and a template keeps it as it was; convert the folder itself with llama.cpp's "
            "convert_hf_to_gguf.py"
        )


def _rows(matrices: Matrices, name: str, kind: str) -> Callable[[], Rows]:
    def encoded() -> Rows:
        pieces = []
        for piece in torch.split(matrices.read(name), _ROWS):
            values = piece.float().contiguous()
            target = Target(name, tuple(values.shape), kind, None)
            data = stored(values, target)
            check(values, data, target)
            pieces.append(np.ascontiguousarray(data).view(np.uint8).reshape(len(values), -1))
        return np.concatenate(pieces)

    return encoded
