"""The pruned model as a student: all blocks in memory, its trained parameters under coordinates, run with a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_again

from tawny.errors import ModelError
from tawny.model.linears import Linear
from tawny.model.replay import Inputs
from tawny.model.stack import Stack
from tawny.progress import Progress, silent
from tawny.recovery.coordinates import Coordinates, Survivors, attach
from tawny.recovery.methods import Covering
from tawny.recovery.settings import Recovery

# A dense model has a few zeros by chance.
LEAST_SPARSITY = 0.01
_NUMBER_BYTES = 16  # of a trained number: value, gradient and two moments


class Student:
    """A model with zeros, ready to be trained.

    Args:
        kinds: of linears that are trained through the grid of their own kind, where `settings` name none for all.
        counts: it is not trained, only counted, one block in memory at a time.

    Attributes:
        trained: numbers.
        held_bytes: of these, with gradients and moments from the first step on, and of what is kept beside them.

    Raises:
        ModelError: it has no zeros, and neither is a control, nor `smaller` than its teacher, nor brought to some sparsity or to
            values of few bits.
    """

    def __init__(
        self,
        stack: Stack,
        settings: Recovery,
        kinds: Mapping[str, str] | None = None,
        *,
        smaller: bool = False,
        counts: bool = False,
        progress: Progress = silent,
    ) -> None:
        self.smaller, self.counts, self.progress = smaller, counts, progress
        self.trained = self.held_bytes = 0
        self.stack, self.settings, self.kinds = stack, settings, kinds or {}
        self.coordinates: list[Coordinates] = []
        self._counted = 0
        self.linears: list[Linear] = []
        self.zeros: dict[str, int] = {}
        self.unmasked = 0  # zeros of pruned linears for which few bits store no mask
        self._flags = [(p, p.requires_grad) for p in stack.model.parameters()]
        self._handles: list[Any] = []
        try:
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        stack, settings = self.stack, self.settings
        stack.model.requires_grad_(False)
        for parameter in stack.model.parameters():
            parameter.grad = None  # of a loop before, which the first step would add to its own
        self.progress.phase("reading the pruned model", len(stack), "blocks")
        for index in range(len(stack)):
            stack.load(index)
            linears = stack.linears(index)
            stored = stack.stored or dict(stack.model.named_parameters())
            self.linears += linears
            self.zeros |= {
                linear.name: int((linear.view(stored[linear.key]) == 0).sum()) for linear in linears
            }
            self._cover_linears(linears, stored)
            small = stack.blocks[index].named_parameters(prefix=stack.name(index))
            self._cover_small({name: (p, stored.get(name, p)) for name, p in small})
            self._count(index)
            self.progress.step("")
        stack.stored = {}
        self._cover_small(dict(self._small_outside()))
        self._count(None)
        self.prunable = sum(linear.numel for linear in self.linears)
        few = self.sparsity < LEAST_SPARSITY
        if few and not (self.smaller or settings.control or settings.values or self.kinds):
            raise ModelError(
                f"only {self.sparsity:.2%} of the model's prunable weights are zero, so there is no sparsity to keep, and no grid "
                "of few bits to train through: prune it first (tawny prune); -o control=true trains a dense model to compare with"
            )
        self._handles = attach(self.coordinates)

    def _count(self, index: int | None) -> None:
        """Count what was covered since; `index`: of the block that it lies in."""
        for one in self.coordinates[self._counted :]:
            numbers = sum(tensor.numel() for tensor in one.tensors.values())
            self.trained += numbers
            self.held_bytes += numbers * _NUMBER_BYTES + one.kept_bytes
        if self.counts:
            self.coordinates.clear()
            if index is not None:
                self.stack.release(index)
        self._counted = len(self.coordinates)

    @property
    def sparsity(self) -> float:
        return sum(self.zeros.values()) / self.prunable

    def _cover_linears(self, linears: list[Linear], stored: Mapping[str, Tensor]) -> None:
        settings = self.settings
        wanted = {x.name: settings.values or self.kinds.get(x.name) for x in linears}
        values = {name: kind for name, kind in wanted.items() if kind is not None}
        seed = settings.seed * 100_003 + len(self.coordinates)
        of = Covering(stored, values, settings.group_size, settings.rank, seed)
        covered = settings.method.cover(linears, of)
        self.coordinates += covered
        # A few zeros are chance, as in a dense model.
        numel = {linear.name: linear.numel for linear in linears}
        self.unmasked += sum(
            count
            for one in covered
            for name, count in one.unmasked.items()
            if count >= LEAST_SPARSITY * numel[name]
        )

    def _cover_small(self, small: dict[str, tuple[nn.Parameter, Tensor]]) -> None:
        """Norms and biases: vectors, whole."""
        for name, (parameter, stored) in small.items():
            if parameter.dim() == 1:
                self.coordinates.append(Survivors(name, parameter, stored, masked=False))

    def _small_outside(self) -> Iterator[tuple[str, tuple[nn.Parameter, Tensor]]]:
        """Those after the blocks; what lies before them, such as a norm of the embedding, stays as it is."""
        stack, checkpoint = self.stack, self.stack.checkpoint
        units = {name: unit for unit in (checkpoint.units if checkpoint else ()) for name in unit.targets}
        for name, parameter in stack.model.named_parameters():
            if parameter.dim() == 1 and not stack.structure.hold(name):
                stored: Tensor = parameter
                if checkpoint is not None and name in units:
                    stored = checkpoint.load(units[name], stack.model)[name]
                yield name, (parameter, stored)

    @torch.no_grad()
    def count_zeros(self) -> dict[str, int]:
        """Zeros among the prunable weights as they are now, by linear."""
        return {
            linear.name: int((linear.view(getattr(linear.module, linear.parameter)) == 0).sum())
            for linear in self.linears
        }

    def hidden(self, inputs: Inputs) -> Tensor:
        """Output of the last block, with a graph wherever gradients are on."""
        stack = self.stack
        hidden = stack.enter(inputs)
        calls = stack.calls(inputs)
        for block, call in zip(stack.blocks, calls, strict=True):
            if self.settings.checkpointing and torch.is_grad_enabled():
                output = run_again(
                    block, hidden, *call.args, use_reentrant=False, preserve_rng_state=False, **call.kwargs
                )
            else:
                output = block(hidden, *call.args, **call.kwargs)
            hidden = output if isinstance(output, Tensor) else output[0]
        return hidden

    def close(self) -> None:
        """Leave a live model as trainable as it was."""
        for handle in self._handles:
            handle.remove()
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
