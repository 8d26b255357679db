"""Recover a packed folder: unpacked, trained, packed again as it was; all of it repeatable after an interruption."""

from __future__ import annotations

__all__ = ["recover_packed"]

import json
from dataclasses import replace
from pathlib import Path

from tawny.errors import ModelError
from tawny.kinds import kind_of
from tawny.model.checkpoint import file_bytes
from tawny.model.identity import source_identity, tensor_digest, text_identity
from tawny.model.resumable import WorkFolder
from tawny.packed.convert import pack, solved_for, unpack
from tawny.recovery.dense import Request, recover_dense
from tawny.recovery.processes import Processes
from tawny.recovery.record import RecoveryRecord, draw
from tawny.recovery.settings import Recovery
from tawny.recovery.teacher import check_not_own_teacher, is_own_teacher
from tawny.recovery.writing import check_apart, claim, deliver, is_made, retell


def recover_packed(request: Request, folder: Path, out: Path) -> RecoveryRecord:
    """`recover` for a packed folder. Integers are trained through their grid."""
    settings, progress, overwrite = request.settings, request.progress, request.overwrite
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if len(solved_for(folder)[0].of) > 1:
        raise ModelError(
            f"{request.source} holds several kinds of values, and all would become {kind['values']}: `tawny unpack` it, "
            "recover the dense checkpoint and pack that"
        )
    group, few = kind.get("group"), kind_of(kind["values"]).bits < 8
    if kind_of(kind["values"]).scaled and (few or group is None) and settings.trains_survivors:
        settings = Recovery.make(settings, values=kind["values"], group_size=group)
    work = WorkFolder(out, "unpacked", ("before", "after", "packed"), kept=("after*", "packed*"))
    check_apart(work, {"model": request.source, "teacher": request.teacher})
    check_not_own_teacher(is_own_teacher(folder, request.teacher))
    before, after, packed = (work.path / name for name in ("before", "after", "packed"))
    text, held_out = request.text, request.held_out
    identity = {
        "model": source_identity(folder),
        "teacher": source_identity(request.teacher),
        "settings": settings.to_mapping(),
        "text": text_identity(settings.text) if text is None else tensor_digest(text).hexdigest(),
        "held_out": None if held_out is None else tensor_digest(held_out).hexdigest(),
    }

    def begin() -> None:
        claim(work, identity, overwrite, folder)
        if not before.exists():
            unpack(folder, before, progress=progress)

    def end() -> None:
        record = RecoveryRecord.read(after / "recover.json")
        record.source, record.out = str(request.source), str(out)
        draw(record, after, progress)
        values, group, head = kind["values"], kind.get("group"), kind.get("head")
        pack(after, packed, values, group, head, overwrite=True, progress=progress)
        record.bytes = file_bytes(packed)
        # What packing changed is told by the card too, unless a person wrote it.
        retell(packed, record, base=packed if is_made(after) else None)
        deliver(packed, work, overwrite, folder)

    with Processes(settings.device) as processes:
        processes.once(begin)
        if processes.same(not after.exists()):
            with work.unless_empty():
                recover_dense(replace(request, source=before, out=after, settings=settings, overwrite=False))
        processes.once(end)
    return RecoveryRecord.read(out / "recover.json")
