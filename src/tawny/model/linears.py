"""Which weights of a block can be pruned, and how each is read and written as `[out, in]`.

Prunable are the weights of `nn.Linear` and of transformers' transposed `Conv1D`, and fused experts
(`[experts, out, in]` parameters, or `[experts, in, out]`), expert by expert, where something scores as many.
Routers, gates and the step sizes of a state-space layer are not. A router or gate lies beside experts and gives one number
for each of them, or a single one.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from tawny.errors import ModelError


@dataclass(frozen=True, eq=False)
class Linear:
    """One prunable weight matrix.

    Attributes:
        name: module path in the whole model, without `.weight`; experts end in `.PARAMETER.INDEX`.
        key: name of the parameter that holds it.
        module: its owner.
        parameter: attribute of `module` that holds it.
        expert: index into the first dimension of a fused parameter, or None.
        transposed: the module stores `[in, out]`.
    """

    name: str
    key: str
    module: nn.Module
    parameter: str
    expert: int | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        a, b = getattr(self.module, self.parameter).shape[-2:]
        return (b, a) if self.transposed else (a, b)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        stored: torch.dtype = getattr(self.module, self.parameter).dtype
        return stored

    def view(self, parameter: Tensor) -> Tensor:
        """The `[out, in]` view of this linear inside a tensor shaped like its parameter."""
        part = parameter if self.expert is None else parameter[self.expert]
        return part.T if self.transposed else part


def _is_gate(module: nn.Module, parents: Sequence[nn.Module]) -> bool:
    """A linear that scores experts: its outputs are as many as the experts beside it, or just one."""
    if not isinstance(module, nn.Linear):
        return False
    beside = [sub for parent in parents[-2:] for sub in parent.children()]
    counts = {len(sub) for sub in beside if isinstance(sub, nn.ModuleList)}
    counts |= {shape[0] for sub in beside for shape in _stacked(sub).values()}
    return bool(counts) and module.out_features in counts | {1}


def _is_step_size(module: nn.Module, parents: Sequence[nn.Module]) -> bool:
    """A linear that makes the step sizes of a state-space layer, which multiplies by the weight itself.

    It lies beside a convolution, and turns few numbers into one for each row of a matrix that its owner holds.
    """
    if not isinstance(module, nn.Linear) or not parents or module.in_features >= module.out_features:
        return False
    held = [p for p in parents[-1].parameters(recurse=False) if p.dim() == 2]
    convolved = any(isinstance(sub, _ConvNd) for sub in parents[-1].children())
    return convolved and any(p.shape[0] == module.out_features for p in held)


def states_of(block: nn.Module) -> int:
    """Numbers of one token's state in a state-space layer that keeps one for each channel (Mamba), `inner × state`."""
    held = [
        p.numel()
        for module in block.modules()
        if any(isinstance(sub, _ConvNd) for sub in module.children())
        for p in module.parameters(recurse=False)
        if p.dim() == 2
    ]
    return max(held, default=0)


def _stacked(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters that are stacks of matrices; a convolution's is none."""
    if isinstance(module, _ConvNd):
        return {}
    return {
        name: tuple(value.shape)
        for name, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and min(value.shape) > 1
    }


def _are_scored(module: nn.Module, count: int, parents: Sequence[nn.Module]) -> bool:
    """Whether something beside a module scores that many experts; a router may score some more that are not matrices."""
    own = {id(p) for p in module.parameters(recurse=False)}
    beside = (p for parent in parents[-2:] for p in parent.parameters() if p.dim() == 2 and id(p) not in own)
    return any(count <= size <= 2 * count for p in beside for size in p.shape)


def _walk(
    module: nn.Module, name: str, parents: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    yield name, module, parents
    for child_name, child in module.named_children():
        yield from _walk(child, f"{name}.{child_name}", (*parents, module))


def linears_of(block: nn.Module, prefix: str) -> list[Linear]:
    """All prunable linears of `block`, in module order; `prefix` is the block's own module path."""
    linears: list[Linear] = []
    for name, module, parents in _walk(block, prefix, ()):
        if isinstance(module, (nn.Linear, Conv1D)):
            if not _is_gate(module, parents) and not _is_step_size(module, parents):
                transposed = isinstance(module, Conv1D)
                linears.append(Linear(name, f"{name}.weight", module, "weight", None, transposed))
            continue
        fused = {
            name: shape for name, shape in _stacked(module).items() if _are_scored(module, shape[0], parents)
        }
        transposed = _experts_transposed(module, list(fused.values()))
        linears += [
            Linear(f"{name}.{parameter}.{e}", f"{name}.{parameter}", module, parameter, e, transposed)
            for parameter, shape in fused.items()
            for e in range(shape[0])
        ]
    return linears


def _experts_transposed(module: nn.Module, shapes: Sequence[tuple[int, ...]]) -> bool:
    """Whether fused experts are stored `[experts, in, out]`: as the module says, or else by their shapes.

    The second of two parameters gives back the width that the first takes. Where both readings fit, as with experts
    without a gate, it is the common one.
    """
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    if len(shapes) != 2:
        return False
    (_, a, b), (_, c, d) = shapes
    return b != c and a == d


def changed(module: nn.Module) -> bool:
    """Whether a call of the module does more, or other things, than its class says: hooks, or a forward of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(module: nn.Module) -> bool:
    """Whether a call of a linear is x·Wᵀ + b and nothing else, so that another product may take its place.

    A class with a forward of its own is asked for the product of a random weight of the same shape.
    """
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or changed(module):
        return False
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return True
    chance = torch.Generator().manual_seed(0)
    random = {
        name: nn.Parameter(torch.randn(value.shape, generator=chance), requires_grad=False)
        for name, value in module._parameters.items()
        if value is not None
    }
    probe = copy.copy(module)
    probe._parameters = {name: random.get(name) for name in module._parameters}
    probe._buffers = {
        name: None if value is None else value.clone() for name, value in module._buffers.items()
    }
    W_OI = random["weight"].T if isinstance(module, Conv1D) else random["weight"]
    x = torch.randn(1, 3, W_OI.shape[1], generator=chance)
    with torch.no_grad(), contextlib.suppress(Exception):
        output = probe(x)
        expected = nn.functional.linear(x, W_OI, random.get("bias"))
        return output.shape == expected.shape and torch.allclose(output, expected, 1e-3, 1e-3)
    return False


def products_of(block: nn.Module) -> list[tuple[int, int]]:
    """`(out, in)` of all linears, those included that another kind of storage (packed) puts out of pruning's reach."""
    shapes = [linear.shape for linear in linears_of(block, "")]
    for module in block.modules():
        if not isinstance(module, nn.Linear) and hasattr(module, "in_features"):
            shape: Any = module
            shapes.append((int(shape.out_features), int(shape.in_features)))
    return shapes


def prunable_numel(block: nn.Module) -> int:
    """Weights in the linears of `products_of`."""
    return sum(rows * columns for rows, columns in products_of(block))


def select(linears: Sequence[Linear], include: Sequence[str], exclude: Sequence[str]) -> list[Linear]:
    """Those whose name matches any glob of `include` (all, if empty) and none of `exclude`.

    A glob matches the whole name or any dotted tail of it: `*.mlp.*`, `down_proj`, `layers.0.*`.
    """

    def matches(name: str, globs: Sequence[str]) -> bool:
        return any(fnmatchcase(name, g) or fnmatchcase(name, f"*.{g}") for g in globs)

    included = [linear for linear in linears if not include or matches(linear.name, include)]
    return [linear for linear in included if not matches(linear.name, exclude)]


def check_writable(linears: Sequence[Linear]) -> None:
    """Refuse linears of a live model whose weight a hook or a parametrisation makes.

    Raises:
        ModelError: names the first.
    """
    for linear in linears:
        if linear.parameter not in linear.module._parameters:
            raise ModelError(
                f"{linear.name}.{linear.parameter} is computed anew for each forward, so that nothing can be written into "
                "it; make it a plain parameter first (torch.nn.utils.prune.remove, remove_parametrizations), or exclude it"
            )


def check_selection(
    chosen: Sequence[Linear], every: Sequence[Linear], include: Sequence[str], exclude: Sequence[str]
) -> None:
    """Refuse globs that match nothing, or leave nothing to prune.

    Raises:
        ModelError: names the glob and one linear that exists.
    """
    example = every[0].name if every else "none"
    for kind, globs in (("include", include), ("exclude", exclude)):
        for glob in globs:
            if not select(every, [glob], []):
                raise ModelError(
                    f"{kind} pattern {glob!r} matches none of {len(every)} linears (such as {example!r})"
                )
    if not chosen:
        raise ModelError(
            f"nothing to prune: include={list(include)} exclude={list(exclude)} leaves none of {len(every)} linears"
        )
