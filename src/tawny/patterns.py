"""Which masks are legal, and how a mask is chosen from scores.

A pattern is unstructured (the lowest scores of each row, or of the whole matrix, go) or n:m (the n highest of
every m neighbours along `in` stay); or whole members of a coupling go, channels or heads (model/couplings.py); or whole
experts (model/mixtures.py) or blocks. Promises of masks of single weights:

- A mask removes an exact count. It is chosen by selection, never by comparing with a threshold alone, so
  equal scores cannot make it remove one too many or one too few.
- Ties are broken the same way everywhere: among equal scores the one that comes first in memory goes first.
  This is what a stable ascending sort would do.
- Weights that are already zero go first: `zeros_first` gives them the score −∞, below every other.

A new pattern of single weights is a class with its words in `parse_pattern`, its choice in `keep_mask`, and a case wherever
solvers ask for `NM`. One of whole parts is checked in recipe/schema.py, allocated in pruning/profiling.py and walked by
pruning/prepare.py. recipe/catalogue.py has a line for each. One of single weights has cases, too, in recipe/schema.py, pruning/block.py,
pruning/prepare.py, pruning/profiling.py and choosing/space.py. One of whole parts has its registry in solvers/__init__.py, and
cases in report/form.py, pruning/profile.py and choosing/settings.py.

Shapes: O = out, I = in, M = the m of n:m, G = number of groups of m.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tawny.errors import PatternError

Scope = Literal["row", "matrix"]
MemberKind = Literal["channels", "heads"]


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go; scores compete within a `row` or within the whole `matrix`.

    A scope of None is the default of the solver's paper.
    """

    scope: Scope | None = None

    def with_default(self, scope: Scope) -> Unstructured:
        """This pattern, its scope filled in where the recipe left it open."""
        return self if self.scope is not None else Unstructured(scope)

    def __str__(self) -> str:
        return "unstructured" if self.scope is None else self.scope


@dataclass(frozen=True)
class NM:
    """n weights kept of every m neighbours along `in`; implies the sparsity 1 − n/m."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 1 <= self.n <= self.m or self.m < 2:
            raise PatternError(
                f"pattern {self.n}:{self.m} is not n kept of every m; expected 1 ≤ n ≤ m and m ≥ 2, as in 2:4"
            )

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Members:
    """Whole channels of FFNs, whole key-value groups of attention with their query heads, or both."""

    kinds: tuple[MemberKind, ...]

    def __str__(self) -> str:
        return "+".join(self.kinds)


@dataclass(frozen=True)
class Blocks:
    """Whole blocks of the stack."""

    def __str__(self) -> str:
        return "blocks"


@dataclass(frozen=True)
class Experts:
    """Whole experts of mixtures, with their rows of the router."""

    def __str__(self) -> str:
        return "experts"


@dataclass(frozen=True)
class Rank:
    """No weight goes: each linear becomes a product of two factors of r(out + in) numbers, written dense."""

    def __str__(self) -> str:
        return "rank"


Pattern = Unstructured | NM  # which single weights may go together
AnyPattern = Pattern | Members | Blocks | Experts | Rank

_UNSTRUCTURED: dict[str, Scope | None] = {
    "unstructured": None,
    "unstructured-row": "row",
    "row": "row",
    "unstructured-matrix": "matrix",
    "matrix": "matrix",
}
_MEMBERS: tuple[tuple[MemberKind, ...], ...] = (("channels",), ("heads",), ("channels", "heads"))


def parse_pattern(text: str) -> AnyPattern:
    """`unstructured`, `row`, `matrix`, `n:m` (n kept of every m), `channels`, `heads`, `channels+heads`, `blocks`, `experts` or `rank`.

    Raises:
        PatternError: none of these.
    """
    word = str(text).strip().lower()
    if word in _UNSTRUCTURED:
        return Unstructured(_UNSTRUCTURED[word])
    if found := re.fullmatch(r"(\d+)\s*:\s*(\d+)", word):
        return NM(int(found[1]), int(found[2]))
    for whole in (Blocks(), Experts(), Rank()):
        if word == str(whole):
            return whole
    for kinds in _MEMBERS:
        if sorted(part.strip() for part in word.split("+")) == list(kinds):
            return Members(kinds)
    raise PatternError(
        f"pattern {text!r} is not known; expected 'unstructured', 'row', 'matrix', 'channels', 'heads', 'channels+heads', "
        "'blocks', 'experts', 'rank' or n:m such as '2:4' (n kept of every m; quote it in YAML)"
    )


def check_pattern(pattern: AnyPattern, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise a PatternError for an n:m whose m does not divide the width of some linear; shapes are `[out, in]` by name."""
    if not isinstance(pattern, NM):
        return
    bad = [f"{name} {list(shape)}" for name, shape in shapes.items() if shape[1] % pattern.m]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise PatternError(
            f"pattern {pattern} needs widths that {pattern.m} divides, but these linears [out, in] are not: "
            f"{', '.join(bad[:5])}{more}; choose another m or leave them out with -o exclude=GLOB"
        )


def removed_count(numel: int, sparsity: float) -> int:
    """How many of `numel` weights a sparsity removes: rounded half to even, within [0, numel]."""
    return min(numel, max(0, round(sparsity * numel)))


def rows_removed(rows: int, removed: int) -> Tensor:
    """[rows] int64: `removed` spread over rows that differ by at most one, the extra ones evenly spaced."""
    edges = torch.arange(rows + 1, dtype=torch.int64) * removed // max(rows, 1)
    return edges.diff()


def zeros_first(scores_OI: Tensor, W_OI: Tensor) -> Tensor:
    """The scores, in place, with −∞ where the weight is already zero."""
    if int(torch.count_nonzero(W_OI)) == W_OI.numel():  # one quick read instead of a slow write
        return scores_OI
    return scores_OI.masked_fill_(W_OI == 0, -torch.inf)


def keep_mask(scores_OI: Tensor, pattern: Pattern, removed: int) -> Tensor:
    """[out, in] bool, True where a weight stays: exactly `removed` of the lowest scores go.

    An unstructured pattern whose scope is open competes over the matrix. n:m ignores `removed`. Scores must
    not be NaN.

    Raises:
        ValueError: `removed` is outside [0, out·in].
    """
    if isinstance(pattern, NM):
        return _keep_nm(scores_OI, pattern)
    if not 0 <= removed <= scores_OI.numel():
        raise ValueError(f"cannot remove {removed} of {scores_OI.numel()} weights")
    if pattern.scope == "row":
        return keep_mask_rows(scores_OI, rows_removed(scores_OI.shape[0], removed))
    return _keep_highest(scores_OI.reshape(1, -1), removed).view(scores_OI.shape)


def keep_mask_rows(scores_OI: Tensor, removed_O: Tensor) -> Tensor:
    """As `keep_mask`, with a count of its own for every row."""
    counts = sorted(set(removed_O.tolist()))
    if counts[-1] - counts[0] <= 1:
        return _keep_highest(scores_OI, counts[0], None if len(counts) == 1 else removed_O > counts[0])
    keep_OI = torch.empty(scores_OI.shape, dtype=torch.bool, device=scores_OI.device)
    for count in counts:
        rows = (removed_O == count).nonzero().squeeze(1).to(scores_OI.device)
        keep_OI[rows] = _keep_highest(scores_OI[rows], count)
    return keep_OI


def _keep_highest(scores_OI: Tensor, removed: int, one_more_O: Tensor | None = None) -> Tensor:
    """Remove the same number of lowest scores from every row, or one more where `one_more_O` says so."""
    out, width = scores_OI.shape
    kept = out * (width - removed)
    if one_more_O is None:
        if removed == 0 or removed == width:
            return torch.full(scores_OI.shape, removed == 0, dtype=torch.bool, device=scores_OI.device)
        threshold_O1 = _kth_smallest(scores_OI, removed)[:, :1]
    else:
        one_more_O = one_more_O.to(scores_OI.device)
        kept -= int(one_more_O.sum())
        both_O2 = _kth_smallest(scores_OI, removed, and_next=True)
        threshold_O1 = torch.where(one_more_O, both_O2[:, 1], both_O2[:, 0])[:, None]
    keep_OI = scores_OI > threshold_O1
    # No row keeps more than it should, so the total tells whether equal scores made any of them keep less.
    if int(torch.count_nonzero(keep_OI)) < kept:
        kept_O = torch.full((out,), width - removed, device=scores_OI.device)
        kept_O -= 0 if one_more_O is None else one_more_O.long()
        _keep_last_equals(keep_OI, scores_OI == threshold_O1, kept_O)
    return keep_OI


def _keep_last_equals(keep_OI: Tensor, equal_OI: Tensor, kept_O: Tensor) -> None:
    """Where scores equal the threshold, keep as many of the last ones as the row still lacks of `kept_O`."""
    lacking_O = kept_O - keep_OI.sum(1)
    row_E, column_E = (equal_OI & (lacking_O > 0)[:, None]).nonzero().unbind(1)
    count_O = torch.bincount(row_E, minlength=len(keep_OI))
    from_the_end_E = count_O.cumsum(0)[row_E] - torch.arange(len(row_E), device=row_E.device)
    last_E = from_the_end_E <= lacking_O[row_E]
    keep_OI[row_E[last_E], column_E[last_E]] = True


def _kth_smallest(scores_OI: Tensor, k: int, and_next: bool = False) -> Tensor:
    """[out, 2]: the k-th smallest score of every row, k from 1 (0: −∞), and the one after it if asked for."""
    rows, width = scores_OI.shape
    found_O2 = scores_OI.new_full((rows, 2), -torch.inf)
    if scores_OI.device.type != "cpu":
        for column, rank in enumerate((k, k + 1)[: 1 + and_next]):
            if rank:
                found_O2[:, column] = scores_OI.kthvalue(rank, dim=1).values
        return found_O2
    if rows == 1 and width >= 2**17:
        found_O2[0, 0] = _kth_smallest_of_many(scores_OI.reshape(-1), k)
        return found_O2
    # numpy's partition is twice as fast as kthvalue here and needs no order; a chunk fits a core's cache.
    chunk = max(1, 2**17 // width)

    def select(start: int) -> None:
        part = scores_OI[start : start + chunk].clone()
        found = found_O2[start : start + chunk]
        if k:
            part.numpy().partition(k - 1, axis=1)
            found[:, 0] = part[:, k - 1]
        if and_next:
            torch.amin(part[:, k:], dim=1, out=found[:, 1])

    starts = range(0, rows, chunk)
    if len(starts) == 1:
        select(0)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(select, starts))
    return found_O2


def _kth_smallest_of_many(scores_N: Tensor, k: int) -> Tensor:
    """The k-th smallest of a long vector: a sample brackets it, and only what lies in the bracket is partitioned.

    The bracket is five standard deviations of the sample's rank on each side. Should it miss, because the scores are
    periodic, the answer is the same and only slower.
    """
    total = len(scores_N)
    sample = scores_N[:: (total // 4096) | 1].sort().values  # an odd stride is never in step with a matrix
    share = k / total
    middle, spread = share * len(sample), 5 * math.sqrt(share * (1 - share) * len(sample)) + 1
    low, high = math.floor(middle - spread), math.ceil(middle + spread)
    inside = torch.ones_like(scores_N, dtype=torch.bool)
    below = 0
    if low >= 0:
        inside &= scores_N >= float(sample[low])
        below = total - int(torch.count_nonzero(inside))
    if high < len(sample):
        inside &= scores_N <= float(sample[high])
    candidates = scores_N.numpy()[inside.numpy()]
    if not below < k <= below + len(candidates):
        candidates, below = scores_N.numpy().copy(), 0
    candidates.partition(k - below - 1)
    return torch.as_tensor(candidates[k - below - 1])


def _keep_nm(scores_OI: Tensor, pattern: NM) -> Tensor:
    """Keep the n highest of every m."""
    n, m = pattern.n, pattern.m
    if scores_OI.shape[1] % m:
        raise PatternError(f"pattern {pattern} does not fit a weight of shape {list(scores_OI.shape)}")
    scores_GM = scores_OI.reshape(-1, m)
    if m > 16 or len(scores_GM) < 2048:
        return _keep_highest(scores_GM, m - n).view(scores_OI.shape)
    # Many small groups: every group's ranks at once, by comparing each pair of neighbours in long vectors.
    keep_GM = torch.empty(scores_GM.shape, dtype=torch.bool, device=scores_OI.device)
    for part_GM, kept_GM in zip(torch.split(scores_GM, 2**15), torch.split(keep_GM, 2**15), strict=True):
        scores_MG = part_GM.t().contiguous()
        losses_MG = torch.zeros(scores_MG.shape, dtype=torch.uint8, device=scores_OI.device)
        for j in range(m):
            for k in range(j):
                earlier_loses = scores_MG[k] <= scores_MG[j]
                losses_MG[j] += earlier_loses
                losses_MG[k] += ~earlier_loses
        kept_GM.copy_((losses_MG >= m - n).t())
    return keep_GM.view(scores_OI.shape)


def matches(W_OI: Tensor, n: int, m: int) -> bool:
    """Whether every m neighbours along `in` hold at most n weights that are not zero."""
    if W_OI.shape[1] % m:
        return False
    return bool(((W_OI != 0).view(torch.uint8).reshape(-1, m).sum(1, dtype=torch.int32) <= n).all())
