"""Recover a packed folder: unpacked, trained, packed again as it was; all of it repeatable after an interruption."""

from __future__ import annotations

__all__ = ["recover_packed"]

import dataclasses
import json
from pathlib import Path

from torch import Tensor, nn

from tawny.model.checkpoint import file_bytes
from tawny.packed.convert import pack, unpack
from tawny.packed.kinds import kind_of
from tawny.progress import Progress
from tawny.recovery.processes import Processes
from tawny.recovery.record import RecoveryRecord, draw
from tawny.recovery.settings import Recovery
from tawny.recovery.workfolder import (
    WorkFolder,
    about_model,
    about_text,
    about_tokens,
    check_apart,
    check_not_own_teacher,
    is_own_teacher,
)
from tawny.recovery.writing import check_place, deliver, is_made, retell


def recover_packed(
    source: str | Path,
    folder: Path,
    teacher: str | Path | nn.Module | None,
    out: Path,
    settings: Recovery,
    progress: Progress,
    overwrite: bool,
    text: Tensor | None,
    held_out: Tensor | None,
) -> RecoveryRecord:
    """`recover` for a packed folder. Integers are trained through their rounding."""
    from tawny.recovery.run import recover

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if kind_of(kind["values"]).scaled and kind.get("group") is None and settings.train == "survivors":
        settings = dataclasses.replace(
            settings, values=kind["values"] if settings.method == "distill" else None
        )
    work = WorkFolder(out, "unpacked", ("before", "after", "packed"), kept=("after*", "packed*"))
    check_apart(out, [work], {"model": source, "teacher": teacher})
    check_not_own_teacher(is_own_teacher(folder, teacher))
    before, after, packed = (work.path / name for name in ("before", "after", "packed"))
    identity = {
        "model": about_model(folder),
        "teacher": about_model(teacher),
        "settings": settings.to_mapping(),
        "text": about_text(settings.text, text),
        "held_out": None if held_out is None else about_tokens(held_out),
    }

    def begin() -> None:
        work.check()
        check_place(out, overwrite or work.consent, folder)
        work.open(identity, overwrite)
        if not before.exists():
            unpack(folder, before, progress=progress)

    def end() -> None:
        record = RecoveryRecord.read(after / "recover.json")
        record.source, record.out = str(source), str(out)
        draw(record, after, progress)
        pack(
            after,
            packed,
            kind["values"],
            kind.get("group"),
            kind.get("head"),
            overwrite=True,
            progress=progress,
        )
        record.bytes = file_bytes(packed)
        # What packing changed is told by the card too, unless a person wrote it.
        retell(packed, record, base=packed if is_made(after) else None)
        deliver(packed, out, overwrite or work.consent, folder)
        work.discard()

    with Processes(settings.device) as processes:
        processes.once(begin)
        if processes.decide(not after.exists()):
            with work.unless_empty():
                recover(
                    before, teacher, after, settings=settings, progress=progress, text=text, held_out=held_out
                )
        processes.once(end)
    return RecoveryRecord.read(out / "recover.json")
