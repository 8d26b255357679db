"""Which whole experts of a mixture leave: pure functions of what was seen of each.

A new solver is a class here and an entry of EXPERT_SOLVERS. The experts of the lowest scores leave, the first of equal ones; where a
router picks groups first, each group loses equally many (`removed_experts`).

Shapes: E = experts, T = tokens, K = experts picked for a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from tawny.calibration.output import Factor
from tawny.calibration.statistics import Needs
from tawny.errors import NumericalError
from tawny.solvers.base import WholeSolver

# Tokens and the experts that are gone → the experts `[N, K]` picked for them and their gates `[N, K]`.
Route = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class ExpertsSeen:
    """What is known of the experts of one mixture; empty tensors where nothing was seen.

    Attributes:
        chosen: `[E]` int64, tokens that each expert got.
        strength: `[E]` float64, Σ over these of gate · ‖the expert's output‖₂.
        sizes: `[E]` float64, Σ |W| of its matrices.
        left: `[E]` float64, when each left, where that was asked of the output: 0 is the first.
    """

    chosen: Tensor
    strength: Tensor
    sizes: Tensor
    left: Tensor


class ExpertSolver(WholeSolver, Protocol):
    """What scores whole experts.

    Attributes:
        needs: "none" where the weights are enough.
        asks_output: experts leave one by one by what the model's output loses, which a backward walk measures.
    """

    needs: ClassVar[Needs] = "norms"
    asks_output: ClassVar[bool] = False

    def workspace(self, out: int, width: int, output: Factor = "none") -> int:
        """Bytes to cut an expert's matrix, beside its stored copy."""
        return 4 * out * width

    def expert_scores(self, seen: ExpertsSeen) -> Tensor:
        """[E] float64: the lower, the sooner an expert leaves."""
        ...


@dataclass(frozen=True)
class Reap(ExpertSolver):
    """Experts leave that add little where they are chosen: the mean of gate · ‖output‖₂.

    Router-weighted expert activation pruning, Lasby et al. 2025 (2510.13999).
    """

    def expert_scores(self, seen: ExpertsSeen) -> Tensor:
        return seen.strength / seen.chosen.clamp(min=1)


@dataclass(frozen=True)
class Frequency(ExpertSolver):
    """Experts leave that are chosen for the fewest tokens."""

    def expert_scores(self, seen: ExpertsSeen) -> Tensor:
        return seen.chosen.double()


@dataclass(frozen=True)
class Fisher(ExpertSolver):
    """Experts leave one by one, each time the one whose absence the model's output feels least.

    Felt is ½ E[(gᵀδ)²] in nats a token: δ changes the mixture's output once tokens are routed anew, g is the gradient there of
    log p(y), y drawn from the model.
    """

    asks_output: ClassVar[bool] = True

    def expert_scores(self, seen: ExpertsSeen) -> Tensor:
        return seen.left


def removed_experts(scores_E: Tensor, removed: int, groups: int = 1) -> Tensor:
    """`[removed]` int64 in rising order: the experts of the lowest scores, equally many of each group of neighbours.

    Raises:
        NumericalError: a score is NaN or infinite.
        ValueError: the groups cannot lose equally many.
    """
    if not bool(torch.isfinite(scores_E).all()):
        raise NumericalError("the score of an expert is NaN or infinite")
    if removed % groups:
        raise ValueError(f"{groups} groups cannot lose {removed} experts alike")
    order_GS = scores_E.view(groups, -1).argsort(dim=1, stable=True)[:, : removed // groups]
    size = len(scores_E) // groups
    return (order_GS + size * torch.arange(groups)[:, None]).flatten().sort().values


def leave_one_by_one(
    x_TH: Tensor, felt_TE: Tensor, route: Route, *, removed: int, groups: int = 1
) -> tuple[Tensor, Tensor]:
    """Let experts leave greedily, tokens routed anew each time; those that keep their experts keep their gates here.

    Args:
        x_TH: tokens in front of the router.
        felt_TE: gᵀ · output of each expert at each token, float64.
        route: picks experts for some of the tokens where some experts are gone.
        removed: experts that leave at most; of each group equally many.

    Returns:
        `[E]` float64 when each left, `removed` and later for those that stay; and `[removed]` float64, ½ E[(gᵀδ)²] after each.
    """
    tokens, count = felt_TE.shape
    size = count // groups
    gone: list[int] = []
    picked_TK, gates_TK = route(x_TH, torch.tensor(gone, dtype=torch.int64))
    dense_T = (felt_TE.gather(1, picked_TK) * gates_TK.double()).sum(1)
    change_T = torch.zeros_like(dense_T)
    left_E, losses = torch.full((count,), float(removed), dtype=torch.float64), []
    for step in range(removed):
        lost = torch.bincount(torch.tensor(gone, dtype=torch.int64) // size, minlength=groups)
        whole = float(change_T.square().sum())
        best: tuple[float, int, Tensor, Tensor, Tensor, Tensor] | None = None
        for expert in range(count):
            if expert in gone or lost[expert // size] >= removed // groups:
                continue
            rows = (picked_TK == expert).any(1).nonzero()[:, 0]
            picked, gates, change = picked_TK[:0], gates_TK[:0], change_T[:0]
            if len(rows):
                picked, gates = route(x_TH[rows], torch.tensor([*gone, expert]))
                change = (felt_TE[rows].gather(1, picked) * gates.double()).sum(1) - dense_T[rows]
            loss = whole - float(change_T[rows].square().sum()) + float(change.square().sum())
            if best is None or loss < best[0]:
                best = loss, expert, rows, picked, gates, change
        assert best is not None
        loss, expert, rows, picked, gates, change = best
        picked_TK[rows], gates_TK[rows], change_T[rows] = picked, gates, change
        gone.append(expert)
        left_E[expert] = step
        losses.append(0.5 * max(loss, 0.0) / max(tokens, 1))
    return left_E, torch.tensor(losses, dtype=torch.float64)
