"""Packed experts: in the place of a fused parameter `[experts, out, in]`, one packed weight an expert.

A model multiplies its experts itself: it hands a slice of the fused parameter to `F.linear` or `@`, or all of it to `bmm`.
`PackedExperts` stands where the parameter stood, a `PackedExpert` where the slice did, and torch asks them for the product
(`__torch_function__`). So the model's own forward goes on as it is, and reads only the survivors of those experts that
tokens were routed to. An operation that is none of these products gets the dense weight.

Most models let transformers choose how their experts are run; those run `run_experts`, which does what the model's own loop
does with less between the products of one token.
"""

from __future__ import annotations

__all__ = [
    "IMPLEMENTATION",
    "PackedExpert",
    "PackedExperts",
    "dense_experts",
    "install_experts",
    "run_experts",
]

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tawny.kernels.ops import FLOATS
from tawny.packed.format import PackedTensor
from tawny.packed.linear import PackedLinear, multiply

IMPLEMENTATION = "tawny"  # what transformers calls this way to run experts
_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_BATCHED = (torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__)


class PackedExpert(PackedLinear):
    """One expert's weight: a `PackedLinear` that can also stand for the slice of a fused parameter.

    transposed: the parameter stores `[in, out]`, so the model says `x @ W`.
    """

    transposed = False

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else None
        if isinstance(weight, PackedExpert) and isinstance(args[0], Tensor):
            if func is nn.functional.linear and not weight.transposed:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                made: Tensor = weight(args[0])
                return made if bias is None else made + bias
            if func in _MATMULS and weight.transposed:
                return weight(args[0])
        return _on_dense(func, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _asked(self, name, super().__getattr__)

    def as_stored(self) -> Tensor:
        """The dense weight as the fused parameter held it."""
        W_OI = self.dense(self.weight.dtype)
        return W_OI.T if self.transposed else W_OI


class PackedExperts(nn.Module):
    """All experts of one fused parameter; its children are called by their numbers.

    Args:
        experts: one packed weight `[out, in]` each, all of one shape.
        transposed: the parameter stored `[experts, in, out]`.
        dtype: of the parameter; what the model is told its experts are.
    """

    _is_hf_initialized = True  # initialisers of some models reach for their experts; these need nothing

    def __init__(self, experts: Sequence[PackedTensor], transposed: bool, dtype: torch.dtype) -> None:
        super().__init__()
        _register()
        for number, packed in enumerate(experts):
            expert = PackedExpert(packed, dtype=dtype)
            expert.transposed = transposed
            expert.weight._is_hf_initialized = True  # type: ignore[attr-defined]
            self.add_module(str(number), expert)

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        _register()

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[PackedExpert]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, index: Any) -> Any:
        """An expert by its number; of several at once the dense weights."""
        if isinstance(index, int) or (isinstance(index, Tensor) and index.dim() == 0):
            number = range(len(self))[int(index)]  # IndexError past the last, from the end if negative
            return self._modules[str(number)]
        return self.as_stored()[index]

    def __getattr__(self, name: str) -> Any:
        return _asked(self, name, super().__getattr__)

    @property
    def transposed(self) -> bool:
        return bool(self[0].transposed)

    @property
    def shape(self) -> torch.Size:
        """That of the fused parameter."""
        out, columns = self[0].shape
        return torch.Size((len(self), columns, out) if self.transposed else (len(self), out, columns))

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return 3

    @property
    def dtype(self) -> torch.dtype:
        made: torch.dtype = self[0].weight.dtype
        return made

    @property
    def device(self) -> torch.device:
        made: torch.device = self[0].values.device
        return made

    def as_stored(self) -> Tensor:
        """The dense fused parameter."""
        return torch.stack([expert.as_stored() for expert in self])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weights = args[1] if len(args) > 1 else None
        if func in _BATCHED and isinstance(weights, PackedExperts) and weights.transposed:
            x = args[0]
            if isinstance(x, Tensor) and x.dim() == 3 and len(x) == len(weights):
                return weights._each(x)
        return _on_dense(func, args, kwargs or {})

    def _each(self, x_ETI: Tensor) -> Tensor:
        """x[e] @ W[e] for each expert. Tokens that were not routed to it arrive as zeros, and leave as zeros unread."""
        made = []
        for expert, x_TI in zip(self, x_ETI, strict=True):
            (routed,) = torch.where((x_TI != 0).any(-1))
            y_TO = x_TI.new_zeros(len(x_TI), self.shape[2])
            made.append(y_TO.index_copy(0, routed, expert(x_TI[routed])) if len(routed) else y_TO)
        return torch.stack(made)


# What a model may do to experts before it multiplies them, and is then done to the dense ones.
_ASKED = ("T", "mT", "t", "transpose", "permute", "contiguous", "view", "reshape", "unbind", "ndim", "numel")


def _asked(stand_in: Any, name: str, otherwise: Any) -> Any:
    return getattr(stand_in.as_stored(), name) if name in _ASKED else otherwise(name)


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    def dense(value: Any) -> Any:
        return value.as_stored() if isinstance(value, (PackedExpert, PackedExperts)) else value

    return func(*tree_map(dense, args), **tree_map(dense, kwargs))


def install_experts(model: nn.Module, key: str, experts: PackedExperts) -> None:
    """Put packed experts in the place of the fused parameter `key`, and have transformers run them by `run_experts`."""
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    delattr(owner, name)
    owner.add_module(name, experts.train(owner.training))
    config: Any = getattr(owner, "config", None)
    if hasattr(config, "_experts_implementation"):
        # Of transformers' own ways only the plain loop takes one expert after the other.
        config._experts_implementation = IMPLEMENTATION if _can_run(owner) else "eager"


@contextlib.contextmanager
def dense_experts(model: nn.Module) -> Iterator[None]:
    """Inside, dense experts are run by `run_experts` where that is the quickest way.

    Our dense product is one of 16 and 32 bits on a CPU, with weights stored `[out, in]`.
    """
    before: list[tuple[Any, str | None]] = []
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        fused = [p for p in module.parameters(recurse=False) if p.dim() == 3]
        if not fused or not _can_run(module) or module.is_transposed:
            continue
        if not all(p.device.type == "cpu" and p.dtype in FLOATS for p in fused):
            continue
        theirs = getattr(config, "_experts_implementation", IMPLEMENTATION)
        if theirs != IMPLEMENTATION:
            before.append((config, theirs))
            _register()
            config._experts_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        for config, theirs in before:
            config._experts_implementation = theirs


def _can_run(module: nn.Module) -> bool:
    """Whether transformers lets others run the experts of a module, and says of it what `run_experts` must know."""
    return all(hasattr(module, f"has_{what}") for what in ("gate", "bias", "post_expert_norm")) and hasattr(
        module, "is_transposed"
    )


def run_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts of a module that `transformers.integrations.moe.use_experts_implementation` decorates, one after the other.

    Args:
        self: the module; its fused parameters are packed or dense.
        hidden_states: `[tokens, hidden]`.
        top_k_index, top_k_weights: `[tokens, k]`, which experts each token goes to, and how much each counts.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"

    def product(which: str, expert: int, x: Tensor) -> Tensor:
        weight = getattr(self, which)[expert]
        y: Tensor
        if isinstance(weight, PackedExpert):
            y = weight(x)
        else:
            y = x @ weight if self.is_transposed else multiply(x, weight)
        if self.has_bias:
            y = y + getattr(self, f"{which}_bias")[expert]
        return y

    def made(expert: int, x: Tensor) -> Tensor:
        y = product(name, expert, x)
        y = product("down_proj", expert, self._apply_gate(y) if self.has_gate else self.act_fn(y))
        normed: Tensor = self.post_expert_norm(y) if self.has_post_expert_norm else y
        return normed

    sums_TH = torch.zeros_like(hidden_states)
    if len(hidden_states) == 1:
        numbers = top_k_index[0].tolist() or [self.num_experts]
        # Past the last expert are those that stand for none.
        each = [made(e, hidden_states) if e < self.num_experts else sums_TH for e in numbers]
        weighted_KH = torch.cat(each) * top_k_weights[0, :, None]
        return weighted_KH.sum(0, keepdim=True).to(hidden_states.dtype)
    for expert in torch.unique(top_k_index).tolist():
        if expert < self.num_experts:
            token, place = torch.where(top_k_index == expert)
            y = made(expert, hidden_states[token]) * top_k_weights[token, place, None]
            sums_TH.index_add_(0, token, y.to(sums_TH.dtype))
    return sums_TH


def _register() -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)
