"""A model's own forward with stand-ins for its blocks: what each block is called with, and what becomes of its output.

The stand-ins record all arguments and pass the hidden states on. So whatever a model hands to each of its blocks (masks,
rotary embeddings) is replayed exactly, block by block. The same trick gives what lies around the blocks:

- The tail: the last stand-in returns streamed hidden states, and the model's own norm and head follow.
- The step between two stacks (patch merging, downsampling): the last stand-in of one returns streamed hidden states, and the
  first of the next records what it is given.

What is assumed is proven once for a model: its blocks run in order, once each, and depend on nothing else of those before them. Of
several stacks each depends on the last hidden states of the one before alone: others may be noise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tawny.errors import ModelError
from tawny.model.structure import TOKENS, BlockList, head_of

# Token ids, or tensors by the names that the model's forward gives them.
Inputs = Tensor | Mapping[str, Tensor]


def _is_of_shapes(error: RuntimeError) -> bool:
    """Whether torch refuses to compute with tensors of these shapes."""
    return any(
        words in str(error)
        for words in ("normalized_shape", "size of tensor", "shapes cannot", "is invalid for input")
    )


class _Stop(Exception):
    """Ends a forward whose remaining result nobody uses."""


class _Misfit(Exception):
    """A forward fails after stand-ins that give something else than blocks do."""


class _Other:
    """What a stand-in gives beside the hidden states: nothing can compute with it, and it is recognised."""


# A block may return hidden states (0), or a tuple of so many items that begins with them.
_ITEMS = (0, 1, 2, 3)
# How a model fails that is given too few or too many.
_ITEMS_MISFIT = (ValueError, TypeError, IndexError, AttributeError, _Misfit)


@dataclass(frozen=True)
class Layout:
    """How a model holds hidden states that are maps; here they are `[batch, positions, width]`.

    Attributes:
        grid: positions in each direction.
        last: the width is the last dimension, not the second.
    """

    grid: tuple[int, ...]
    last: bool

    @classmethod
    def of(cls, hidden: Tensor, widths: frozenset[int]) -> Layout | None:
        """None where they are not maps; the second dimension is tried first, as convolutions have it."""
        if hidden.dim() < 4:
            return None
        last = hidden.shape[1] not in widths and hidden.shape[-1] in widths
        return cls(tuple(hidden.shape[1:-1] if last else hidden.shape[2:]), last)

    def flat(self, hidden: Tensor) -> Tensor:
        return (hidden if self.last else hidden.movedim(1, -1)).flatten(1, -2).contiguous()

    def whole(self, hidden_BTH: Tensor) -> Tensor:
        grid = hidden_BTH.reshape(len(hidden_BTH), *self.grid, hidden_BTH.shape[-1])
        return grid if self.last else grid.movedim(-1, 1)


@dataclass
class Call:
    """What a model hands to one block beside the hidden states.

    Attributes:
        shape: of the hidden states, `[batch, positions, width]`.
        layout: how the block takes and gives them, where they are maps.
        onward: of the last block of a stack, what another stack receives from its output.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shape: torch.Size = field(default_factory=torch.Size)
    layout: Layout | None = None
    onward: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.values = (*self.args, *self.kwargs.values())
        # Into these a block may put something for later ones.
        self.empty = [v for v in self.values if isinstance(v, (MutableMapping, MutableSequence)) and not v]


# The number of a block, the hidden states it is given, and the rest.
_Seen = tuple[int, Tensor, Call]
_Makes = Callable[[Tensor], Tensor]


def _itself(hidden: Tensor) -> Tensor:
    return hidden


class Replay:
    """Runs a model's own forward with stand-ins for its blocks.

    Args:
        ready: called before the model's own forward runs.

    Attributes:
        items: how many items a block returns; 0 stands for hidden states alone.
        shapes: of the hidden states in front of each block, `[batch, positions, width]`, of what was captured last.
    """

    def __init__(
        self,
        model: Any,
        blocks: BlockList,
        compute: torch.dtype,
        device: torch.device,
        ready: Callable[[], None],
    ) -> None:
        self.model, self.blocks, self.compute, self.device = model, blocks, compute, device
        self._ready = ready
        self.items = 0
        self.shapes: list[torch.Size] = []
        self._checked = False
        self._tails: set[type] = set()
        self._calls: dict[tuple[object, ...], list[Call]] = {}
        self._calls_depend_on_data: bool | None = None

    # --- what blocks are called with ---------------------------------------------------------------------------

    def begin(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """What the first block receives, and every call, which is kept where all inputs of one shape share it."""
        hidden, calls = self._capture(inputs)
        if len(inputs) == 1 and not self._depends_on_data(inputs, calls):
            self._calls.setdefault(_shapes(inputs), calls)
        return hidden, calls

    def calls(self, inputs: Mapping[str, Tensor]) -> list[Call]:
        """What each block is called with for these inputs."""
        return self._calls.get(_shapes(inputs)) or self.begin(inputs)[1]

    def keeps(self, inputs: Mapping[str, Tensor]) -> bool:
        """Whether the calls of all inputs of this shape are known, without the model's own forward."""
        self.calls(inputs)
        return _shapes(inputs) in self._calls

    @torch.no_grad()
    def _capture(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        for items in sorted(_ITEMS, key=lambda items: items != self.items):
            self.items = items
            seen: list[_Seen] = []
            try:
                self._pass_through(inputs, seen, len(self.blocks))
            except _ITEMS_MISFIT:
                if not seen:
                    raise
                continue
            if self._in_order(seen):
                states = [self._described(inputs, *each) for each in seen]
                if not self._checked:
                    self._check(inputs, seen)
                self.shapes = [call.shape for _, _, call in seen]
                return states[0], [call for _, _, call in seen]
        raise self.several()

    def _pass_through(
        self, inputs: Mapping[str, Tensor], seen: list[_Seen], most: int, makes: _Makes = _itself
    ) -> None:
        """Run the model with stand-ins for its blocks, up to the call after which there are `most`, or to its head."""
        firsts: dict[int, torch.Size] = {}

        def record(index: int, hidden: Tensor, call: Call) -> object:
            seen.append((index, hidden, call))
            if len(seen) == most or not isinstance(hidden, Tensor):
                raise _Stop
            if hidden.shape != firsts.setdefault(self.blocks.stack_of(index), hidden.shape):
                raise _Stop
            return self._output(makes(hidden), _Other())

        def stop(*_: object) -> None:
            raise _Stop

        head = head_of(self.model)
        stopping = contextlib.nullcontext() if head is None else head.register_forward_pre_hook(stop)
        try:
            with stopping, self._stand_ins(record), contextlib.suppress(_Stop):
                self._call_model(inputs)
        except RuntimeError as error:
            if not seen or not _is_of_shapes(error):
                raise
            raise _Misfit from error

    def _in_order(self, seen: list[_Seen]) -> bool:
        """Whether all blocks ran in order, and each was given what entered its stack."""
        if [index for index, _, _ in seen] != list(range(len(self.blocks))):
            return False
        firsts = [seen[self.blocks.starts[self.blocks.stack_of(index)]][1] for index, _, _ in seen]
        return all(_same(hidden, first) for (_, hidden, _), first in zip(seen, firsts, strict=True))

    def _described(self, inputs: Mapping[str, Tensor], index: int, hidden: Tensor, call: Call) -> Tensor:
        """The hidden states `[batch, positions, width]`; the call is told how they lie and what follows."""
        call.layout = Layout.of(hidden, self.blocks.widths[self.blocks.stack_of(index)])
        states = hidden if call.layout is None else call.layout.flat(hidden)
        call.shape = states.shape
        if self.blocks.ends_stack(index):
            call.onward = partial(self.onward, index, inputs)
        return states

    def _depends_on_data(self, inputs: Mapping[str, Tensor], calls: list[Call]) -> bool:
        """Whether other numbers in the same shape give a block other arguments, or another step after it."""
        if self._calls_depend_on_data is None:
            words = int(getattr(self.model.config.get_text_config(), "vocab_size", 0))
            other = {k: 1 - v if v.is_floating_point() else (v + 1) % words for k, v in inputs.items()}
            _, again = self._capture(other)
            pairs = list(zip(calls, again, strict=True))
            self._calls_depend_on_data = not all(
                _same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in pairs
            ) or not all(self._steps_alike(a, b) for a, b in pairs)
        return self._calls_depend_on_data

    @torch.no_grad()
    def _steps_alike(self, a: Call, b: Call) -> bool:
        if a.onward is None or b.onward is None:
            return True
        hidden = self._noise()(torch.empty(a.shape, dtype=self.compute, device=self.device))
        return _same(a.onward(hidden), b.onward(hidden))

    # --- what is proven once -----------------------------------------------------------------------------------

    def _check(self, inputs: Mapping[str, Tensor], seen: list[_Seen]) -> None:
        """Refuse a model whose blocks do not make it up, once: they run again, or hand each other more.

        Raises:
            ModelError: says what blocks do that cannot be replayed one at a time.
        """
        name, (_, hidden, first) = type(self.model).__name__, seen[0]
        shape = next(iter(inputs.values())).shape
        visits: list[_Seen] = []
        few = {TOKENS: inputs[TOKENS][:1, :8]} if TOKENS in inputs else {k: v[:1] for k, v in inputs.items()}
        try:
            self._pass_through(few, visits, 2 * len(self.blocks))
        except _ITEMS_MISFIT as error:
            raise self.hand_more() from error
        if len(visits) > len(self.blocks):
            raise ModelError(
                f"the blocks {self.blocks.path} of {name} run more than once a forward; expected a model whose blocks run one "
                "after another"
            )
        if len(first.shape) != 3 or (
            first.shape[:2] != shape if TOKENS in inputs else len(hidden) != shape[0]
        ):
            raise ModelError(
                f"blocks of {name} pass on hidden states of shape {list(hidden.shape)} for {' and '.join(inputs)} of shape "
                f"{list(shape)}; expected [batch, {'tokens' if TOKENS in inputs else 'positions'}, hidden]"
            )
        if any(isinstance(value, _Other) for _, _, call in seen for value in call.values):
            raise self.hand_more()
        if len(self.blocks.starts) > 1:
            self._check_steps(few, visits)
        self._checked = True

    def _check_steps(self, inputs: Mapping[str, Tensor], seen: list[_Seen]) -> None:
        """Refuse stacks that see more of those before them than the last hidden states.

        Raises:
            ModelError: noise in the place of other hidden states makes a difference.
        """
        noise = self._noise()
        again: list[_Seen] = []
        self._pass_through(inputs, again, 2 * len(self.blocks), noise)
        alike = len(seen) == len(again) and all(
            _same(a.args, b.args) and _same(a.kwargs, b.kwargs)
            for (_, _, a), (_, _, b) in zip(seen, again, strict=True)
        )
        for index in range(len(self.blocks)):
            if alike and self.blocks.ends_stack(index):
                states = noise(self._described(inputs, *seen[index]))
                steps = [self.onward(index, inputs, states, makes) for makes in (_itself, noise)]
                alike = _same(*steps)
        if not alike:
            raise ModelError(
                f"a stack of {type(self.model).__name__} depends on more than the last hidden states of the one before it; "
                "expected stacks that run one after another"
            )

    def _noise(self) -> _Makes:
        """Gives random numbers in the place of hidden states."""
        random = torch.Generator().manual_seed(0)
        return lambda hidden: torch.randn(hidden.shape, generator=random).to(hidden)

    def several(self) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} does not pass hidden states straight from block to block; expected a model whose "
            "blocks run one after another, or whose stacks of blocks do"
        )

    def hand_more(self) -> ModelError:
        return ModelError(
            f"blocks of {type(self.model).__name__} hand each other more than hidden states; expected a model whose "
            "blocks depend on nothing else of those before them"
        )

    # --- what becomes of hidden states -------------------------------------------------------------------------

    def onward(
        self, index: int, inputs: Mapping[str, Tensor], hidden_BTH: Tensor, makes: _Makes = _itself
    ) -> Tensor:
        """What the stack after block `index` receives, `[batch, positions, width]`, if that block gives `hidden_BTH`.

        Args:
            makes: what the blocks before it give of what they are given.
        """
        received: list[Tensor] = []

        def step(number: int, hidden: Tensor, call: Call) -> object:
            if number > index:
                received.append(self._described(inputs, number, hidden, call))
                raise _Stop
            return self._output(
                self._as_given(number, hidden, hidden_BTH) if number == index else makes(hidden)
            )

        with self._stand_ins(step), contextlib.suppress(_Stop):
            self._call_model(inputs)
        return received[0]

    def output(self, inputs: Mapping[str, Tensor], hidden_BTH: Tensor, part: Any = None) -> Any:
        """What the model gives, or a part of it that holds all blocks, from the last block's output.

        Raises:
            ModelError: what it gives depends on earlier stacks, too.
        """
        if not self._checked:  # of an earlier walk: nothing has told yet how many items a block returns
            self._capture(inputs)
        kind = type(self.model if part is None else part)
        if len(self.blocks.starts) > 1 and kind not in self._tails:
            few, row_1TH = {k: v[:1] for k, v in inputs.items()}, hidden_BTH[:1]
            tails = [self._tail(few, row_1TH, part, makes)[0] for makes in (_itself, self._noise())]
            if not _same(*tails):
                raise ModelError(
                    f"what {kind.__name__} gives depends on more than its last block, so it cannot be compared; expected a "
                    "model whose head reads the last stack"
                )
            self._tails.add(kind)
        return self._tail(inputs, hidden_BTH, part, _itself)

    def _tail(self, inputs: Mapping[str, Tensor], hidden_BTH: Tensor, part: Any, makes: _Makes) -> Any:
        last = len(self.blocks) - 1

        def pass_on(index: int, hidden: Tensor, _: Call) -> object:
            return self._output(self._as_given(index, hidden, hidden_BTH) if index == last else makes(hidden))

        with self._stand_ins(pass_on):
            return self._call_model(inputs, part)

    def _as_given(self, index: int, hidden: Tensor, made_BTH: Tensor) -> Tensor:
        """Hidden states as block `index` gives them, which was given `hidden`."""
        layout = Layout.of(hidden, self.blocks.widths[self.blocks.stack_of(index)])
        return made_BTH if layout is None else layout.whole(made_BTH)

    # --- the model's own forward -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Tensor, Call], object]) -> Iterator[None]:
        """Inside, `stand_in(index, hidden states, the rest)` is called instead of a block."""

        from transformers import Cache

        def forward(index: int, /, *args: Any, **kwargs: Any) -> object:
            # Some models have no argument for it and keep one all the same, which would grow with every call of a block.
            kwargs = {key: None if isinstance(value, Cache) else value for key, value in kwargs.items()}
            rest = tuple(None if isinstance(value, Cache) else value for value in args[1:])
            if args:
                return stand_in(index, args[0], Call(rest, kwargs))
            return stand_in(index, kwargs.pop("hidden_states"), Call(rest, kwargs))

        # Hooks of a block have nothing to do where it does not run.
        blocks: list[Any] = list(self.blocks.modules)
        hooks = [(block._forward_pre_hooks, block._forward_hooks) for block in blocks]
        own = [vars(block).get("forward") for block in blocks]  # where somebody has put another in its place
        for index, block in enumerate(blocks):
            block.forward = partial(forward, index)
            block._forward_pre_hooks, block._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for block, (before, after), plain in zip(blocks, hooks, own, strict=True):
                del block.forward
                if plain is not None:
                    block.forward = plain
                # transformers hooks blocks once, in the first forward that asks for hidden states, which may be this one.
                before.update(block._forward_pre_hooks)
                after.update(block._forward_hooks)
                block._forward_pre_hooks, block._forward_hooks = before, after

    def _output(self, hidden: Tensor, other: _Other | None = None) -> object:
        """What a block returns that makes `hidden`; `other` stands for all that it may return beside."""
        return (hidden, *[other] * (self.items - 1)) if self.items else hidden

    def _call_model(self, inputs: Mapping[str, Tensor], model: Any = None) -> Any:
        """The model's own forward, or that of a part of it, without a cache."""
        self._ready()
        model = self.model if model is None else model
        parts = [model, getattr(model, "base_model", model)]
        caching = any("use_cache" in inspect.signature(part.forward).parameters for part in parts)
        placed = {name: self._placed(value) for name, value in inputs.items()}
        return model(**placed, **({"use_cache": False} if caching else {}))

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.compute if value.is_floating_point() else None)


def named(inputs: Inputs) -> Mapping[str, Tensor]:
    return inputs if isinstance(inputs, Mapping) else {TOKENS: inputs}


def _shapes(inputs: Mapping[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, tuple(value.shape)) for name, value in inputs.items())


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return True  # flags, caches that are None, objects that carry no numbers of these tokens
