"""The recovered checkpoint: the source's files with the trained tensors in their places, and a card that says so."""

from __future__ import annotations

__all__ = ["card", "check_place", "write"]

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tawny.model.output import ALLOCATION, OutputFolder
from tawny.recovery.coordinates import Coordinates, Factors
from tawny.recovery.sharding import filled
from tawny.recovery.student import Student

if TYPE_CHECKING:
    from tawny.recovery.run import RecoveryRecord

_OUTSIDE = "outside"


def check_place(out: Path, overwrite: bool, source: Path) -> None:
    """Refuse a place that is taken or cannot be written to, before work; what is unfinished there stays."""
    fresh = not out.with_name(out.name + ".partial").exists()
    folder = OutputFolder(out, overwrite=overwrite, source=source, keep=True)
    if fresh:
        folder.discard()
    else:
        folder.release()


@torch.no_grad()
def write(
    output: OutputFolder, student: Student, folder: Path | None, whole: Callable[[str], Tensor] | None = None
) -> int:
    """Write the model; returns the bytes of its tensors. Tensors keep the dtype they are stored in.

    Args:
        whole: the vectors of all processes, joined, where each holds a part; by the coordinates' name.
    """
    stack = student.stack
    if folder is None or stack.checkpoint is None:
        stack.model.save_pretrained(output.partial)
        return sum(path.stat().st_size for path in output.partial.glob("*.safetensors"))
    checkpoint = stack.checkpoint
    trained: dict[str, list[Coordinates]] = {}
    for one in student.coordinates:
        trained.setdefault(one.linear.key if isinstance(one, Factors) else one.name, []).append(one)
    left = set(checkpoint.files)
    names = []
    for index in range(len(stack)):
        tensors: dict[str, Tensor] = {}
        for unit in checkpoint.units_of(stack.name(index)):
            parameters = checkpoint.load(unit, stack.model)
            for name in unit.targets:
                parameters[name] = _trained(parameters[name], trained.get(name, []), whole)
            tensors.update(checkpoint.store(unit, parameters, stack.model))
            left -= set(unit.sources)
        names.append(f"{index:05d}")
        output.write_block(names[-1], tensors)
    outside = checkpoint.read(sorted(left))
    for unit in checkpoint.units:
        if unit.converter is None and unit.targets[0] in trained and unit.sources[0] in left:
            outside[unit.sources[0]] = _trained(outside[unit.sources[0]], trained[unit.targets[0]], whole)
    output.write_block(_OUTSIDE, outside)
    size = output.assemble(output.plan_shards([_OUTSIDE, *names]))
    output.carry(folder)
    output.carry_named(folder, ("run.json", "recipe.yaml", *ALLOCATION))
    return size


def _trained(stored: Tensor, coordinates: list[Coordinates], whole: Callable[[str], Tensor] | None) -> Tensor:
    made = stored
    for one in coordinates:
        if isinstance(one, Factors):
            made = made.clone()
            one.linear.view(made).copy_(one.weight())
        elif one.sharded and whole is not None:
            made = filled(stored, whole(one.name)).to(stored.dtype)
        else:
            made = one.value().to("cpu", stored.dtype)
    return made


def card(record: RecoveryRecord, folder: Path | None) -> str:
    """The source's card with a section about the recovery."""
    before = ""
    if folder is not None and (folder / "README.md").is_file():
        before = (folder / "README.md").read_text(encoding="utf-8").rstrip() + "\n\n"
    settings: dict[str, Any] = record.settings
    start, best = record.start, record.best
    lines = [
        "## Recovered",
        "",
        f"Trained behind its mask on {record.tokens:,} tokens of {record.text['name']} ({settings['method']}, "
        f"{settings['train']}, learning rate {settings['lr']:g})"
        + (f" against the dense model {record.teacher}." if record.teacher else "."),
        "",
        f"Held-out perplexity {start['perplexity']:.2f} → {best['perplexity']:.2f} "
        f"({record.text['held_out']} windows of {record.text['seqlen']} tokens); "
        f"{record.zeros:,} of {record.prunable:,} prunable weights are zero ({record.sparsity:.2%}), "
        f"{record.zeros_before:,} were before.",
        "",
        "What the sections above say about unchanged weights held before this training. `recover.json` has every setting and "
        "the curve, `report.html` shows them.",
        "",
    ]
    return before + "\n".join(lines)
