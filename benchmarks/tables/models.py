"""Which families of models are pruned, packed and decoded."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from typing import Any

from tables.shared import machine_line

Family = Mapping[str, Any]

# What a message says, in a few words; what is not here is shown as it is.
_REASONS = {
    "holds no list of blocks": "blocks of several classes",
    "the largest list of blocks": "more than one stack of blocks",
    "hand each other more than hidden states": "blocks hand on more than hidden states",
    "run more than once": "blocks run more than once",
    "straight from block to block": "blocks do not run one after another",
    "are one parameter": "blocks share weights",
    "pass on hidden states of shape": "hidden states of another shape",
    "takes no part in the forward": "linears without a part in the forward; exclude them",
}

_MUCH = 0.25
_LONGEST = 110  # characters of a reason


def families(result: Mapping[str, Any]) -> str:
    """How many there are, a row for each outcome, and which were not tried."""
    every: Mapping[str, Family] = result["families"]
    tried = {name: family for name, family in every.items() if _is_ok(family, "built")}
    decoders = {name: family for name, family in tried.items() if family["causal"]}
    parts = [_counts(every, decoders), _table(decoders)]
    if others := {name: family for name, family in tried.items() if name not in decoders}:
        parts.append(
            "These are not decoders, because their output for a token depends on later tokens:\n\n"
            + _table(others)
        )
    parts += _left(tried)
    if missing := {name: family for name, family in every.items() if name not in tried}:
        said = "; ".join(f"{name} ({_plain(family['built']['reason'])})" for name, family in missing.items())
        parts.append(f"Not tried, because no tiny model could be made: {said}.\n")
    return "\n".join(parts) + f"\n{machine_line(result)}"


def _counts(every: Mapping[str, Family], decoders: Mapping[str, Family]) -> str:
    found = list(decoders.values())
    pruned = [family for family in found if _is_ok(family, "pruned")]
    calibrated = [family for family in pruned if "refused" not in family["pruned"]]
    packed = [family for family in found if _is_ok(family, "packed")]
    whole = [family for family in packed if family["packed"]["share"] == 1]
    decoded = [family for family in found if _is_ok(family, "decoded")]
    quick = [family for family in decoded if _path(family) == "blocks"]
    magnitude = len(pruned) - len(calibrated)
    furthest = max((family["packed"]["distance_in_roundings"] for family in packed), default=0.0)
    return (
        f"Of {len(every)} families {len(decoders)} were tried as decoders. **{len(pruned)} are pruned** "
        f"({f'{magnitude} of them by magnitude only' if magnitude else 'all with calibration'}), **{len(packed)} packed** "
        f"({len(whole)} whole) and **{len(decoded)} decoded** ({len(quick)} with one call a token). "
        f"Packed logits are at most {furthest:.1f} roundings from the dense ones.\n"
    )


def _left(some: Mapping[str, Family]) -> list[str]:
    """Where much of a model is not pruned, and what most of that is."""
    said = []
    for name, family in some.items():
        if not _is_ok(family, "pruned"):
            continue
        found = family["found"]
        left = sum(found["not_pruned"].values())
        if left > _MUCH * (left + found["prunable"]):
            most = max(found["not_pruned"], key=found["not_pruned"].__getitem__)
            said.append(f"{name} ({left / (left + found['prunable']):.0%}, `{most}`)")
    if not said:
        return []
    return [
        f"In these tiny models more than {_MUCH:.0%} of the weights are in matrices that are not pruned (without embeddings and head). "
        f"The share and the largest such matrix: {', '.join(said)}.\n"
    ]


def _table(some: Mapping[str, Family]) -> str:
    """Families of one outcome share a row, the outcome of most first."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, family in some.items():
        rows.setdefault(_row(family), []).append(name)
    lines = ["| families | kind | pruned | packed | decoded | why not |", "|---|---|---|---|---|---|"]
    for row, names in sorted(rows.items(), key=lambda item: (bool(item[0][-1]), -len(item[1]), item[1])):
        lines.append(f"| {', '.join(names)} | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def _row(family: Family) -> tuple[str, ...]:
    """Kind, what became of each step, and the reason of the first that did not succeed."""
    experts = family.get("found", {}).get("experts")
    kind = "–" if experts is None else "experts" if experts else "dense"
    pruned = packed = decoded = "no"
    if _is_ok(family, "pruned"):
        pruned = "by magnitude" if "refused" in family["pruned"] else "yes"
    if _is_ok(family, "packed"):
        packed = f"{math.floor(100 * family['packed']['share'])}%"
    if _is_ok(family, "decoded"):
        decoded = f"yes, {_path(family)}"
    elif not family["causal"]:
        decoded = "–"
    return kind, pruned, packed, decoded, _reason(family)


def _reason(family: Family) -> str:
    """Why pruning is not calibrated, and what stopped the first step that did not succeed."""
    said = [in_words(family["pruned"]["refused"])] if "refused" in family.get("pruned", {}) else []
    for step in ("pruned", "packed", "decoded"):
        told = family.get(step, {"outcome": "ok"})
        if told["outcome"] != "ok":
            said.append(in_words(told["reason"]) if told["outcome"] == "refused" else _plain(told["reason"]))
            if told.get("transformers", "the same") != "the same":
                said.append("so do transformers' own")
            break
    return "; ".join(said)


def in_words(message: str) -> str:
    return next(
        (words for part, words in _REASONS.items() if part in message), _plain(message.split("; ")[0])
    )


def _plain(text: str) -> str:
    """One line that can stand in a table."""
    plain = text.replace("|", "/").replace("`", "")
    return textwrap.shorten(plain, _LONGEST, placeholder=" …").rstrip(".:")


def _is_ok(family: Family, step: str) -> bool:
    return bool(family.get(step, {}).get("outcome") == "ok")


def _path(family: Family) -> str:
    paths: Mapping[str, str] = family["decoded"]["paths"]
    return paths.get("packed", paths["dense"])
