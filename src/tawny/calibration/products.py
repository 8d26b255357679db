"""Detect matrix products that use a fused expert parameter, even through a view of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tawny.model.linears import Linear

# Which axes of its second factor a product takes as inputs and outputs.
_PRODUCTS: dict[Any, tuple[int, int]] = {
    nn.functional.linear: (-1, -2),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), (-2, -1)),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), (-2, -1)),
}


def first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a linear is called with."""
    argument: Tensor = args[0] if args else next(iter(kwargs.values()))
    return argument


@dataclass(frozen=True)
class Fused:
    """A parameter that holds experts, as `[experts, out, in]` or transposed."""

    key: str
    parameter: Tensor
    transposed: bool

    @classmethod
    def of(cls, linears: Sequence[Linear]) -> list[Fused]:
        """The parameters that hold the experts among some linears, each once."""
        experts = {x.key: x for x in linears if x.expert is not None}
        return [cls(key, getattr(x.module, x.parameter), x.transposed) for key, x in experts.items()]

    def first(self, w: Tensor, inputs: int, outputs: int) -> int | None:
        """The first expert in `w`, which has its inputs and outputs on these axes; None if it is not one or all of these.

        A view is known by its memory, whatever made it. Strides tell a square matrix from its transpose, whose inputs
        are not those that are pruned.
        """
        if w.dim() not in (2, 3):
            return None
        P, own = self.parameter, (1, 2) if self.transposed else (2, 1)
        axes = [(inputs, own[0]), (outputs, own[1]), *([(0, 0)] if w.dim() == 3 else [])]
        if not all(w.shape[i] == P.shape[j] and w.stride(i) == P.stride(j) for i, j in axes):
            return None
        first, rest = divmod(w.data_ptr() - P.data_ptr(), P.stride(0) * P.element_size())
        return first if rest == 0 and 0 <= first < len(P) else None


class ExpertProducts(TorchFunctionMode):
    """Reports products with the fused parameters it is given, factor and product: of rows with one expert, and which tokens
    those were gathered from last, or of all experts at once with rows for each."""

    def __init__(
        self,
        fused: Sequence[Fused],
        one: Callable[[str, int, Tensor, Tensor, Tensor | None], None],
        every: Callable[[str, Tensor, Tensor], None],
    ) -> None:
        super().__init__()
        self._fused = fused
        self._one, self._every = one, every
        self._gathered: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1:
            self._look(args[0], args[1], product, *_PRODUCTS[func])
        elif (
            func is Tensor.__getitem__
            and isinstance(index := args[1], Tensor)
            and (args[0].dim(), index.dim(), index.dtype) == (2, 1, torch.int64)
        ):
            self._gathered = index
        return product

    def _look(self, x: Tensor, w: Tensor, product: Tensor, inputs: int, outputs: int) -> None:
        for fused in self._fused:
            expert = fused.first(w, inputs, outputs)
            if expert is not None and w.dim() == 2:
                self._one(fused.key, expert, x, product, self._gathered)
            elif expert is not None and x.dim() == 3 and len(x) == len(w):
                self._every(fused.key, x, product)
