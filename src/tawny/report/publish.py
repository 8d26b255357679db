"""Rewrite `run.json`, card and page of a finished folder after a later measurement, such as `--eval`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tawny.record import Record
from tawny.report.card import CARD, front_matter, model_card, packed_note
from tawny.report.html import write_report
from tawny.report.pages import write_beside
from tawny.report.recovery import write_recovery
from tawny.report.view import recovered_since


def publish(record: Record, folder: str | Path) -> Path:
    """Write `run.json`, the model card and `report.html` into `folder`; returns the report's path."""
    return _publish(record.to_dict(), record.to_json(), Path(folder))


def refresh(folder: str | Path) -> None:
    """Make card and report anew from the `run.json` of a folder that was packed or unpacked; nothing without one."""
    folder = Path(folder)
    path = folder / "run.json"
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        plain = json.loads(text)
        if "record_version" in plain:  # other programs call their files so too
            _publish(plain, text, folder)


def _publish(plain: Mapping[str, Any], text: str, folder: Path) -> Path:
    card = folder / CARD
    # What the card inherited from the base model's stays in it, and the note that packing put there.
    old = card.read_text(encoding="utf-8-sig", errors="replace") if card.is_file() else ""
    recovery = _recovery(plain, folder)
    page = model_card(plain, front_matter(old), note=packed_note(old), recovery=recovery)
    write_beside(folder / "run.json", text)
    write_beside(card, page)
    if "curve" in recovery:  # all of a recover.json, of which the page of a recovered model is made
        return write_recovery(recovery, folder, recovered_since(plain).strip())
    return write_report(plain, folder)


def _recovery(record: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """What is known of a recovery of these weights: `recover.json`, else what the record says; empty if there was none."""
    summary: Mapping[str, Any] = record.get("recovery") or {}
    try:
        plain = json.loads((folder / "recover.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        plain = None
    if not isinstance(plain, dict):
        return summary
    # The file may have been copied beside a model that was pruned again; it holds for the weights before.
    return plain if summary or plain.get("zeros", 0) >= record["zeros"] else {}
