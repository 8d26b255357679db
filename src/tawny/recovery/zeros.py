"""Keep the zeros of a pruned model zero, whatever trains it.

    with tawny.keep_sparsity(model):
        trainer.train()                  # Trainer, TRL, accelerate, PEFT or a loop of your own

What this file promises: the weights that are zero when the `with` begins are zero when it ends, and after every step of
any `torch.optim` optimiser in between, exactly. Two things see to that. Gradients of zeros are zeroed as they are
accumulated, so that they enter neither a norm that is clipped nor momentum, second moments or row statistics. And after each
optimiser step the zeros are written again, because momentum from before, weight decay with a target, noise or an
orthogonalised update (Muon) would still move them. No parameter is replaced or wrapped: whatever holds a reference to
one (an optimiser, accelerate, a saved checkpoint) sees plain weights.

A zero that was changed between two steps was changed by something else than an optimiser. It is put back too, and told.

The product of a LoRA adapter is masked in the forward (adapters.py), so that what is trained is what `merge_adapter` writes.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from tawny.errors import ModelError
from tawny.model.structure import adapters
from tawny.recovery.adapters import mask_adapter


@dataclass(eq=False)
class _Held:
    """The zeros of one weight; looked up by owner and attribute, since loaders may replace the parameter."""

    name: str
    owner: nn.Module
    attribute: str
    pruned: Tensor

    @property
    def parameter(self) -> nn.Parameter:
        value: nn.Parameter = getattr(self.owner, self.attribute)
        return value

    def mask(self, value: Tensor) -> Tensor:
        """The mask on the device of `value`."""
        if value.shape != self.pruned.shape:
            raise ModelError(
                f"{self.name}.{self.attribute} had shape {tuple(self.pruned.shape)} when its zeros were taken and now has "
                f"{tuple(value.shape)}: enter keep_sparsity after the model has its final layout (sharded weights are "
                "not supported)"
            )
        if self.pruned.device != value.device:
            self.pruned = self.pruned.to(value.device)
        return self.pruned


def _weights(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Weights that pruning may have touched: linears and fused experts inside the stacks, but nothing of an adapter."""
    foreign = {id(part) for layer in adapters(model) for part in layer.modules()}
    for layer in adapters(model):
        foreign -= {id(part) for part in layer.get_base_layer().modules()}
    stacks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, module in model.named_modules():
        if id(module) in foreign or (stacks and not name.startswith(tuple(stacks))):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            yield name, module, "weight", module.weight
        else:
            for attribute, value in module.named_parameters(recurse=False):
                if value.dim() == 3 and min(value.shape) > 1:
                    yield name, module, attribute, value


def _zeros(model: nn.Module) -> list[_Held]:
    held = []
    for name, owner, attribute, value in _weights(model):
        if value.is_meta:
            raise ModelError(
                f"{name}.{attribute} is on the meta device; load the weights before keep_sparsity"
            )
        if isinstance(value, DTensor):
            raise ModelError(
                f"{name}.{attribute} is sharded over processes; expected whole weights: give the model before it is sharded"
            )
        pruned = value.detach() == 0
        if bool(pruned.any()):
            held.append(_Held(name, owner, attribute, pruned))
    return held


class SparsityGuard:
    """What `keep_sparsity` yields.

    Attributes:
        zeros: how many weights are held at zero.
        changed: linears whose zeros something else than an optimiser changed, and how many of them; all were put back.
    """

    def __init__(self, model: nn.Module, strict: bool = False) -> None:
        self.strict = strict
        self.changed: dict[str, int] = {}
        self._held = _zeros(model)
        if not self._held:
            raise ModelError(
                f"{type(model).__name__} holds no zero in any linear, so there is no sparsity to keep: prune it first "
                "(tawny prune), or load the pruned weights before keep_sparsity"
            )
        self.zeros = sum(int(held.pruned.sum()) for held in self._held)
        self._undo: list[Callable[[], None]] = []
        self._install(model)

    def _install(self, model: nn.Module) -> None:
        # Global hooks see optimisers made later, and those that accelerate or a gradient scaler wraps. Like the model's they
        # hold the guard and its masks weakly: a trainer that died without saying so leaves nothing behind.
        me = weakref.ref(self)

        def weakly(method: Callable[[SparsityGuard], None]) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                if (guard := me()) is not None:
                    method(guard)

            return hook

        self._undo.append(register_optimizer_step_pre_hook(weakly(SparsityGuard.check)).remove)
        self._undo.append(register_optimizer_step_post_hook(weakly(SparsityGuard.apply)).remove)
        for held in self._held:
            parameter, alive = held.parameter, weakref.ref(held)

            def mask_gradient(parameter: Tensor, alive: Callable[[], _Held | None] = alive) -> None:
                if parameter.grad is not None and (held := alive()) is not None:
                    parameter.grad.masked_fill_(held.mask(parameter.grad), 0)

            if parameter.requires_grad:
                hook: Any = parameter.register_post_accumulate_grad_hook  # torch leaves it untyped
                self._undo.append(hook(mask_gradient).remove)
        by_owner = {id(held.owner): held for held in self._held}
        for layer in adapters(model):
            base = by_owner.get(id(layer.get_base_layer()))
            if base is not None and hasattr(layer, "parameter_name"):
                self.close()
                raise ModelError(
                    f"a LoRA of {base.name!r} adds to all experts at once, and such products are not masked: name linears outside "
                    "the experts in target_modules, and no target_parameters"
                )
            if base is not None and hasattr(layer, "get_delta_weight"):
                self._undo.append(mask_adapter(layer, weakref.WeakMethod(base.mask)))

    @torch.no_grad()
    def check(self) -> None:
        """Put back zeros that were changed since the last step, and say which.

        Raises:
            ModelError: some were, and the guard is strict.
        """
        counts = [(held.parameter.detach().ne(0) & held.mask(held.parameter)).sum() for held in self._held]
        if not any(torch.stack([count.cpu() for count in counts]).tolist()):
            return
        changed = {held.name: int(count) for held, count in zip(self._held, counts, strict=True) if count}
        self.apply()
        first = next(iter(changed))
        line = (
            f"{sum(changed.values()):,} zeros of {len(changed)} linears (first {first!r}) were changed between two optimiser "
            "steps, by something else than the optimiser; they are zero again"
        )
        warned = bool(self.changed)
        for name, count in changed.items():
            self.changed[name] = self.changed.get(name, 0) + count
        if self.strict:
            raise ModelError(line)
        if not warned:
            warnings.warn(line, stacklevel=3)

    @torch.no_grad()
    def apply(self) -> None:
        """Write the zeros."""
        for held in self._held:
            held.parameter.masked_fill_(held.mask(held.parameter), 0)

    def close(self) -> None:
        """Write the zeros a last time and let go of the model."""
        while self._undo:
            self._undo.pop()()
        self.check()
        self.apply()


@contextmanager
def keep_sparsity(model: nn.Module, *, strict: bool = False) -> Iterator[SparsityGuard]:
    """Keep the zeros of a model's linears zero under any training inside the `with`.

    Args:
        model: a pruned model, bare, wrapped by peft, or prepared by accelerate; its layout is final.
        strict: raise if code other than an optimiser changes a zero, instead of warning once.

    Raises:
        ModelError: the model has no zeros, or its weights are sharded; or, if strict, something tried to change them.
    """
    guard = SparsityGuard(model, strict)
    try:
        yield guard
    except BaseException:
        guard.strict = False  # the first failure is the one to hear about
        guard.close()
        raise
    guard.close()


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """`keep_sparsity` for a `transformers.Trainer` and its children: `Trainer(..., callbacks=[SparsityCallback()])`."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.guard: SparsityGuard | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.guard = SparsityGuard(kwargs["model"], self.strict)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.guard is not None:
            self.guard.close()


@torch.no_grad()
def merge_adapter(model: Any) -> Any:
    """Merge peft adapters into a pruned model without filling its zeros; returns the plain model.

    An adapter trained under `keep_sparsity` gives exactly the model that was trained. One trained without it learnt with
    the help of weights that are cut off here: measure the result.

    Raises:
        ModelError: there is no adapter, or no zero to keep.
    """
    layers = adapters(model)
    if not layers or not hasattr(model, "merge_and_unload"):
        raise ModelError(f"{type(model).__name__} carries no peft adapter to merge; expected a PeftModel")
    held = _zeros(model)
    if not held:
        raise ModelError("the model under the adapter holds no zeros: use peft's own merge_and_unload()")
    merged = model.merge_and_unload()
    for one in held:
        one.parameter.masked_fill_(one.mask(one.parameter), 0)
    return merged
