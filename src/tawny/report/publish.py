"""The three files that tell about a finished folder, made anew when more is known (`--eval` measures afterwards)."""

from __future__ import annotations

__all__ = ["publish", "refresh"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tawny.record import Record
from tawny.report.card import CARD, front_matter, model_card, packed_note
from tawny.report.html import write_report


def publish(record: Record, folder: str | Path) -> Path:
    """Write `run.json`, the model card and `report.html` into `folder`; returns the report's path."""
    return _publish(record.to_dict(), record.to_json(), Path(folder))


def refresh(folder: str | Path) -> None:
    """Make card and report anew from the `run.json` of a folder that was packed or unpacked; nothing without one."""
    folder = Path(folder)
    path = folder / "run.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        _publish(json.loads(text), text, folder)


def _publish(plain: Mapping[str, Any], text: str, folder: Path) -> Path:
    card = folder / CARD
    # What the card inherited from the base model's stays in it, and the note that packing put there.
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    made = model_card(plain, front_matter(old), note=packed_note(old))
    for path, content in ((folder / "run.json", text), (card, made)):
        beside = path.with_name(path.name + ".new")
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    return write_report(plain, folder)
