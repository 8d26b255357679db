"""What the files of a fit take: the questions that a choice asks of a format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tawny.allocation.profile import LinearInfo
from tawny.choosing.level import UNMEASURED, Level, Measures, levels_tried
from tawny.kinds import solved_kind
from tawny.solvers.grid import Grid


class Limit(Protocol):
    """What linears and head take of what may be spent.

    Attributes:
        rest: what all else takes, whatever they become.
    """

    rest: float

    def linear(
        self, info: LinearInfo, level: Level, group: int | None = None, measures: Measures = UNMEASURED
    ) -> float: ...

    def of_head(self, kind: str | None) -> float: ...

    def of_embedding(self, kind: str | None) -> float:
        """Of an embedding that shares no weight with the head."""
        ...


class Sizes(Limit, Protocol):
    """Bytes of the files that a model becomes, and what its linears and ends may become there.

    Attributes:
        kinds: of linears, the most bits first.
        ends: kinds of the head, and of an embedding that shares no weight with it.
        every, every_end: the kinds of both that are measured, whatever a person restricts the choice to, so that the measures serve
            another choice.
        sparsities: of linears.
        head, embedding: module paths; None where there is none that may be rounded.
        tied: module path of an embedding that shares its weight with the head.
        head_numel, embedding_numel: their weights.
        together: names of linears that need one kind.
    """

    kinds: tuple[str, ...]
    ends: tuple[str, ...]
    sparsities: tuple[float, ...]
    head: str | None
    embedding: str | None
    tied: str | None
    head_numel: int
    embedding_numel: int
    together: Sequence[tuple[str, ...]] = ()

    @property
    def every(self) -> tuple[str, ...]:
        return self.kinds

    @property
    def every_end(self) -> tuple[str, ...]:
        return self.ends

    def groups(self, kind: str) -> Sequence[int | None]:
        """Columns of a scale that all linears may have."""
        return solved_kind(kind).groups

    def grid(self, kind: str, width: int) -> Grid:
        """What a linear of this width is rounded to."""
        ...

    def rounded_end(self, W_OI: Tensor, kind: str, name: str) -> Tensor:
        """A head or an embedding as the files give it back."""
        ...

    @property
    def levels(self) -> list[Level]:
        return levels_tried(self.kinds, self.sparsities)
