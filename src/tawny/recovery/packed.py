"""Recover a packed folder: unpacked, trained, packed again as it was; all of it repeatable after an interruption."""

from __future__ import annotations

__all__ = ["recover_packed"]

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tawny.model.durable import writing
from tawny.packed.convert import pack, unpack
from tawny.recovery.processes import Processes
from tawny.recovery.settings import Recovery
from tawny.recovery.writing import check_place
from tawny.watch import Watch

if TYPE_CHECKING:
    from tawny.recovery.run import RecoveryRecord


def recover_packed(
    folder: Path,
    teacher: str | Path | nn.Module | None,
    out: Path,
    settings: Recovery,
    watch: Watch,
    overwrite: bool,
    text: Tensor | None,
    held_out: Tensor | None,
) -> RecoveryRecord:
    """`recover` for a packed folder. int8 values are trained through their rounding."""
    from tawny.recovery.run import RecoveryRecord, recover

    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    if kind["values"] == "int8" and kind.get("group") is None and settings.train == "survivors":
        settings = dataclasses.replace(settings, values="int8" if settings.method == "distill" else None)
    work = out.with_name(out.name + ".dense")

    def begin() -> None:
        check_place(out, overwrite, folder)
        if overwrite:
            shutil.rmtree(work, ignore_errors=True)
        with writing(work):
            work.mkdir(exist_ok=True)
        if not (work / "before").exists():
            unpack(folder, work / "before", watch=watch)

    def end() -> None:
        packing = (kind["values"], kind.get("group"), kind.get("head"))
        pack(work / "after", out, *packing, overwrite=overwrite, watch=watch)
        told: dict[str, Any] = json.loads((work / "after" / "recover.json").read_text(encoding="utf-8"))
        size = sum(p.stat().st_size for p in out.glob("*.safetensors"))
        told |= {"source": str(folder), "out": str(out), "bytes": size}
        with writing(out):
            (out / "recover.json").write_text(RecoveryRecord(**told).to_json(), encoding="utf-8")
        shutil.rmtree(work)

    with Processes(settings.device) as processes:
        processes.once(begin)
        if processes.decide(not (work / "after").exists()):
            recover(
                work / "before",
                teacher,
                work / "after",
                settings=settings,
                watch=watch,
                text=text,
                held_out=held_out,
            )
        processes.once(end)
    return RecoveryRecord(**json.loads((out / "recover.json").read_text(encoding="utf-8")))
