"""The last step of a run: write the weights outside the blocks, copy the other files, make card and page."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from tawny.gguf_kinds import ENCODED, GGUF_KINDS, fitting
from tawny.packed.install import ends_of
from tawny.precision import DTYPES
from tawny.pruning.session import Session
from tawny.recipe.files import dump_recipe
from tawny.report.card import CARD, front_matter, model_card
from tawny.report.html import NAME, write_report
from tawny.report.pages import or_say
from tawny.run.writer import ENCODED_PART
from tawny.solvers.block_grid import rounded

_OUTSIDE = "outside"


def write_rest(session: Session) -> None:
    """Complete the weights, carry the source's other files along, and keep the recipe."""
    assert session.output is not None
    if session.job.folder is not None and session.job.stack.checkpoint is not None:
        session.record.bytes = session.output.assemble(
            session.run.journal.once("shards", lambda: _plan_shards(session))
        )
        session.output.carry(session.job.folder)
        _say_settings(session)
    else:
        session.job.stack.model.save_pretrained(session.output.folder)
        if session.beside is not None:
            session.beside.save_pretrained(session.output.folder)
        session.record.bytes = sum(p.stat().st_size for p in session.output.folder.glob("*.safetensors"))
        session.record.storage = str(session.job.stack.compute).removeprefix("torch.")
    session.output.write_encoded(ENCODED)
    session.output.write_text("recipe.yaml", dump_recipe(session.job.recipe))


def write_pages(session: Session) -> None:
    """The model card and the page, when everything is known."""
    assert session.output is not None
    folder, output, record = session.job.folder, session.output, session.record.to_dict()

    def write_card() -> None:
        card = folder / CARD if folder is not None else None
        base = card.read_text(encoding="utf-8-sig", errors="replace") if card and card.is_file() else ""
        output.write_text(CARD, model_card(record, front_matter(base)))

    or_say(output.folder / CARD, write_card, session.run.progress)
    or_say(output.folder / NAME, lambda: write_report(record, output.folder), session.run.progress)


def _plan_shards(session: Session) -> list[dict[str, Any]]:
    """Write what is in no block, and say which tensors go into which shard."""
    checkpoint = session.job.stack.checkpoint
    assert session.output is not None and checkpoint is not None
    inside = {
        key
        for index in range(len(session.job.stack))
        for unit in checkpoint.units_of(session.job.stack.name(index))
        for key in unit.sources
    }
    # Tensors no parameter uses travel too: what Tawny does not prune, it does not judge.
    outside = [key for key in checkpoint.files if key not in inside]
    dtype = DTYPES[session.job.recipe.dtype] if session.job.recipe.dtype else None
    session.output.write_outside(_OUTSIDE, checkpoint, outside, dtype, _rounded_ends(session))
    return session.output.plan_shards(
        [_OUTSIDE, *(f"{index:05d}" for index in range(len(session.job.stack)))]
    )


def _rounded_ends(session: Session) -> dict[str, Tensor]:
    """Head and embedding in the types of GGUF files that the recipe names, by their keys in the checkpoint."""
    stack, values, output = session.job.stack, session.job.recipe.values, session.output
    head, embedding, tied = ends_of(stack.model)
    ends = {head: values.head, embedding: values.head if tied else values.embedding or values.head}
    assert stack.checkpoint is not None and output is not None
    units = {target: unit for unit in stack.checkpoint.units for target in unit.targets}
    instead: dict[str, Tensor] = {}
    encoded: dict[str, Tensor] = {}
    for module, kind in ends.items():
        unit = units.get(f"{module}.weight")
        if kind not in GGUF_KINDS or unit is None:
            continue
        name, parameter = unit.targets[0], stack.checkpoint.load(unit, stack.model)
        with session.run.clock("solve"):
            W_OI, rows = rounded(parameter[name], kind)
        instead |= stack.checkpoint.store(unit, {name: W_OI}, stack.model)
        encoded[f"{name}.{fitting(kind, W_OI.shape[1])}"] = rows
    if encoded:
        output.write_block(f"ends{ENCODED_PART}", encoded)
    return instead


def _say_settings(session: Session) -> None:
    checkpoint = session.job.stack.checkpoint
    assert session.output is not None and checkpoint is not None
    session.record.storage = session.job.recipe.dtype or str(checkpoint.storage_dtype).removeprefix("torch.")
    if session.job.recipe.dtype is None and not session.job.settings:
        return
    path = session.output.folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if session.job.recipe.dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = session.job.recipe.dtype
    config.get("text_config", config).update(session.job.settings)
    session.output.write_text("config.json", json.dumps(config, indent=2) + "\n")
