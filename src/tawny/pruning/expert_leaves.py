"""A gradient for one expert of a fused parameter `[experts, out, in]`, while a block is refined.

The trick is `__torch_function__`: torch asks here first when a model takes `fused[e]`, and gets a leaf of its own. The gradient
of a plain slice is as large as all experts together: of 128 experts it would hold 99 % zeros (counted, not measured).
"""

from __future__ import annotations

__all__ = ["ExpertLeaves"]

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Leaf(Protocol):
    """A tensor that is trained: `expert` is the fused parameter and the place in it, or None."""

    expert: tuple[nn.Parameter, int] | None
    leaf: Tensor
    gradient: Tensor


class ExpertLeaves(TorchFunctionMode):
    """Gives `fused[e]` a leaf of its own. Where a model uses all experts at once, they share out the gradient of the whole."""

    def __init__(self, trained: Iterable[Leaf]) -> None:
        super().__init__()
        self._experts: dict[int, dict[int, Leaf]] = {}  # by id of the parameter
        self._hooks: list[Any] = []
        for entry in trained:
            if entry.expert is None:
                continue
            fused, place = entry.expert
            if id(fused) not in self._experts:
                fused.requires_grad_(True)
                self._hooks.append(fused.register_post_accumulate_grad_hook(self._share_out))  # type: ignore[no-untyped-call]
            self._experts.setdefault(id(fused), {})[place] = entry

    def _share_out(self, fused: Tensor) -> None:
        assert fused.grad is not None
        for place, entry in self._experts[id(fused)].items():
            entry.gradient += fused.grad[place]
        fused.grad = None

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and (experts := self._experts.get(id(args[0]))) is not None:
            place = args[1]
            if isinstance(place, int) or (isinstance(place, Tensor) and place.dim() == 0):
                entry = experts.get(int(place))
                return args[0].detach()[place] if entry is None else entry.leaf
        return func(*args, **(kwargs or {}))
