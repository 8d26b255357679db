"""How numbers are written wherever a person reads them: tables, cards and pages say the same number in the same words."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Metrics of tasks that are shares of the questions.
SHARES = ("acc", "acc_norm", "exact_match")


def duration(seconds: float) -> str:
    """`0.8 s`, `12 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: GB = 10⁹."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while count >= 999.5 and len(units) > 1:
        count, units = count / 1000, units[1:]
    return f"{count:.0f} {units[0]}" if count >= 99.5 or units[0] == "B" else f"{count:.3g} {units[0]}"


def unique_ends(names: Sequence[str]) -> list[str]:
    """Of each dotted name as few of its last parts as no other name ends with."""
    parts = [name.split(".") for name in names]

    def end(own: list[str]) -> str:
        others = [each for each in parts if each != own]
        counts = range(1, len(own) + 1)
        alone = (n for n in counts if all(each[-n:] != own[-n:] for each in others))
        return ".".join(own[-next(alone, len(own)) :])

    return [end(own) for own in parts]


def percent(share: float, digits: int = 2) -> str:
    return f"{share * 100:.{digits}f} %"


def bar(share: float, width: int = 20) -> str:
    """A horizontal bar of `width` cells for a share in [0, 1], in eighths of a cell."""
    share = min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    if "utf" not in (sys.stdout.encoding or "").lower():
        return "#" * round(share * width)
    eighths = round(share * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def perplexity_text(result: Mapping[str, Any]) -> str:
    """`21.03 ± 0.84`; a standard error of 0 is that of a single window, which has none."""
    value, error = float(result["perplexity"]), float(result["stderr"])
    digits = 2 if value < 1000 else 0
    return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error else "")


def quality_text(entry: Mapping[str, Any]) -> tuple[str, str]:
    """What a recovery measured, by its name: perplexity, or of a model that predicts no token the share of its features lost."""
    if "perplexity" in entry:
        return "perplexity", f"{entry['perplexity']:,.2f}"
    return "energy lost", percent(entry["loss"])


def counted(text: Mapping[str, Any]) -> tuple[str, str]:
    """What a recovery was shown and what it counts in it: windows and tokens, crops and positions, …"""
    of, units = text.get("counted", ("windows", "tokens"))
    return of, units


def begun(of: Mapping[str, Any]) -> str:
    """What stands after a number of windows or samples, of which `bos` says whether each begins with BOS."""
    return ", each begun with BOS" if of.get("bos") else ""


def kl_text(value: float, error: float) -> str:
    """`0.0431 ± 0.0012`."""
    return f"{value:.4f}" + (f" ± {error:.4f}" if error else "")


def share_text(value: float, error: float) -> str:
    """`61.2 ± 1.4`, in percent."""
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error else "")


def points_text(value: float, error: float) -> str:
    """`−1.8 ± 0.6`, a difference in percent points."""
    return f"{100 * value:+.1f}".replace("-", "−") + (f" ± {100 * error:.1f}" if error else "")


def score_text(task: Mapping[str, Any]) -> str:
    """What a task measured: shares in %, anything else as it is."""
    value, stderr = task["value"], task["stderr"]
    if task["metric"] in SHARES:
        return share_text(value, stderr)
    return f"{value:.4g}" + f" ± {stderr:.2g}" * bool(stderr)
