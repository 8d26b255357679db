"""The table of whole experts: solvers beside other ways to the same bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

ORDER = ("reap", "fisher", "frequency", "magnitude", "channels")


def experts(result: Mapping[str, Any]) -> str:
    """One table a text: a row a solver, a column a share; then loops, bytes and where it was measured."""
    setting, cells, source = result["setting"], result["cells"], result["source"]
    near = "; ".join(
        f"on {text} KL {found['kl']:.3f}, perplexity {found['perplexity']:.2f} (SmolLM2: {found['dense']:.2f})"
        for text, found in source["texts"].items()
    )
    rows: dict[str, dict[float, Mapping[str, Any]]] = {}
    seeds: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for name, cell in sorted(cells.items()):
        label, share, seed = _parts(name)
        if share and not seed:
            rows.setdefault(label, {})[share] = cell
        if share:
            seeds.setdefault((label, share), []).append(cell)
    apart = " (its difference from reap in the same column, ± over windows)" if len(rows) > 1 else ""
    parts = [
        f"{setting['model']}: 16 experts a block, of which a token gets 8. Beside its source: {near}. Calibrated on {setting['samples']} × "
        f"{setting['seqlen']} tokens of {setting['calibration']}; {setting['windows']} windows of {setting['eval_seqlen']} tokens. "
        f"Each cell is the KL from the whole mixture{apart}, and the perplexity.\n"
    ]
    shares = sorted({share for row in rows.values() for share in row})
    names = sorted(rows, key=lambda label: (ORDER.index(re.split(r"\W", label)[0]), label))
    for text in setting["texts"]:
        parts += [
            f"| {text} | {' | '.join(map(_percent, shares))} |",
            "|---" * (1 + len(shares)) + "|",
            *(
                f"| {_named(label)} | {' | '.join(_shown(rows, label, share, text) for share in shares)} |"
                for label in names
            ),
            "",
        ]
    several = {place: found for place, found in seeds.items() if len(found) > 1}
    if several:
        count = len(next(iter(several.values())))
        parts += [
            f"KL with {count} calibrations on other tokens, their mean and spread:\n",
            f"| | {' | '.join(setting['texts'])} |",
            "|---" * (1 + len(setting["texts"])) + "|",
            *(
                f"| {_named(label)}, {_percent(share)} | {' | '.join(_spread(found, text) for text in setting['texts'])} |"
                for (label, share), found in sorted(several.items(), key=lambda one: names.index(one[0][0]))
            ),
            "",
        ]
    sizes = ", ".join(
        f"{cell['bytes'] / 1e6:.0f} MB at {_percent(share)}" for share, cell in sorted(rows["reap"].items())
    )
    packed = "".join(
        f" Packed in {name} the whole mixture takes {cell['bytes'] / 1e6:.0f} MB, at KL "
        + " and ".join(f"{cell['texts'][text]['kl']:.4f}" for text in setting["texts"])
        + "."
        for name, cell in cells.items()
        if ":" not in name
    )
    parts.append(f"Files: {source['bytes'] / 1e6:.0f} MB before, {sizes}.{packed}\n")
    if setting["loops"]:
        looped = [
            f"{_named(label)} at {_percent(share)}: {cell['loops']}"
            for label in names
            for share, cell in sorted(rows[label].items())
            if cell["loops"] is not None
        ]
        parts.append(
            f"Loops among {setting['loops']} continuations of 128 tokens: the whole mixture {source['loops']}; {'; '.join(looped)}.\n"
        )
    if speed := result.get("speed"):
        told = "; ".join(
            f"{name if name == 'whole' else _told(name)} {median(rates):.0f} tokens/s, {speed['bytes'][name] / 1e6:.0f} MB"
            for name, rates in speed["rates"].items()
        )
        parts.append(f"Decoding in int8 by Tawny, {speed['threads']} threads, in turns: {told}.\n")
    parts.append(f"<sub>{result['machine']['cpu']}, {result['date']}.</sub>\n")
    return "\n".join(parts)


def _parts(name: str) -> tuple[str, float, int]:
    """The label of a cell, its share (0 of a packed mixture) and its seed."""
    what, share, rest, seed = re.fullmatch(r"(\w+):?([0-9.]*)(:?\w*)@?(\d*)", name).groups()  # type: ignore[union-attr]
    return what + rest.replace(":uniform", "").replace(":", ", "), float(share or 0), int(seed or 0)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")


def _told(name: str) -> str:
    label, share, _ = _parts(name)
    return f"{_named(label)} at {_percent(share)}"


def _spread(found: Sequence[Mapping[str, Any]], text: str) -> str:
    losses = [cell["texts"][text]["kl"] for cell in found]
    return f"{mean(losses):.3f} ± {stdev(losses):.3f}"


def _named(label: str) -> str:
    return "channels of all experts (`obs`), slimmed" if label == "channels" else label


def _shown(rows: Mapping[str, Mapping[float, Mapping[str, Any]]], label: str, share: float, text: str) -> str:
    if share not in rows[label]:
        return "–"
    own = rows[label][share]["texts"][text]
    kl, perplexity = f"{own['kl']:.3f}", f"{own['perplexity']:.2f}"
    if label == "reap" or share not in rows["reap"]:
        return f"{kl}, {perplexity}"
    against = rows["reap"][share]["texts"][text]
    apart = [a - b for a, b in zip(own["kl_by_window"], against["kl_by_window"], strict=True)]
    signed = f"{mean(apart):+.3f} ± {stdev(apart) / len(apart) ** 0.5:.3f}".replace("-", "−")
    return f"{kl} ({signed}), {perplexity}"
