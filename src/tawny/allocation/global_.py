"""One threshold of a score for the whole model (`global`), the oldest baseline of the OWL paper (2310.05175).

Every weight of the model is ranked in one list and the lowest `S` of them mark how much each linear loses;
the solver then chooses which. Scores of different linears are not comparable, so it can empty a linear: at 70
% the paper measures perplexities in the thousands. It is here to be compared with.

How exact: `measure` keeps, per linear, the number of scores with each pattern of upper 16 float32 bits: bins
of 1/128 octave, each one bfloat16 value, so magnitudes of a bfloat16 checkpoint are ranked without error. In
general only the one bin that holds the threshold is interpolated, by the same share in every linear: a
linear's sparsity is off by at most its mass in that bin (typically 0.2 %, and much less after interpolation);
the total is exact.
"""

from __future__ import annotations

import base64
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from tawny.allocation.budget import exact
from tawny.allocation.profile import Allocation, Allocator, Linears, Profile, largest
from tawny.allocation.scores import BINS, Score, histogram, magnitude_scores, score_sets, wanda_scores
from tawny.calibration.statistics import Needs

_SCORES: dict[str, Score] = {"wanda": wanda_scores, "magnitude": magnitude_scores}


def _packed(numbers: Tensor) -> str:
    """As text of a few bytes a number: a mixture has twelve thousand linears, of two thousand bins each."""
    return base64.b64encode(zlib.compress(numbers.to(torch.int64).numpy().tobytes(), 1)).decode()


def _unpacked(text: str) -> list[int]:
    counts: list[int] = torch.frombuffer(
        bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.int64
    ).tolist()
    return counts


@dataclass(frozen=True)
class Global(Allocator):
    """One threshold of a score (wanda or magnitude) over all weights of the model.

    `s_l = #{A_l ≤ t}/n_l` with `t` such that `Σ #{A_l ≤ t} = S·Σ n_l`; `A = |W|·‖X‖₂` or `|W|`.

    Raises:
        NumericalError: a weight or an input is not finite.
        ValueError: no column norms were given to the score wanda.
    """

    score: Literal["wanda", "magnitude"] = "wanda"
    measures_weights: ClassVar[bool] = True

    @property
    def needs(self) -> Needs:
        return "norms" if self.score == "wanda" else "none"

    def workspace(self, shapes: Sequence[tuple[int, int]]) -> int:
        """A weight and its scores in float32, and 64-bit bins to count them by; measured."""
        return 20 * largest(shapes)

    def measure(self, linears: Linears) -> dict[str, Any]:
        counted = {}
        for name, scores_OI in score_sets(linears, _SCORES[self.score]):
            counts = histogram(scores_OI).cpu()
            bins = counts.nonzero().flatten()
            counted[name] = {"bins": _packed(bins), "counts": _packed(counts[bins])}
        return {"histograms": counted}

    def allocate(self, profile: Profile, target: float) -> Allocation:
        measured = {name: h for block in profile.measures for name, h in block["histograms"].items()}
        sizes = profile.sizes
        # Of thousands of experts: only totals are dense, 512 kB for a histogram of each linear would be gigabytes.
        total = torch.zeros(BINS + 1, dtype=torch.int64)  # entry b: how many lie below bin b
        for name in sizes:
            bins, counts = (_unpacked(measured[name][key]) for key in ("bins", "counts"))
            total[1:].index_add_(0, torch.tensor(bins), torch.tensor(counts))
        total, goal = total.cumsum_(0), target * sum(sizes.values())
        # The last bin edge with no more than `goal` scores below it, and the way on into the bin above it.
        edge = min(int(torch.searchsorted(total.double(), goal, right=True)) - 1, BINS - 1)
        step = float(total[edge + 1] - total[edge])
        share = (goal - float(total[edge])) / step if step else 0.0
        raw = {}
        for name, size in sizes.items():
            bins, counts = (_unpacked(measured[name][key]) for key in ("bins", "counts"))
            place, behind = bisect_left(bins, edge), bisect_right(bins, edge)
            below, inside = sum(counts[:place]), sum(counts[place:behind])
            raw[name] = (below + share * inside) / size
        return exact(raw, sizes, target)
