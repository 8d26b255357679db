"""Mixtures: the experts of a block, the router that picks some of them for each token, and the block without some of them.

Nothing is known by name. Fused experts are a module whose parameters have one matrix an expert (linears.py). A forward shows what
it is called with: tokens, the experts that were picked for each, and their gates. The module that holds it makes these
with a router, a weight `[experts, hidden]` whose products are watched. Biases of one number an expert lie beside that weight.

An expert that is gone has the logit −∞, and −∞ wherever the highest are picked. That is what a router without its row computes,
so a model can be tried without experts while it still holds them. It is proven on each kind of block: no token goes to an expert
that is gone, and the experts' output is the sum of what each gives alone, times its gate.

Shapes: T = tokens, H = hidden, K = experts picked for a token, E = experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast, final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tawny.errors import ModelError, first_line
from tawny.model.couplings import probe_of
from tawny.model.linears import Linear
from tawny.model.replay import Call
from tawny.model.stack import Stack

Role = Literal["tokens", "picked", "gates"]
_CLOSE = 1e-2  # of the largest output: what rounding to bfloat16 may change
_TOP = (torch.topk, Tensor.topk)
_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten)
_PRODUCTS = (nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


@dataclass(frozen=True, eq=False)
class Mixture:
    """The experts of one block.

    Attributes:
        name: module path of the fused experts.
        experts: their module; `owner` holds it and routes tokens to them.
        linears: their matrices, each of one expert.
        count: experts; `picks` of them get each token.
        groups: runs of equally many experts, of which a router first picks some; 1 where it does not.
        least: experts that have to stay, a multiple of `groups`.
        routers: weights of the router, by their names in `owner`.
        tensors: parameters and buffers of the model, by name, whose first dimension is the experts.
        roles: what `experts` is called with, each by its place or name.
    """

    name: str
    experts: nn.Module
    owner: nn.Module
    linears: tuple[Linear, ...]
    count: int
    picks: int
    groups: int
    least: int
    routers: tuple[str, ...]
    tensors: tuple[str, ...]
    roles: tuple[tuple[int | str, Role], ...]

    def outputs(self, x_TH: Tensor, picked_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """`[T, H]`: what the experts give for tokens and gates of one's own choice. The block must be loaded."""
        given = {"tokens": x_TH, "picked": picked_TK, "gates": gates_TK}
        args = [given[role] for place, role in self.roles if isinstance(place, int)]
        kwargs = {place: given[role] for place, role in self.roles if isinstance(place, str)}
        return cast(Tensor, self.experts(*args, **kwargs))

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, picked experts and gates of a call of `experts`."""
        by_role = {role: place for place, role in self.roles}
        given = dict(_given(args, kwargs))
        return given[by_role["tokens"]], given[by_role["picked"]], given[by_role["gates"]]

    def route(self, x_TH: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
        """`[T, K]` each: the experts that are picked for tokens, and their gates, where some are gone. The block must be loaded.

        Raises:
            ModelError: `owner` does not route tokens alone.
        """
        routes: list[tuple[Tensor, Tensor]] = []

        def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            routes.append(self.given(args, kwargs)[1:])
            raise _Routed

        stopping = self.experts.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with stopping, without(self, gone), contextlib.suppress(_Routed):
                self.owner(x_TH[None])
        except (TypeError, AttributeError, RuntimeError) as error:
            raise ModelError(
                f"the router beside {self.name} does not take tokens alone ({first_line(error)}); choose --solver reap"
            ) from error
        return routes[0]

    def each(self, seen: Routed) -> Tensor:
        """`[T, K, H]`: what each picked expert gives for its token, before its gate. The block must be loaded."""
        tokens, picks = seen.picked.shape
        x_PH = seen.tokens.repeat_interleave(picks, 0)
        picked_P1 = seen.picked.reshape(-1, 1)
        return self.outputs(x_PH, picked_P1, seen.gates.new_ones(len(x_PH), 1)).view(tokens, picks, -1)


@dataclass(frozen=True)
class Routed:
    """One call of the experts: tokens `[T, H]`, the experts `[T, K]` picked for each, their gates `[T, K]`, the output `[T, H]`."""

    tokens: Tensor
    picked: Tensor
    gates: Tensor
    output: Tensor

    def at(self, rows: Tensor) -> Routed:
        """Some of its tokens."""
        return Routed(self.tokens[rows], self.picked[rows], self.gates[rows], self.output[rows])


class _Routed(Exception):
    """Ends a forward once it is known where tokens go."""


def find_mixtures(stack: Stack) -> list[Mixture | None]:
    """The mixture of each block; None of a block without experts. Blocks that are alike are looked at once.

    Raises:
        ModelError: no block has experts, or the router of some cannot be found or proven.
    """
    calls = stack.calls(probe_of(stack))
    known: dict[object, tuple[int, Mixture]] = {}
    mixtures: list[Mixture | None] = []
    for index in range(len(stack)):
        fused = [linear for linear in stack.linears(index) if linear.expert is not None]
        if not fused:
            mixtures.append(None)
            continue
        if len({id(linear.module) for linear in fused}) > 1:
            raise ModelError(
                f"{stack.name(index)} has several modules of experts; expected one in each block"
            )
        prefix = len(stack.name(index))
        alike = tuple((x.name[prefix:], x.shape) for x in fused)
        if alike not in known:
            with stack.block(index), stack.plain_experts(), torch.no_grad():
                drawn = torch.randn(calls[index].shape, generator=torch.Generator().manual_seed(0))
                hidden = drawn.to(stack.device, stack.compute)
                known[alike] = (
                    prefix,
                    _found(stack, index, fused, partial(_forward, stack, index, hidden, calls[index])),
                )
        mixtures.append(_moved(stack, index, fused, *known[alike]))
    if not known:
        raise ModelError(
            f"{type(stack.model).__name__} has no experts that a router picks from; choose another pattern than experts"
        )
    return mixtures


_Forward = Callable[[], Tensor]


def _forward(stack: Stack, index: int, hidden: Tensor, call: Call) -> Tensor:
    return stack.alone(index, hidden.clone(), call)  # a copy: some blocks change what they are given


def _moved(stack: Stack, index: int, fused: Sequence[Linear], prefix: int, mixture: Mixture) -> Mixture:
    """The same mixture in another block."""
    name = stack.name(index)
    path = name + mixture.name[prefix:]
    owner, experts = stack.model.get_submodule(path.rpartition(".")[0]), fused[0].module
    tensors = tuple(name + key[prefix:] for key in mixture.tensors)
    return replace(mixture, name=path, experts=experts, owner=owner, linears=tuple(fused), tensors=tensors)


def _found(stack: Stack, index: int, fused: Sequence[Linear], forward: _Forward) -> Mixture:
    """The mixture of a loaded block.

    Raises:
        ModelError: says what of it cannot be found.
    """
    experts, count = fused[0].module, len(getattr(fused[0].module, fused[0].parameter))
    name = fused[0].key.rpartition(".")[0]
    path = name.rpartition(".")[0]
    owner = stack.model.get_submodule(path)

    def refusal(why: str) -> ModelError:
        return ModelError(
            f"the router of {name} ({count} experts) cannot be found: {why}; choose another pattern"
        )

    every = {linear.key for linear in stack.linears(index)}
    inside = {f"{name}.{key}": value for key, value in _tensors_of(experts).items()}
    if odd := next((key for key, value in inside.items() if not value.dim() or len(value) != count), None):
        raise refusal(f"{odd} is shared by all")
    beside = {
        key: value
        for key, value in _tensors_of(owner).items()
        if value.dim() and len(value) == count and f"{path}.{key}" not in {*inside, *every}
    }
    watch = _Watch(owner, count, {key: value for key, value in beside.items() if value.dim() == 2})
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []
    noting = experts.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    with noting, watch.watching():
        forward()
    if len(calls) != 1 or not isinstance(calls[0][2], Tensor):
        raise refusal("they are not called once a forward for a tensor")
    roles = _roles(*calls[0][:2])
    if roles is None or not watch.routers:
        raise refusal("a forward shows no weight that scores them and no numbers of those that were picked")
    routers = tuple(sorted(watch.routers))
    if len(routers) > 1:  # others are linears of shared experts that are as wide as there are experts
        routers = tuple(
            key for key in routers if _decides(owner, experts, count, watch.weights, key, forward)
        )
    holders = {key.rpartition(".")[0] for key in routers}
    rows = [
        key
        for key, value in beside.items()
        if key in routers or (value.dim() == 1 and key.rpartition(".")[0] in holders)
    ]
    tensors = (*inside, *(f"{path}.{key}" for key in rows))
    picks = int(
        next(value for place, value in _given(*calls[0][:2]) if dict(roles)[place] == "picked").shape[1]
    )
    least = max(picks, watch.groups * max(watch.in_group, -(-picks // (watch.picked_groups or watch.groups))))
    mixture = Mixture(
        name, experts, owner, tuple(fused), count, picks, watch.groups, least, routers, tensors, roles
    )
    if not _holds(mixture, forward):
        raise refusal(
            "without some experts a forward still goes to them, or is not the sum of what each gives"
        )
    return mixture


def _decides(
    owner: nn.Module,
    experts: nn.Module,
    count: int,
    weights: Mapping[str, Tensor],
    key: str,
    forward: _Forward,
) -> bool:
    """Whether the products of one weight have to do with which experts are picked, or with their gates."""
    seen: list[list[Tensor]] = []
    noting = experts.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([x for _, x in _given(args, kwargs)]), with_kwargs=True
    )
    with noting:
        forward()
        with _Watch(owner, count, weights, negated=key).watching():
            forward()
    return any(not torch.equal(before, after) for before, after in zip(*seen, strict=True))


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and the buffers that files hold, by name."""
    return dict(module.state_dict(keep_vars=True))


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[int | str, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _roles(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[int | str, Role], ...] | None:
    """What each argument is: whole numbers are experts, what has their shape is gates, the rest are tokens."""
    given = _given(args, kwargs)
    if len(given) != 3 or not all(isinstance(value, Tensor) and value.dim() == 2 for _, value in given):
        return None
    whole = [value for _, value in given if not value.is_floating_point()]
    roles: list[tuple[int | str, Role]] = [
        (
            place,
            "picked"
            if not value.is_floating_point()
            else "gates"
            if value.shape == whole[0].shape
            else "tokens",
        )
        for place, value in given
        if whole
    ]
    return tuple(roles) if {role for _, role in roles} == {"tokens", "picked", "gates"} else None


def _holds(mixture: Mixture, forward: _Forward) -> bool:
    """Whether the mixture is what it was taken for: proven with all experts, and without as many as may go."""
    with routed(mixture) as seen:
        forward()
    dense = seen[0]
    summed_TH = (mixture.each(dense) * dense.gates[..., None]).sum(1)
    close = float((summed_TH - dense.output).abs().max()) <= _CLOSE * float(dense.output.abs().max())
    size = mixture.count // mixture.groups
    place_E = torch.arange(mixture.count) % size
    gone = (place_E >= mixture.least // mixture.groups).nonzero()[:, 0]
    if not close or not len(gone):
        return close
    with routed(mixture) as seen, without(mixture, gone):
        forward()
    left = seen[0]
    stayed = not bool(torch.isin(left.picked.cpu(), gone).any())
    return stayed and left.picked.shape == dense.picked.shape and bool(torch.isfinite(left.gates).all())


@contextlib.contextmanager
def routed(mixture: Mixture) -> Iterator[list[Routed]]:
    """Inside, calls of the experts are noted in the list."""
    seen: list[Routed] = []

    def note(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
        seen.append(Routed(*mixture.given(args, kwargs), output))

    with mixture.experts.register_forward_hook(note, with_kwargs=True):
        yield seen


@contextlib.contextmanager
def without(mixture: Mixture, gone: Tensor) -> Iterator[None]:
    """Inside, forwards go as if the experts of these numbers were not there. The block must be loaded."""
    tensors = _tensors_of(mixture.owner)
    watch = _Watch(mixture.owner, mixture.count, {key: tensors[key] for key in mixture.routers}, gone)
    with watch.watching():
        yield


@final
class _Watch(TorchFunctionMode):
    """Follows how a module routes, and takes some experts out where their scores are made or compared.

    Attributes:
        routers: of `weights`, the names of those that tokens were multiplied with.
        weights: those that may be a router's, by name; the products of `negated` change their sign.
        groups: into which the scores were parted; `picked_groups` of them were picked (0: none were).
        in_group: experts that were compared in each group.
    """

    def __init__(
        self,
        owner: nn.Module,
        count: int,
        weights: Mapping[str, Tensor],
        gone: Tensor | None = None,
        negated: str = "",
    ) -> None:
        super().__init__()
        self._owner, self._count, self.weights = owner, count, weights
        self._gone, self._negated, self._inside = gone, negated, False
        self.routers: set[str] = set()
        self.groups, self.picked_groups, self.in_group = 1, 0, 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        def enter(*_: Any) -> None:
            self._inside = True

        def leave(*_: Any) -> None:
            self._inside = False

        entering = self._owner.register_forward_pre_hook(enter)
        leaving = self._owner.register_forward_hook(leave, always_call=True)
        with entering, leaving, self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside:
            return func(*args, **kwargs)
        if func in _TOP:
            args = (self._compared(args[0], int(kwargs.get("k", args[1] if len(args) > 1 else 1))), *args[1:])
        result = func(*args, **kwargs)
        if func in _VIEWS and args[0].shape[-1:] == (self._count,) and self._parted(result):
            self.groups = result.shape[-2]
        if func in _PRODUCTS and result.shape[-1:] == (self._count,) and args[1].dim() == 2:
            W = args[1] if func is nn.functional.linear else args[1].T
            if (
                router := next((key for key, own in self.weights.items() if _same(own, W)), None)
            ) is not None:
                self.routers.add(router)
                return -result if router == self._negated else self._left(result)
        return result

    def _parted(self, x: Tensor) -> bool:
        return x.dim() > 2 and x.shape[-2] * x.shape[-1] == self._count

    def _compared(self, x: Tensor, most: int) -> Tensor:
        """What is compared, without what is gone."""
        if x.shape[-1] == self._count:
            return self._left(x)
        if self._parted(x):
            self.in_group = most
            return self._left(x.flatten(-2)).view(x.shape)
        if self.groups > 1 and x.shape[-1] == self.groups:
            self.picked_groups = most
        return x

    def _left(self, x: Tensor) -> Tensor:
        return x if self._gone is None else x.index_fill(-1, self._gone.to(x.device), -torch.inf)


def _same(own: Tensor, W: Tensor) -> bool:
    """Whether a factor is a weight, whatever type it was cast to."""
    return own.shape == W.shape and (own is W or torch.equal(own.detach().to(W.dtype), W.detach()))
