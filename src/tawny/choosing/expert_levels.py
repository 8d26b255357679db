"""Levels of whole experts: which leave is decided once, in order, and a block is tried without the first of them.

One walk goes through the model as it is where uniform cuts it, and scores the experts of each block with the recipe's solver. A
candidate needs nothing solved: its blocks run without so many of their experts (model/mixtures.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import final

import torch
from torch import Tensor

from tawny.allocation.joint import Survey
from tawny.allocation.profile import Allocation
from tawny.choosing.member_space import SparsitySpace
from tawny.choosing.rehearsal import rehearsing
from tawny.choosing.solving import WALK, Solved, walk_dense
from tawny.choosing.space import Levels
from tawny.model.linears import Linear
from tawny.model.mixtures import without
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.pruning.prepare import Job
from tawny.pruning.session import Session
from tawny.run.walk import Visitor
from tawny.solvers.experts import removed_experts


@final
class ExpertLevels:
    """Blocks without some of their experts.

    Args:
        scores: of each mixture, by name, `[experts]`: those of the lowest leave first.
    """

    def __init__(self, job: Job, space: SparsitySpace, scores: Mapping[str, Tensor]) -> None:
        self.mixtures, self.space, self.scores = job.mixtures, space, scores
        self._places = {linear.name: place for place, linear in enumerate(space.linears)}

    @contextmanager
    def of_block(
        self, stack: Stack, index: int, linears: Sequence[Linear]
    ) -> Iterator[Callable[[Levels], AbstractContextManager[None]]]:
        mixture = self.mixtures[index]

        def at(levels: Levels) -> AbstractContextManager[None]:
            if mixture is None:
                return nullcontext()
            share = self.space.sparsity(self._places[linears[0].name], levels[0])
            removed = round(share * mixture.count)
            return without(mixture, removed_experts(self.scores[mixture.name], removed, mixture.groups))

        yield at


def score_experts(
    session: Session,
    space: SparsitySpace,
    cutting: Callable[[Session, Allocation], Visitor],
    *,
    samples: Samples,
    held_out: Samples,
    survey: Survey,
) -> tuple[Solved, ExpertLevels]:
    """Walk through the model once, after blocks that are cut as `space.uniform` says.

    Args:
        cutting: what scores the experts of each block, and lets some leave.
        samples, held_out, survey: as of `solve_levels`.
    """
    rehearsal = rehearsing(session, samples)
    cut = cutting(rehearsal, space.allocation(space.uniform))
    solved = walk_dense(session, rehearsal, cut, held_out, survey, name=WALK, phase="scoring experts")
    scores = {
        one["name"]: torch.tensor(one["scores"], dtype=torch.float64) for one in rehearsal.record.experts
    }
    return solved, ExpertLevels(session.job, space, scores)
