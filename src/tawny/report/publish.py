"""The three files that tell about a finished folder, made anew when more is known (`--eval` measures afterwards)."""

from __future__ import annotations

__all__ = ["publish"]

from pathlib import Path

from tawny.record import Record
from tawny.report.card import CARD, front_matter, model_card, packed_note
from tawny.report.html import write_report


def publish(record: Record, folder: str | Path) -> Path:
    """Write `run.json`, the model card and `report.html` into `folder`; returns the report's path."""
    folder = Path(folder)
    card = folder / CARD
    # What the card inherited from the base model's stays in it, and the note that packing put there.
    old = card.read_text(encoding="utf-8") if card.is_file() else ""
    plain = record.to_dict()
    made = model_card(plain, front_matter(old), note=packed_note(old))
    for path, content in ((folder / "run.json", record.to_json()), (card, made)):
        beside = path.with_name(path.name + ".new")
        beside.write_text(content, encoding="utf-8")
        beside.replace(path)
    return write_report(plain, folder)
