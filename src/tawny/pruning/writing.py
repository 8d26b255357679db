"""What is written once every block is: the tensors of no block, the files beside the weights, card and page."""

from __future__ import annotations

__all__ = ["or_say", "write_pages", "write_rest"]

import json
from typing import TYPE_CHECKING, Any

from tawny.precision import DTYPES
from tawny.recipe.files import dump_recipe
from tawny.report.card import CARD, front_matter, model_card
from tawny.report.html import NAME, write_report
from tawny.report.pages import or_say

if TYPE_CHECKING:
    from tawny.pruning.run import Run

_OUTSIDE = "outside"


def write_rest(run: Run) -> None:
    """Complete the weights, carry the source's other files along, and keep the recipe."""
    assert run.output is not None
    if run.folder is not None and run.stack.checkpoint is not None:
        run.record.bytes = run.output.assemble(run.journal.once("shards", lambda: _plan_shards(run)))
        run.output.carry(run.folder)
        _say_dtype(run)
    else:
        run.stack.model.save_pretrained(run.output.partial)
        run.record.bytes = sum(p.stat().st_size for p in run.output.partial.glob("*.safetensors"))
        run.record.storage = str(run.stack.compute).removeprefix("torch.")
    run.output.write_text("recipe.yaml", dump_recipe(run.recipe))


def write_pages(run: Run) -> None:
    """The model card and the page, when everything is known."""
    assert run.output is not None
    folder, output, record = run.folder, run.output, run.record.to_dict()

    def write_card() -> None:
        card = folder / CARD if folder is not None else None
        base = card.read_text(encoding="utf-8-sig", errors="replace") if card and card.is_file() else ""
        output.write_text(CARD, model_card(record, front_matter(base)))

    or_say(output.partial / CARD, write_card, run.progress)
    or_say(output.partial / NAME, lambda: write_report(record, output.partial), run.progress)


def _plan_shards(run: Run) -> list[dict[str, Any]]:
    """Write what is in no block, and say which tensors go into which shard."""
    checkpoint = run.stack.checkpoint
    assert run.output is not None and checkpoint is not None
    inside = {
        key
        for index in range(len(run.stack))
        for unit in checkpoint.units_of(run.stack.name(index))
        for key in unit.sources
    }
    # Tensors no parameter uses travel too: what Tawny does not prune, it does not judge.
    outside = [key for key in checkpoint.files if key not in inside]
    dtype = DTYPES[run.recipe.dtype] if run.recipe.dtype else None
    run.output.write_outside(_OUTSIDE, checkpoint, outside, dtype)
    return run.output.plan_shards([_OUTSIDE, *(f"{index:05d}" for index in range(len(run.stack)))])


def _say_dtype(run: Run) -> None:
    checkpoint = run.stack.checkpoint
    assert run.output is not None and checkpoint is not None
    run.record.storage = run.recipe.dtype or str(checkpoint.storage_dtype).removeprefix("torch.")
    if run.recipe.dtype is None:
        return
    path = run.output.partial / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = run.recipe.dtype
    run.output.write_text("config.json", json.dumps(config, indent=2) + "\n")
