"""`tawny export --template`: a checkpoint in a GGUF file that someone else's converter laid out."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tawny.errors import ModelError, TawnyError, UserError
from tawny.exporting.files import ExportReport, check_apart, check_out
from tawny.exporting.rounding import Rounding, known_type
from tawny.exporting.template import Matrices, Template
from tawny.model.source import gguf_behind, resolve
from tawny.progress import Progress, silent
from tawny.record import record_in


def export_through(
    source: str | Path,
    out: Path,
    *,
    template: str | Path | Template,
    type: str | None = None,
    imatrix: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """`export` to GGUF with a template, or with one whose matrices were found in the dense model before."""
    started = time.perf_counter()
    kind = known_type(type)
    given = template.path if isinstance(template, Template) else gguf_behind(template)
    if given is None:
        raise UserError(f"--template {template}: expected a GGUF file")
    check_out(out, overwrite, given, gguf_behind(source), imatrix)
    folder = resolve(source, progress.say)
    check_apart(out, folder)
    ours = Matrices.of(folder)
    dense = _dense(folder, progress.say)
    theirs = ours if dense == folder else Matrices.of(dense)
    _check_same(ours, theirs, ours.names, folder, dense)
    rounding = Rounding(ours, kind, imatrix)
    changed = _changed(ours, theirs, progress)
    # What stays as it is need not be found: some converters take such matrices apart.
    wanted = changed.union(rounding.wanted(ours.names))
    if isinstance(template, Template):
        filled = template
        if absent := sorted(wanted.difference(filled.places)):
            raise ModelError(
                f"the template has no place for {absent[0]!r}, which changed; open it with this matrix too"
            )
    else:
        names = [name for name in ours.names if not wanted or name in wanted]
        filled = Template.of(given, theirs.checkpoint, theirs.model, names, progress)
    types, zeros = rounding.fill(filled, out, changed, progress)
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


def _dense(folder: Path, say: Callable[[str], None]) -> Path:
    """The folder that a pruned one was made from, whose values a template has; a folder that nothing says this of is it itself.

    Raises:
        ModelError: it is not there any more.
    """
    seen: list[Path] = []
    while folder not in seen:
        seen.append(folder)
        source = record_in(folder).get("source")
        if not isinstance(source, str):
            break
        try:
            folder = resolve(source, say)
        except TawnyError as error:
            raise ModelError(
                f"{folder} was made from {source}, with which a template is compared, and it cannot be opened: {error}"
            ) from error
    return folder


def _changed(ours: Matrices, theirs: Matrices, progress: Progress) -> set[str]:
    """Matrices that are not as in the dense model, with all others of the same parameter."""
    if ours is theirs:
        return set()
    keys = set()
    progress.phase("comparing", len(ours.names), "matrices")
    for name in ours.names:
        values = ours.read(name)
        if not torch.equal(values, theirs.read(name).to(values.dtype)):
            keys.add(ours.key(name))
        progress.step(name)
    return {name for name in ours.names if ours.key(name) in keys}


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
