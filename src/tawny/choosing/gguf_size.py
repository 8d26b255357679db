"""What a GGUF file weighs, before it is made: to the byte, from the file that it is made from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from torch import Tensor

from tawny.allocation.profile import LinearInfo
from tawny.choosing.level import UNMEASURED, Level, Measures
from tawny.choosing.sizes import Sizes
from tawny.errors import RecipeError, nearest
from tawny.exporting.template import Template
from tawny.gguf_kinds import GGUF_KINDS, fitting
from tawny.packed.install import ends_of
from tawny.pruning.prepare import Job, check_widths
from tawny.solvers.block_grid import grid_of, rounded
from tawny.solvers.grid import Grid

_ENDS = ("q8_0", "q6_k", "q5_k", "q4_k", "q3_k")  # each is a rounding of the largest matrix, and a forward


def kinds_named(text: str | None, known: Sequence[str], what: str) -> tuple[str, ...]:
    """Those kinds that a person restricts a fit to, in their order; all where `text` is None.

    Args:
        what: they are, for a person.

    Raises:
        RecipeError: there is no such kind.
    """
    if text is None:
        return tuple(known)
    named = [name.strip().lower() for name in text.split(",")]
    for name in named:
        if name not in known:
            raise RecipeError(f"--kinds names {name!r}{nearest(name, known)}; {what} are {', '.join(known)}")
    return tuple(name for name in known if name in named)


def fit_widths(job: Job) -> None:
    """Refuse a model of which no GGUF file can be fitted."""
    check_widths(
        [x for group in job.by_block for x in group], "fit it to another target, such as --to packed"
    )


@final
class GGUFSize(Sizes):
    """Bytes of the file that a fit writes, by what its linears and its ends become. Nothing is removed: no reader skips zeros.

    Args:
        template: the whole model, matched with the job's checkpoint.
        kinds: types that linears may get.

    Raises:
        RecipeError: a width that no type takes.
    """

    sparsities = (0.0,)

    def __init__(self, job: Job, template: Template, kinds: tuple[str, ...]) -> None:
        fit_widths(job)
        model = job.stack.model
        outside, inside, tied = ends_of(model)
        self.template, self.kinds, self.together = template, kinds, template.alike
        widths = {model.get_submodule(end).weight.shape[1] for end in (outside, inside) if end}
        self._measured_ends = (
            tuple(dict.fromkeys(fitting(name, min(widths)) for name in _ENDS)) if widths else ()
        )
        # Of types that no end is measured in, such as Q4_0, the ends are free.
        self.ends = tuple(name for name in self._measured_ends if name in kinds) or self._measured_ends
        self.head, self.tied = outside, inside if tied else None
        self.embedding = None if tied else inside
        self._head = f"{inside if tied else outside}.weight"
        self._table = f"{inside}.weight"
        self.head_numel = model.get_parameter(self._head).numel() if outside else 0
        self.embedding_numel = model.get_parameter(self._table).numel() if self.embedding else 0
        self.rest = float(template.rest)
        self._known: dict[tuple[str, str], int] = {}

    @property
    def every(self) -> tuple[str, ...]:
        return tuple(GGUF_KINDS)

    @property
    def every_end(self) -> tuple[str, ...]:
        return self._measured_ends

    def grid(self, kind: str, width: int) -> Grid:
        return grid_of(fitting(kind, width))

    def rounded_end(self, W_OI: Tensor, kind: str, name: str) -> Tensor:
        return rounded(W_OI, kind)[0]

    def linear(
        self, info: LinearInfo, level: Level, group: int | None = None, measures: Measures = UNMEASURED
    ) -> int:
        return self._size(info.name, fitting(level.kind, info.shape[1]))

    def of_head(self, kind: str | None) -> int:
        return self._size(self._head, kind) if self.head else 0

    def of_embedding(self, kind: str | None) -> int:
        return self._size(self._table, kind) if self.embedding else 0

    def _size(self, name: str, kind: str | None) -> int:
        """Bytes of a matrix in a type; without one as the template has it."""
        type = GGUF_KINDS[kind].type if kind else str(self.template.kind_of(name))
        known = self._known.get((name, type))
        if known is None:
            known = self._known[name, type] = self.template.size_of(name, type)
        return known
