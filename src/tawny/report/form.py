"""What was done to the weights of a record, as pages say it: which went, on what samples, and the grids of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tawny.kinds import range_of, solved_kind
from tawny.words import percent


@dataclass(frozen=True)
class Form:
    """What titles and summaries say of a model.

    Attributes:
        sparsity: share of the prunable weights that is zero, by rounding too.
        pruned: whether weights were to go.
        kinds: that linears were solved for, by linear; empty where none was asked for.
        bits: of a survivor, their mean over all weights; 16 and the like where `kinds` are floats, 0 without any.
    """

    sparsity: float
    pruned: bool
    kinds: Mapping[str, str]
    bits: float

    @property
    def title(self) -> str:
        """`50.0 % sparse`, `int4`, `int3 to int8` or `50.0 % sparse, int4`."""
        grids = [range_of(self.kinds.values())] if self.kinds else []
        return ", ".join([f"{percent(self.sparsity, 1)} sparse"] * self.pruned + grids)

    @property
    def tags(self) -> list[str]:
        """What the hub finds it by."""
        return [*["pruned", "sparse"] * self.pruned, *["quantized"] * bool(self.kinds)]


def form_of(record: Mapping[str, Any]) -> Form:
    """The form of what `run.json` tells of."""
    linears, kinds = record["linears"], record.get("values") or {}
    size = {x["name"]: int(x["shape"][0]) * int(x["shape"][1]) for x in linears}
    total = sum(size[name] for name in kinds if name in size)
    bits = sum(size[name] * solved_kind(kind).bits for name, kind in kinds.items() if name in size)
    # Until a recovery counts what is rounded to 0, too, zeros beside kinds were removed, now or before this run.
    removed = not record.get("recovery") and any(x.get("zeros") for x in linears)
    pruned = not kinds or removed or any(x["target"] > 0 for x in linears)
    return Form(record["sparsity"], pruned, kinds, bits / total if total else 0.0)


def whole_kind(record: Mapping[str, Any]) -> Literal["", "members", "blocks", "experts"]:
    """What left as a whole, biases and all; nothing where single weights went."""
    from tawny.patterns import Blocks, Experts, Members, parse_pattern  # which bring torch along

    pattern = parse_pattern(record["recipe"]["pattern"])
    if isinstance(pattern, Experts):
        return "experts"
    return "blocks" if isinstance(pattern, Blocks) else "members" if isinstance(pattern, Members) else ""


def choice_of_blocks(record: Mapping[str, Any], mark: str = "") -> str:
    """`divergence chose the 2 of 30 blocks that left`, with `mark` around a solver's name."""
    recipe = record["recipe"]
    blocks = {x["block"] for x in record["linears"]}
    left = {x["block"] for x in record["linears"] if x["target"] == 1}
    by_file = recipe["allocator"]["name"] == "file"
    who = "An allocation file" if by_file else f"{mark}{recipe['solver']['name']}{mark}"
    return f"{who} chose the {len(left)} of {len(blocks)} blocks that left"


def choice_of_experts(record: Mapping[str, Any], mark: str = "") -> str:
    """`reap chose the 16 of 128 experts that left`, with `mark` around a solver's name, and how they fared before."""
    mixtures = record["experts"]
    gone = sum(len(one["removed"]) for one in mixtures)
    said = f"{mark}{record['recipe']['solver']['name']}{mark} chose the {gone} of {gone + sum(len(x['kept']) for x in mixtures)} experts that left"
    chosen = sum(sum(one["chosen"]) for one in mixtures)
    went = sum(one["chosen"][expert] for one in mixtures if one["chosen"] for expert in one["removed"])
    return f"{said}, to which {percent(went / chosen)} of the choices fell" if chosen else said


def samples_shown(text: Mapping[str, Any]) -> str:
    """`128 × 2048 tokens`; pictures are patches."""
    unit = "patches" if "files" in text else "tokens"
    return f"{text.get('samples', '?')} × {text.get('seqlen', '?')} {unit}"
