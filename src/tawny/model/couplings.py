"""Couplings: which rows of which linears and which columns of which linear must go together, so that a model shrinks.

A member of a coupling is a channel of an FFN (its rows of gate and up, its column of down) or a key-value group of attention
(the rows of its query heads, its key and its value, and their columns of the output projection). Nothing is known by name or
layout. A block runs with random outputs of its linears; the gradient from the input of one linear (the consumer) back to
these outputs says which rows (of its producers) each column depends on. Rows that belong to one member each make a coupling:
`q`, `k`, `v` apart or fused in any order. Whether a member mixes tokens tells heads from channels.

What was found is proven by a forward on the real weights: with half of the members' columns gone, their rows make no
difference to what the block gives. A norm over all heads, for example, fails here and is refused.

Shapes: G = members, R = rows of a member in one producer, C = columns of a member in the consumer, T = tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import ModelError
from tawny.model.linears import Linear
from tawny.model.replay import Call
from tawny.model.stack import Stack
from tawny.model.structure import TOKENS, input_of, pixels_for
from tawny.patterns import MemberKind

_TOKENS = 64  # a ReLU that is silent for a random token is so for all of them once in 2⁶⁴
_CLOSE = 1e-2  # of the largest output: what rounding to bfloat16 may change


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of one producer, `[G, R]` int64: a row of this index a member."""

    linear: Linear
    index_GR: Tensor


@dataclass(frozen=True, eq=False)
class Coupling:
    """Members that each can leave a block alone: rows of the producers and columns `[G, C]` of the consumer."""

    kind: MemberKind
    producers: tuple[Rows, ...]
    consumer: Linear
    columns_GC: Tensor

    @property
    def name(self) -> str:
        return self.consumer.name

    @property
    def members(self) -> int:
        return len(self.columns_GC)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return (*(rows.linear for rows in self.producers), self.consumer)


def couple(
    stack: Stack, by_block: Sequence[Sequence[Linear]], kinds: Sequence[MemberKind]
) -> list[list[Coupling]]:
    """The couplings of some kinds in every block; all their linears are among those of `by_block`.

    Raises:
        ModelError: a linear is in no coupling that can be proven, a coupling is only partly chosen, a weight is tied, or a
            kind is found nowhere. One line names it.
    """
    every = find_couplings(stack)
    name = type(stack.model).__name__
    by_kind = []
    for chosen, couplings in zip(by_block, every, strict=True):
        names = {linear.name for linear in chosen}
        coupled = {linear.name for coupling in couplings for linear in coupling.linears}
        if loose := sorted(names - coupled):
            raise ModelError(
                f"{loose[0]} of {name} is in no coupling that a forward proves, so {' and '.join(kinds)} cannot be removed "
                "around it; leave it out with -o exclude=GLOB, or choose a pattern of single weights"
            )
        wanted = [coupling for coupling in couplings if coupling.kind in kinds]
        for coupling in wanted:
            inside = [linear.name for linear in coupling.linears if linear.name in names]
            if 0 < len(inside) < len(coupling.linears):
                missing = next(x.name for x in coupling.linears if x.name not in names)
                raise ModelError(
                    f"{coupling.kind} of {coupling.name} need {missing} too, which include or exclude leaves out: choose all "
                    "linears of a coupling, or none"
                )
        by_kind.append([coupling for coupling in wanted if coupling.linears[0].name in names])
        _refuse_shared(by_kind[-1])
    for kind in kinds:
        if not any(coupling.kind == kind for couplings in by_kind for coupling in couplings):
            raise ModelError(
                f"{name} has no {kind} that a forward proves to be apart (or they are left out); choose another pattern"
            )
    _refuse_tied(
        stack, [linear for couplings in by_kind for coupling in couplings for linear in coupling.linears]
    )
    return by_kind


def probe_of(stack: Stack) -> dict[str, Tensor]:
    """Something that the model takes, to see what it does with it.

    Raises:
        ModelError: it takes neither tokens nor pixels of a known size.
    """
    return some_tokens(stack, _TOKENS) if input_of(stack.model) == TOKENS else pixels_for(stack.model, 1)


def some_tokens(stack: Stack, count: int) -> dict[str, Tensor]:
    """Token ids `[1, count]`, spread over the vocabulary."""
    vocabulary = int(stack.config.get_text_config().vocab_size)
    return {TOKENS: (torch.arange(count) * 7919 % vocabulary)[None]}


def find_couplings(stack: Stack) -> list[list[Coupling]]:
    """All couplings of each block, heads or channels, in call order.

    Blocks of the same class and linears are looked at once.
    """
    inputs = probe_of(stack)
    calls = stack.calls(inputs)
    known: dict[object, tuple[int, list[Coupling]]] = {}
    every = []
    for index in range(len(stack)):
        linears = stack.linears(index)
        prefix = len(stack.name(index))
        alike = tuple((x.name[prefix:], x.shape) for x in linears)
        if alike not in known:
            with stack.block(index):
                known[alike] = prefix, _Probe(stack, index, linears, calls[index]).couplings()
        by_tail = {x.name[prefix:]: x for x in linears}
        first, couplings = known[alike]
        every.append([_moved(coupling, first, by_tail) for coupling in couplings])
    return every


def fused(stack: Stack) -> list[tuple[str, ...]]:
    """Names of linears that runtimes multiply as one (q/k/v; gate/up): the producers of each coupling."""
    couplings = [coupling for some in find_couplings(stack) for coupling in some]
    return [tuple(rows.linear.name for rows in coupling.producers) for coupling in couplings]


def check_fused(stack: Stack, kinds: Mapping[str, str]) -> None:
    """Refuse kinds that differ among linears which runtimes multiply as one.

    Raises:
        ModelError: names two of them.
    """
    for first, *others in fused(stack):
        for other in others:
            if kinds.get(first) != kinds.get(other):
                one, two = (kinds.get(name, "no kind") for name in (first, other))
                raise ModelError(
                    f"{first} has {one} and {other} {two}: runtimes on GPUs multiply them as one, and need one kind"
                )


def _moved(coupling: Coupling, prefix: int, by_tail: Mapping[str, Linear]) -> Coupling:
    """The same coupling in another block, whose linears are known by their names without the block's own."""
    producers = tuple(Rows(by_tail[x.linear.name[prefix:]], x.index_GR) for x in coupling.producers)
    return Coupling(coupling.kind, producers, by_tail[coupling.consumer.name[prefix:]], coupling.columns_GC)


def _refuse_shared(couplings: Sequence[Coupling]) -> None:
    """Refuse a linear that would lose rows to one coupling and columns to another: each linear has one sparsity."""
    owners: dict[str, Coupling] = {}
    for coupling in couplings:
        for linear in coupling.linears:
            other = owners.setdefault(linear.name, coupling)
            if other is not coupling:
                raise ModelError(
                    f"{linear.name} belongs to the {other.kind} of {other.name} and to the {coupling.kind} of {coupling.name}: "
                    "remove one kind alone, or leave it out with -o exclude=GLOB"
                )


def _refuse_tied(stack: Stack, linears: Sequence[Linear]) -> None:
    """Refuse a linear whose weight is used outside its block too, where it has to keep its shape."""
    tied = dict(getattr(stack.model, "all_tied_weights_keys", None) or {})
    shared = {*tied, *tied.values()}
    owners: dict[int, set[str]] = {}
    for name, parameter in stack.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    shared |= {name for names in owners.values() if len(names) > 1 for name in names}
    for linear in linears:
        if linear.key in shared:
            raise ModelError(
                f"{linear.key} is tied to another weight, which would have to lose the same rows or columns; leave it out "
                "with -o exclude=GLOB"
            )


class _Probe:
    """Finds the couplings of one loaded block."""

    def __init__(self, stack: Stack, index: int, linears: Sequence[Linear], call: Call) -> None:
        self.stack, self.index, self.call = stack, index, call
        self.linears = [linear for linear in linears if linear.expert is None]
        self.experts = [linear for linear in linears if linear.expert is not None]
        self.random = torch.Generator().manual_seed(0)
        self.hidden = self._normal(*call.shape)

    def _normal(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.random)
        return drawn.to(self.stack.device, self.stack.compute)

    def couplings(self) -> list[Coupling]:
        leaves: dict[str, Tensor] = {}
        inputs: dict[str, Tensor] = {}

        def received(linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[linear.name] = args[0]

        def replaced(linear: Linear, module: nn.Module, args: Any, made: Tensor) -> Tensor:
            leaves[linear.name] = self._normal(*made.shape).requires_grad_()
            return leaves[linear.name].clone()  # some blocks change it in place

        with torch.enable_grad(), self._hooked(received, replaced):
            self._forward()
        widths = [
            self._between(linear, inputs[linear.name], leaves)
            for linear in self.linears
            if linear.name in inputs
        ]
        proven = [coupling for coupling in widths if coupling is not None and self._holds(coupling)]
        return proven + self._of_experts()

    def _forward(self) -> Tensor:
        return self.stack.alone(self.index, self.hidden, self.call)

    @contextlib.contextmanager
    def _hooked(self, received: Callable[..., Any], made: Callable[..., Any]) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for linear in self.linears:
                hooks.enter_context(linear.module.register_forward_pre_hook(partial(received, linear)))
                hooks.enter_context(linear.module.register_forward_hook(partial(made, linear)))
            yield

    def _between(self, consumer: Linear, x: Tensor, leaves: Mapping[str, Tensor]) -> Coupling | None:
        """What the columns of one linear's input depend on, if it falls apart into members."""
        if not x.requires_grad:
            return None
        width = x.shape[-1]

        def reached(columns_I: Tensor, last_token: bool = False) -> dict[str, Tensor]:
            """For each producer `[tokens, rows]` bool: whether some of the columns depend on it there."""
            cotangent = self._normal(*x.shape) * columns_I.to(x)
            if last_token:
                cotangent.view(-1, width)[:-1] = 0
            gradients = torch.autograd.grad(
                x, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True
            )
            return {
                name: (gradient != 0).reshape(-1, gradient.shape[-1])
                for name, gradient in zip(leaves, gradients, strict=True)
                if gradient is not None
            }

        def rows_of(columns_I: Tensor) -> dict[str, Tensor]:
            return {name: some.any(0) for name, some in reached(columns_I).items()}

        column = torch.arange(width)
        first = rows_of(column == 0)
        if not first:
            return None

        def shares(start: int) -> bool:
            """Whether a column from `start` on depends on a row that the first one depends on."""
            return any(bool((first[name] & some).any()) for name, some in rows_of(column >= start).items())

        # The members are equal runs of columns: the first one ends where nothing is shared any more.
        low, high = 1, width
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if shares(middle) else (low, middle)
        size = low
        members = width // size
        if members < 2 or width % size:
            return None
        member = column // size
        place = {name: torch.zeros(len(some), dtype=torch.int64) for name, some in first.items()}
        for bit in range(members.bit_length()):
            clear, given = rows_of(member >> bit & 1 == 0), rows_of(member >> bit & 1 == 1)
            for name in place:
                if bool((clear[name] == given[name]).any()):
                    return None  # a row of several members, or of none
                place[name] += given[name].cpu() << bit
        producers = []
        for linear in self.linears:
            if linear.name in place:
                counts = torch.bincount(place[linear.name], minlength=members)
                if len(counts) > members or int(counts.min()) < int(counts.max()):
                    return None
                order = place[linear.name].argsort(stable=True)
                producers.append(Rows(linear, order.view(members, -1)))
        earlier = [some[:-1].any() for some in reached(column >= 0, last_token=True).values()]
        kind: MemberKind = "heads" if any(map(bool, earlier)) else "channels"
        return Coupling(kind, tuple(producers), consumer, column.view(members, size))

    def _holds(self, coupling: Coupling) -> bool:
        """Whether the rows of members whose columns are gone make no difference to the block."""
        gone_G = torch.randperm(coupling.members, generator=self.random) < coupling.members // 2
        columns = coupling.columns_GC[gone_G].flatten()
        rows = {x.linear.name: x.index_GR[gone_G].flatten() for x in coupling.producers}

        def received(linear: Linear, module: nn.Module, args: tuple[Any, ...]) -> Any:
            if linear is coupling.consumer:
                return (args[0].index_fill(-1, columns.to(args[0].device), 0), *args[1:])
            return None

        def nothing(linear: Linear, module: nn.Module, args: Any, output: Tensor) -> None:
            return None

        def silenced(linear: Linear, module: nn.Module, args: Any, output: Tensor) -> Any:
            if linear.name in rows:
                return output.index_fill(-1, rows[linear.name].to(output.device), 0)
            return None

        with torch.no_grad():
            with self._hooked(received, nothing):
                expected = self._forward()
            with self._hooked(received, silenced):
                output = self._forward()
        apart = float((output - expected).abs().max())
        return apart <= _CLOSE * float(expected.abs().max())

    def _of_experts(self) -> list[Coupling]:
        """The channels of fused experts: how gate and up lie in one parameter is tried, and proven like the rest."""
        modules: dict[int, list[Linear]] = {}
        for linear in self.experts:
            modules.setdefault(id(linear.module), []).append(linear)
        coupled: list[Coupling] = []
        for linears in modules.values():
            by_key: dict[str, list[Linear]] = {}
            for linear in linears:
                by_key.setdefault(linear.key, []).append(linear)
            if len(by_key) != 2:
                continue
            first, second = by_key.values()
            width = second[0].shape[1]
            channel = torch.arange(width)
            layouts = {
                1: [channel[:, None]],
                2: [
                    torch.stack([channel, width + channel], 1),
                    torch.stack([2 * channel, 2 * channel + 1], 1),
                ],
            }
            for rows_GR in layouts.get(first[0].shape[0] // width, []):
                pairs = zip(first, second, strict=True)
                candidates = [
                    Coupling("channels", (Rows(a, rows_GR),), b, channel[:, None]) for a, b in pairs
                ]
                if first[0].shape[0] == rows_GR.numel() and self._experts_hold(candidates):
                    coupled += candidates
                    break
        return coupled

    def _experts_hold(self, couplings: Sequence[Coupling]) -> bool:
        """`_holds` for the experts of one module; their products are not modules, so it is their weights that change."""
        gone_G = torch.randperm(couplings[0].members, generator=self.random) < couplings[0].members // 2
        columns, rows = couplings[0].columns_GC[gone_G], couplings[0].producers[0].index_GR[gone_G]
        first, second = couplings[0].producers[0].linear, couplings[0].consumer

        def without(linear: Linear, dim: int, index: Tensor) -> Callable[[], None]:
            parameter = linear.module._parameters[linear.parameter]
            assert parameter is not None
            kept = parameter.data
            whole = kept.transpose(-1, -2) if linear.transposed else kept
            changed = whole.index_fill(dim, index.flatten().to(kept.device), 0)
            parameter.data = changed.transpose(-1, -2) if linear.transposed else changed
            return lambda: setattr(parameter, "data", kept)

        with torch.no_grad(), contextlib.ExitStack() as restored:
            dense = self._forward()
            restored.callback(without(second, -1, columns))
            expected = self._forward()
            restored.callback(without(first, -2, rows))
            output = self._forward()
        close = _CLOSE * float((expected - dense).abs().max())
        return close > 0 and float((output - expected).abs().max()) <= close
