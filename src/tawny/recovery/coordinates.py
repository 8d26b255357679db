"""The vectors that are trained: the survivors of each pruned parameter, or the two factors of its masked LoRA.

A hook takes each gradient away as soon as it exists. Training takes 44 % less memory than plain training in bfloat16 and
reads 30 % more tokens a second (SmolLM2 at 50 %, `step` in benchmarks/results/recovery.json).

The forwards use the model's own dense parameters, in the dtype of the machine's products (bfloat16 where it has them).
The optimiser sees float32 vectors of the surviving weights alone, so a zero has no gradient, no moment and no decay. A
parameter's gradient is gathered into its vector and dropped: dense gradients never exist for more than one parameter.
After a step the vector is written back to its places. For density d a weight costs 2 + 20·d bytes (bfloat16 weight; int32
place, value, gradient and two moments) where plain float32 training takes 16: less from d = 0.7 down, and 12 at 50 %.
With values of few bits the vectors are what is rounded, and the scales are trained beside them (packed/on_grid.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import RecipeError
from tawny.kinds import trained_kind
from tawny.model.linears import Linear
from tawny.packed.on_grid import OnGrid


def _accumulate(tensor: nn.Parameter, gradient: Tensor) -> None:
    if tensor.grad is None:
        tensor.grad = gradient.to(tensor.dtype, copy=True)
    else:
        tensor.grad.add_(gradient)


class Survivors:
    """The weights of a parameter that are not zero; all of it, if `places` is None.

    Args:
        stored: the parameter as the checkpoint has it, which may be finer than the forwards' dtype.
        linears: the linears inside the parameter; needed for `values`.
        values, group: the kind that the forwards see of each linear; one that has none is trained freely. Of few bits its
            scales are trained, too; int8's follow the weights.

    Attributes:
        tensors: what is trained, by name.
        kept_bytes: of what is kept beside them.
    """

    def __init__(
        self,
        name: str,
        parameter: nn.Parameter,
        stored: Tensor,
        *,
        masked: bool,
        linears: Sequence[Linear] = (),
        values: Mapping[str, str] | None = None,
        group: int | None = None,
    ) -> None:
        self.name, self.parameter, self.linears, self.values = name, parameter, linears, values or {}
        stored = stored.detach()
        flat = stored.reshape(-1)
        self.grids: dict[str, OnGrid] = {}
        kinds = {name: trained_kind(kind) for name, kind in self.values.items()}
        few = {name: kind for name, kind in kinds.items() if kind.learns}
        for linear in linears:
            if linear.name in few and not few[linear.name].columns(linear.shape[1], group):
                raise RecipeError(
                    f"{linear.name} has {linear.shape[1]} columns, which no group of {few[linear.name].name} divides: train it without values"
                )
        if few:
            moved = stored.to(parameter.device)
            self.grids = {x.name: OnGrid(x.view(moved), few[x.name], group) for x in linears if x.name in few}
        self.places: Tensor | None = None
        # Zeros by linear where no mask is stored: they are levels from now on, and training moves them.
        self.unmasked: dict[str, int] = {}
        if masked:
            kept = stored != 0
            for linear in linears:
                if linear.name in self.grids and self.grids[linear.name].whole:
                    self.unmasked[linear.name] = self._zeros_of_a_mask(linear, moved)
                    linear.view(kept).fill_(True)
            places = torch.nonzero(kept.reshape(-1)).squeeze(1)
            if len(places) < len(flat):
                # int32 halves what places cost; only fused experts can be too large for it.
                self.places = places.to(torch.int32) if len(flat) < 2**31 else places
                flat = flat[places]
        self.vector = nn.Parameter(flat.to(parameter.device, torch.float32, copy=True))
        if self.places is not None:
            self.places = self.places.to(parameter.device)
        self.tensors = {name: self.vector}
        self.tensors |= {f"{linear}.ends": grid.ends_OS for linear, grid in self.grids.items()}
        # No scales: their decay would shrink the whole grid.
        self.decayed = [self.vector] if parameter.dim() > 1 else []
        self.kept_bytes = 0 if self.places is None else self.places.nbytes

    @torch.no_grad()
    def collect(self) -> None:
        """Add the parameter's gradient to the tensors'; whoever calls drops it."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        flat = self._gathered(gradient)
        if self.grids:
            latent, dense = self._spread(self.vector), self._spread(flat)
            for linear in self.linears:
                if linear.name not in self.grids:
                    continue
                grid, gradient_OI = self.grids[linear.name], linear.view(dense)
                made_OI, ends_OS = grid.gradients(linear.view(latent), gradient_OI)
                gradient_OI.copy_(made_OI)
                _accumulate(grid.ends_OS, ends_OS)
            flat = self._gathered(dense)
        _accumulate(self.vector, flat)

    @torch.no_grad()
    def write(self) -> None:
        """Give the parameter the value the tensors stand for."""
        if self.values:
            self.parameter.copy_(self.value())
        elif self.places is None:
            self.parameter.copy_(self.vector.view_as(self.parameter))
        else:
            self.parameter.data.view(-1).index_put_((self.places,), self.vector.to(self.parameter.dtype))

    @torch.no_grad()
    def value(self) -> Tensor:
        """That value in float32, as it is to be stored."""
        dense = self._spread(self.vector)
        if not self.values:
            return dense
        for linear in self.linears:
            W_OI, grid = linear.view(dense), self.grids.get(linear.name)
            if grid is not None:
                W_OI.copy_(grid.value(W_OI))
            elif linear.name in self.values:
                W_OI.copy_(trained_kind(self.values[linear.name]).rounded(W_OI))
        return self._spread(self._gathered(dense))  # a grid without zero gave what was removed a level

    def _zeros_of_a_mask(self, linear: Linear, stored: Tensor) -> int:
        """How many zeros a linear has that are no levels yet; of one that lies on its grid all are."""
        W_OI = linear.view(stored)
        on_grid = self.grids[linear.name].value(W_OI.float()).to(W_OI.dtype)
        return 0 if torch.equal(on_grid, W_OI) else W_OI.numel() - int(torch.count_nonzero(W_OI))

    def _gathered(self, dense: Tensor) -> Tensor:
        flat = dense.reshape(-1)
        return flat if self.places is None else flat.index_select(0, self.places)

    def _spread(self, flat: Tensor) -> Tensor:
        """A copy in the parameter's shape and float32, zero where nothing is kept."""
        if self.places is None:
            return flat.detach().to(torch.float32, copy=True).view(self.parameter.shape)
        dense = torch.zeros(self.parameter.shape, device=flat.device)
        dense.view(-1).index_put_((self.places,), flat.detach().float())
        return dense


class Factors:
    """A product of two thin factors, added to one linear's surviving weights: `W + mask ∘ (B A)`."""

    def __init__(self, linear: Linear, parameter: nn.Parameter, stored: Tensor, rank: int, seed: int) -> None:
        self.name, self.linear, self.parameter = linear.name, linear, parameter
        self.decayed: list[nn.Parameter] = []
        self.unmasked: dict[str, int] = {}
        self.base_OI = linear.view(stored.detach().to(parameter.device)).clone()
        out, columns = self.base_OI.shape
        generator = torch.Generator().manual_seed(seed)
        A_RI = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.A_RI = nn.Parameter(A_RI.to(parameter.device))
        self.B_OR = nn.Parameter(torch.zeros(out, rank, device=parameter.device))
        self.tensors = {f"{linear.name}.A": self.A_RI, f"{linear.name}.B": self.B_OR}
        self.kept_bytes = self.base_OI.nbytes

    @torch.no_grad()
    def collect(self) -> None:
        if self.parameter.grad is None:
            return
        gradient_OI = self.linear.view(self.parameter.grad).float()
        gradient_OI = gradient_OI.masked_fill(self.base_OI == 0, 0)
        _accumulate(self.A_RI, self.B_OR.T @ gradient_OI)
        _accumulate(self.B_OR, gradient_OI @ self.A_RI.T)

    @torch.no_grad()
    def write(self) -> None:
        self.linear.view(self.parameter.data).copy_(self.weight())

    @torch.no_grad()
    def weight(self) -> Tensor:
        product_OI = (self.B_OR @ self.A_RI).masked_fill(self.base_OI == 0, 0)
        return self.base_OI.float() + product_OI

    @torch.no_grad()
    def value(self) -> Tensor:
        """The linear's own part; other experts of a fused parameter have factors of their own."""
        dense = self.parameter.detach().float()
        self.linear.view(dense).copy_(self.weight())
        return dense


# One parameter of the model, seen by the optimiser as other tensors.
Coordinates = Survivors | Factors


def attach(coordinates: Sequence[Coordinates]) -> list[Any]:
    """Let every parameter's gradient go to its coordinates as soon as it exists; returns handles to remove."""
    by_parameter: dict[int, list[Coordinates]] = {}
    for one in coordinates:
        by_parameter.setdefault(id(one.parameter), []).append(one)
    handles = []
    for members in by_parameter.values():

        def move(parameter: Tensor, members: list[Coordinates] = members) -> None:
            for one in members:
                one.collect()
            parameter.grad = None

        parameter: Any = members[0].parameter
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(move))
    return handles
