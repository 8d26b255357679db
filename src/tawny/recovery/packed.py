"""Recover a packed folder: unpacked, trained, packed again as it was; all of it repeatable after an interruption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from tawny.calibration.mixture import texts_identity
from tawny.errors import RecipeError
from tawny.evaluation.sources import reads_on
from tawny.kinds import kind_of, solved_kind, trained_kind
from tawny.model.checkpoint import file_bytes, is_packed
from tawny.model.identity import source_identity, tensor_digest
from tawny.model.quantised import settings_of
from tawny.model.source import load_tokenizer
from tawny.packed.convert import pack, solved_for, unpack
from tawny.packed.folder import PackedFolder
from tawny.progress import Progress
from tawny.recovery.dense import RecoveryRequest, recover_dense
from tawny.recovery.methods import METHODS
from tawny.recovery.record import RecoveryRecord, draw
from tawny.recovery.settings import Recovery
from tawny.recovery.teacher import check_not_own_teacher, is_own_teacher
from tawny.recovery.writing import is_made, retell
from tawny.run.place import Workplace, models_read


def on_its_grid(settings: Recovery, folder: Path, progress: Progress) -> tuple[Recovery, dict[str, str]]:
    """The settings, with the values and the group that a folder was solved for or packed in; of several kinds that of each linear."""
    if is_packed(folder):
        check_values(settings, folder)
        packing = _packing(folder)
        kind, group = packing["values"], packing.get("group")
        # Else all linears have one.
        several = _several_kinds(settings, folder, progress) if _is_packed_as_solved(folder) else {}
        alike = kind_of(kind).scaled and (kind_of(kind).bits < 8 or group is None) and not several
        if alike and settings.method.weights == "trained":
            settings = Recovery.make(settings, values=kind, group_size=group)
        return settings, several
    solved, _ = solved_for(folder)
    refuse_trained(settings, solved.names, folder)
    kind, group = solved.kind, solved.group_size
    trains = kind is not None and settings.method.weights == "trained" and settings.values in (None, kind)
    # The scales of int8 in groups follow the largest weight, and are not found again once it has moved.
    if kind is not None and trains and (trained_kind(kind).learns or group is None):
        if settings.values is None:
            progress.say(f"training through the grid of {kind}, which {folder} was solved for")
        settings = Recovery.make(settings, values=kind, group_size=settings.group_size or group)
    return settings, _several_kinds(settings, folder, progress)


def _several_kinds(settings: Recovery, folder: Path, progress: Progress) -> dict[str, str]:
    """The kind of each linear that a folder was solved for, where it is several and nothing else is asked for.

    int8 in groups is left out: its scales follow the largest weight, and are not found again once it has moved.
    """
    solved, kinds = solved_for(folder)
    refuse_trained(settings, solved.names, folder)
    if not solved.of or settings.method.weights != "trained" or settings.values is not None:
        return {}
    progress.say(f"training through the grids of {', '.join(solved.of)}, which {folder} was solved for")
    return {
        name: kind for name, kind in kinds.items() if trained_kind(kind).learns or solved.group_size is None
    }


def refuse_trained(settings: Recovery, kinds: Iterable[str], folder: Path) -> None:
    """Raise a RecipeError for weights of GGUF types that would be trained off their grid."""
    other = next((name for name in kinds if solved_kind(name).target == "gguf"), None)
    if other is not None and settings.method.weights == "trained":
        kept = " or ".join(f"train={name}" for name, method in METHODS.items() if method.weights == "kept")
        raise RecipeError(
            f"{folder} was solved for {other}, and types of GGUF files are not trained through: give {kept}"
        )


def check_grid(settings: Recovery, folder: Path) -> None:
    """Refuse factors whose product would leave a folder's grid of few bits; packing would then undo the training."""
    kinds = set(solved_for(folder)[0].names)
    if is_packed(folder):
        kinds.add(_packing(folder)["values"])
    few = sorted(name for name in kinds if solved_kind(name).bits < 8 or solved_kind(name).target != "packed")
    if few and settings.method.weights == "added to":
        through = [f"train={name}" for name, method in METHODS.items() if method.weights == "trained"]
        beside = [f"train={name}" for name, method in METHODS.items() if method.weights == "kept"]
        raise RecipeError(
            f"train={settings.train} would move {folder} off the grid of {', '.join(few)}: expected {' or '.join(through)}, which is "
            f"trained through the grid, or {' or '.join(beside)}"
        )


def check_values(settings: Recovery, folder: Path) -> None:
    """Raise a RecipeError for values that a packed folder does not have, since it is packed again as it was."""
    if settings.values is None:
        return
    packing, of = _packing(folder), solved_for(folder)[0].of
    kind, group = packing["values"], packing.get("group")
    asked = settings.values + (f" in groups of {settings.group_size}" if settings.group_size else "")
    has = kind if group is None else f"{kind} in groups of {group}"
    # int8 is trained with a scale a row, which packing in groups would not keep.
    in_groups = kind_of(kind).bits == 8 and group is not None
    if kind in of:
        has = " and ".join(of)
    elif settings.values == kind and settings.group_size in (None, group) and not in_groups:
        return
    raise RecipeError(
        f"values {asked} were asked for, and {folder} is packed as {has}: unpack it first (tawny unpack), or leave values out"
    )


def _is_packed_as_solved(folder: Path) -> bool:
    """Whether each linear of a packed folder has the kind that it was solved for."""
    packed, (_, kinds) = PackedFolder(folder), solved_for(folder)
    return all(packed.linears[name].values == kind for name, kind in kinds.items() if name in packed.linears)


def recover_packed(request: RecoveryRequest, folder: Path, out: Path) -> RecoveryRecord:
    """`recover` for a packed folder. Integers are trained through their grid."""
    settings, progress = request.settings, request.progress
    kind, as_solved = _packing(folder), _is_packed_as_solved(folder)
    settings, several = on_its_grid(settings, folder, progress)
    if request.text is None and request.tokenizer is None and reads_on(folder):
        load_tokenizer(folder)  # before a copy is made of it, which a message would name
    check_not_own_teacher(is_own_teacher(folder, request.teacher))
    place = Workplace(out)
    unpacked, trained, packed = (place.steps / name for name in ("unpacked", "trained", "packed"))
    text, held_out = request.text, request.held_out
    identity = {
        "model": source_identity(folder),
        "teacher": source_identity(request.teacher),
        "settings": settings.to_mapping(),
        "text": texts_identity(settings.text) if text is None else _digest(text),
        "held_out": None if held_out is None else _digest(held_out),
    }

    with place:
        reads = models_read(model=request.source, teacher=request.teacher)
        place.claim(overwrite=request.overwrite, reads=reads)
        place.require(verb="recover packed", **identity)
        place.begin()
        place.folder("unpacked", lambda made: unpack(folder, made, progress=progress))
        if not trained.exists():
            training = replace(request, source=unpacked, out=trained, overwrite=False)
            recover_dense(replace(training, settings=settings, kinds=several))
        record = RecoveryRecord.read(trained / "recover.json")
        record.source, record.out = str(request.source), str(out)
        draw(record, trained, progress)
        # What has several kinds is packed as its record says, trained through them or left on them.
        untrained = settings.method.weights != "trained" and bool(solved_for(folder)[0].of) and as_solved
        values, group = (None, None) if several or untrained else (kind["values"], kind.get("group"))
        ends: dict[str, Any] = {key: kind.get(key) for key in ("head", "embedding")}
        place.folder("packed", lambda made: pack(trained, made, values, group, **ends, progress=progress))
        record.bytes = file_bytes(packed)
        # What packing changed is told by the card too, unless a person wrote it.
        retell(packed, record, base=packed if is_made(trained) else None)
        place.deliver(packed)
    return record


def _packing(folder: Path) -> dict[str, Any]:
    """How a folder was packed."""
    packing = settings_of(folder)
    assert packing is not None
    return packing


def _digest(given: Tensor | Mapping[str, Tensor]) -> str:
    """Of tokens, or of tensors by name."""
    if isinstance(given, Tensor):
        return tensor_digest(given).hexdigest()
    return " ".join(f"{name} {tensor_digest(value).hexdigest()}" for name, value in given.items())
