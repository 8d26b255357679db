"""A transformer as a stack of blocks that are loaded, run and dropped one at a time.

Its blocks are found by structure (structure.py).
The model itself shows what each block is called with: its own forward runs with stand-ins for the blocks, which record all
arguments and pass the hidden states on. So whatever a model hands to each of its blocks (masks, rotary embeddings) is
replayed exactly, block by block.
The same trick gives the tail: the last stand-in returns streamed hidden states, and the model's own norm and head follow.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tawny.errors import CheckpointError, ModelError, first_line
from tawny.model.checkpoint import Checkpoint, Unit
from tawny.model.linears import Linear, linears_of
from tawny.model.structure import check_unshared, find_stack, head_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# What a model's forward calls its token ids and their mask.
TOKENS, MASK = "input_ids", "attention_mask"
# Token ids, or tensors by the names that the model's forward gives them.
Inputs = Tensor | Mapping[str, Tensor]


def _is_of_types(error: RuntimeError) -> bool:
    """Whether torch refuses to compute with tensors of several types."""
    return any(words in str(error) for words in ("scalar type", "same dtype"))


def _is_of_shapes(error: RuntimeError) -> bool:
    """Whether torch refuses to compute with tensors of these shapes."""
    return any(
        words in str(error)
        for words in ("normalized_shape", "size of tensor", "shapes cannot", "is invalid for input")
    )


class _Stop(Exception):
    """Ends a forward whose remaining result nobody uses."""


class _Other:
    """What a stand-in gives beside the hidden states: nothing can compute with it, and it is recognised."""


# A block may return hidden states (0), or a tuple of so many items that begins with them.
_ITEMS = (0, 1, 2, 3)
# How a model fails that is given too few or too many.
_ITEMS_MISFIT = (ValueError, TypeError, IndexError, AttributeError)


@dataclass
class Call:
    """What a model hands to one block beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __post_init__(self) -> None:
        self.values = (*self.args, *self.kwargs.values())
        # Into these a block may put something for later ones.
        self.empty = [v for v in self.values if isinstance(v, (MutableMapping, MutableSequence)) and not v]


class Stack:
    """A model, its blocks, and where their weights come from.

    Args:
        model: a transformers model; with a `checkpoint` its parameters are on meta.
        checkpoint: source of the weights, or None for a live model that is used as it is.
        compute: dtype of forwards; a live model keeps its own.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint | None, compute: torch.dtype, device: str = "cpu"
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.compute = compute
        self.device = torch.device(device)
        self.path, self.blocks = find_stack(model)
        self.stored: dict[str, Tensor] = {}
        self._late: list[Unit] = []
        self._fused = any(linear.expert is not None for i in range(len(self)) for linear in self.linears(i))
        self._items = 0
        self._checked = False
        self._calls: dict[tuple[object, ...], list[Call]] = {}
        self._calls_depend_on_data: bool | None = None
        if checkpoint is not None:
            checkpoint.map_to(model)
            self._load_outside()
            model.requires_grad_(False)  # a live model stays as trainable as its owner left it

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        return f"{self.path}.{index}"

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def hidden_bytes(self) -> int:
        """Bytes of one token's hidden state."""
        return int(self.config.get_text_config().hidden_size) * self.compute.itemsize

    # --- weights -----------------------------------------------------------------------------------------------

    def _assign(self, parameters: dict[str, Tensor]) -> None:
        for key, value in parameters.items():
            path, _, leaf = key.rpartition(".")
            owner = self.model.get_submodule(path)
            if leaf in owner._parameters:
                dtype = self._dtype_of(key) if value.is_floating_point() else value.dtype
                made = nn.Parameter(value.to(self.device, dtype), requires_grad=False)
                owner._parameters[leaf] = made
            else:
                built = owner._buffers.get(leaf)  # in the dtype its model computes with
                dtype = built.dtype if built is not None and value.is_floating_point() else value.dtype
                owner._buffers[leaf] = value.to(self.device, dtype)

    def _dtype_of(self, key: str) -> torch.dtype:
        """What a parameter computes in: some, such as routers, transformers keeps in float32 whatever the rest is in."""
        plan: dict[str, torch.dtype] = self.model._get_dtype_plan(self.compute)
        kept = (dtype for glob, dtype in plan.items() if re.search(glob.replace("*", ".*"), key))
        return next(kept, self.compute)

    def _load_outside(self) -> None:
        """Embeddings and norm: everything that is in no block, and stays in memory; the head waits for `tail`."""
        assert self.checkpoint is not None
        inside = {id(unit) for i in range(len(self)) for unit in self.checkpoint.units_of(self.name(i))}
        outside = [unit for unit in self.checkpoint.units if id(unit) not in inside]
        self._late = [unit for unit in outside if unit.converter is None and unit.targets[0] == self._head()]
        for unit in outside:
            if unit not in self._late:
                self._assign(self.checkpoint.load(unit, self.model))
        if not self._late:
            self.model.tie_weights()
        apart = (self.path + ".", *(target for unit in self._late for target in unit.targets))
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith(apart):
                raise CheckpointError(
                    f"{self.checkpoint.folder} lacks weights outside the blocks, first {name!r}"
                )

    def _head(self) -> str | None:
        """Name of the head's weight where it is one of its own: nobody but `tail` needs it."""
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            return None
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        name = next((f"{n}.weight" for n, module in self.model.named_modules() if module is head), None)
        return None if name in {*tied, *tied.values()} else name

    def whole(self) -> Any:
        """The model, with all its weights in memory."""
        for index in range(len(self)):
            self.load(index)
        self.stored = {}
        self._load_late()
        return self.model

    def _load_late(self) -> None:
        while self._late and self.checkpoint is not None:
            self._assign(self.checkpoint.load(self._late.pop(), self.model))

    @property
    def late_bytes(self) -> int:
        """What `tail` will read before it computes, in memory."""
        parameters = dict(self.model.named_parameters())
        numbers: int = sum(parameters[name].numel() for unit in self._late for name in unit.targets)
        return numbers * self.compute.itemsize

    def load(self, index: int) -> nn.Module:
        """Block `index` with its weights; its tensors stay in `self.stored`, as the file has them, until `release`.

        The next block's bytes are read into the system's cache meanwhile.
        """
        if self.checkpoint is not None:
            self.stored = {}
            for unit in self.checkpoint.units_of(self.name(index)):
                self.stored.update(self.checkpoint.load(unit, self.model))
            self._assign(self.stored)
            self.checkpoint.read_ahead(self.name(index + 1))
        return self.blocks[index]

    def release(self, index: int) -> None:
        """Drop the weights of block `index`; a live model keeps them."""
        if self.checkpoint is None:
            return
        self.stored = {}
        for module in self.blocks[index].modules():
            for leaf, value in module._parameters.items():
                if value is not None:
                    module._parameters[leaf] = nn.Parameter(value.to("meta"), requires_grad=False)

    @contextlib.contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """`load`, and `release` at the end."""
        try:
            yield self.load(index)
        finally:
            self.release(index)

    def linears(self, index: int) -> list[Linear]:
        """All prunable linears of block `index` (loaded or not)."""
        return linears_of(self.blocks[index], self.name(index))

    def weight(self, linear: Linear) -> Tensor:
        """A float32 copy `[out, in]` of the weight, as stored. The block must be loaded."""
        return self.look(linear).to(torch.float32, copy=True).contiguous()

    def stored_weight(self, linear: Linear) -> Tensor:
        """A copy `[out, in]` of the weight in its own dtype. The block must be loaded."""
        return self.look(linear).clone(memory_format=torch.contiguous_format)

    def look(self, linear: Linear) -> Tensor:
        """The weight `[out, in]` as stored, on the device of the stack: to read, not to change. The block must be loaded."""
        source = self.stored[linear.key] if self.checkpoint else getattr(linear.module, linear.parameter)
        return linear.view(source.detach()).to(self.device)

    def set_weight(self, linear: Linear, weight_OI: Tensor) -> Tensor:
        """Give a linear its new weight, in the stored dtype and for forwards; returns the stored `[out, in]` view."""
        parameter = getattr(linear.module, linear.parameter)
        linear.view(parameter.data).copy_(weight_OI)
        if not self.checkpoint:
            return linear.view(parameter.data)
        stored = linear.view(self.stored[linear.key])
        stored.copy_(weight_OI)
        return stored

    def bias(self, linear: Linear) -> Tensor | None:
        """A float32 copy `[out]` of the bias beside a weight, as stored; None where there is none, and for fused experts."""
        key, held = self._bias(linear)
        if held is None:
            return None
        return (self.stored[key] if self.checkpoint else held.data).to(self.device, torch.float32, copy=True)

    def set_bias(self, linear: Linear, bias_O: Tensor) -> None:
        """Give a linear that has a bias its new one, in the stored dtype and for forwards."""
        key, held = self._bias(linear)
        assert held is not None
        held.data.copy_(bias_O)
        if self.checkpoint:
            self.stored[key].copy_(bias_O)

    def _bias(self, linear: Linear) -> tuple[str, nn.Parameter | None]:
        own = linear.module._parameters.get("bias") if linear.expert is None else None
        return f"{linear.name}.bias", own

    # --- forwards ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _stand_ins(self, stand_in: Callable[[int, Tensor, Call], object]) -> Iterator[None]:
        """Inside, `stand_in(index, hidden states, the rest)` is called instead of a block."""

        def forward(index: int, /, *args: Any, **kwargs: Any) -> object:
            hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            return stand_in(index, hidden, Call(rest, kwargs))

        # Hooks of a block, such as FSDP's that gather its weights, have nothing to do where it does not run.
        hooks = [(block._forward_pre_hooks, block._forward_hooks) for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = partial(forward, index)
            block._forward_pre_hooks, block._forward_hooks = OrderedDict(), OrderedDict()
        try:
            yield
        finally:
            for block, (before, after) in zip(self.blocks, hooks, strict=True):
                del block.forward
                block._forward_pre_hooks, block._forward_hooks = before, after

    @contextlib.contextmanager
    def _plain_experts(self) -> Iterator[None]:
        """Fused expert kernels hide which tokens an expert saw; the plain loop calls one linear an expert."""
        config = self.config.get_text_config()
        before = getattr(config, "_experts_implementation", None)
        config._experts_implementation = "eager"
        try:
            yield
        finally:
            config._experts_implementation = before

    def _output(self, hidden: Tensor, other: _Other | None = None) -> object:
        """What a block returns that makes `hidden`; `other` stands for all that it may return beside."""
        return (hidden, *[other] * (self._items - 1)) if self._items else hidden

    def _call_model(self, inputs: Mapping[str, Tensor], model: Any = None) -> Any:
        """The model's own forward, or that of a part of it, without a cache."""
        model = self.model if model is None else model
        parts = [model, getattr(model, "base_model", model)]
        caching = any("use_cache" in inspect.signature(part.forward).parameters for part in parts)
        placed = {name: self._placed(value) for name, value in inputs.items()}
        return model(**placed, **({"use_cache": False} if caching else {}))

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.compute if value.is_floating_point() else None)

    @torch.no_grad()
    def _capture(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        for items in sorted(_ITEMS, key=lambda items: items != self._items):
            self._items = items
            calls: list[Call] = []
            seen: list[Tensor] = []
            try:
                self._pass_through(inputs, calls, seen, len(self))
            except _ITEMS_MISFIT:
                if not calls:
                    raise
                continue
            if len(calls) == len(self) and all(_same(hidden, seen[0]) for hidden in seen):
                if not self._checked:
                    self._check_body(inputs, seen[0], calls)
                return seen[0], calls
        raise self._several()

    def _several(self) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} does not pass hidden states straight from block to block (as models of several "
            "stacks do, whose blocks differ in width); expected a model whose blocks run one after another"
        )

    def _pass_through(
        self, inputs: Mapping[str, Tensor], calls: list[Call], seen: list[Tensor], most: int
    ) -> None:
        """Run the model with stand-ins for its blocks, up to the call after which there are `most`, or to its head."""

        def record(index: int, hidden: Tensor, call: Call) -> object:
            calls.append(call)
            seen.append(hidden)
            if len(calls) == most or not isinstance(hidden, Tensor) or hidden.shape != seen[0].shape:
                raise _Stop
            return self._output(hidden, _Other())

        def stop(*_: object) -> None:
            raise _Stop

        head = head_of(self.model)
        hook = None if head is None else head.register_forward_pre_hook(stop)
        try:
            with self._stand_ins(record), contextlib.suppress(_Stop):
                self._call_model(inputs)
        except RuntimeError as error:
            if not calls or not _is_of_shapes(error):
                raise
            raise self._several() from error
        finally:
            if hook is not None:
                hook.remove()

    def _check_body(self, inputs: Mapping[str, Tensor], hidden: Tensor, calls: list[Call]) -> None:
        """Refuse a model whose blocks do not make it up, once: they run again, or hand each other more.

        Raises:
            ModelError: says what blocks do that cannot be replayed one at a time.
        """
        name = type(self.model).__name__
        shape = next(iter(inputs.values())).shape
        found: list[Call] = []
        few = {TOKENS: inputs[TOKENS][:1, :8]} if TOKENS in inputs else {k: v[:1] for k, v in inputs.items()}
        try:
            self._pass_through(few, found, [], 2 * len(self))
        except _ITEMS_MISFIT as error:
            raise self._hand_more() from error
        if len(found) > len(self):
            raise ModelError(
                f"the blocks {self.path} of {name} run more than once a forward; expected a model whose blocks run one "
                "after another"
            )
        if hidden.dim() != 3 or (hidden.shape[:2] != shape if TOKENS in inputs else len(hidden) != shape[0]):
            raise ModelError(
                f"blocks of {name} pass on hidden states of shape {list(hidden.shape)} for {' and '.join(inputs)} of shape "
                f"{list(shape)}; expected [batch, {'tokens' if TOKENS in inputs else 'positions'}, hidden]"
            )
        if any(isinstance(value, _Other) for call in calls for value in call.values):
            raise self._hand_more()
        self._checked = True

    def _hand_more(self) -> ModelError:
        return ModelError(
            f"blocks of {type(self.model).__name__} hand each other more than hidden states; expected a model whose "
            "blocks depend on nothing else of those before them"
        )

    def enter(self, inputs: Inputs) -> Tensor:
        """Hidden states `[batch, positions, hidden]` the first block receives."""
        return self._begin(_named(inputs))[0].clone()

    def positions(self, inputs: Mapping[str, Tensor]) -> int:
        """How many hidden states a sample makes."""
        return int(self._begin({name: value[:1] for name, value in inputs.items()})[0].shape[1])

    def calls(self, inputs: Inputs) -> list[Call]:
        """What each block is called with for these inputs."""
        named = _named(inputs)
        return self._calls.get(_shapes(named)) or self._begin(named)[1]

    def _begin(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Call]]:
        """`_capture`, whose calls are kept where all inputs of one shape share them."""
        hidden, calls = self._capture(inputs)
        if len(inputs) == 1 and not self._depends_on_data(inputs, calls):
            self._calls.setdefault(_shapes(inputs), calls)
        return hidden, calls

    def _depends_on_data(self, inputs: Mapping[str, Tensor], calls: list[Call]) -> bool:
        """Whether other numbers in the same shape give a block other arguments."""
        if self._calls_depend_on_data is None:
            words = int(getattr(self.config.get_text_config(), "vocab_size", 0))
            other = {k: 1 - v if v.is_floating_point() else (v + 1) % words for k, v in inputs.items()}
            _, again = self._capture(other)
            self._calls_depend_on_data = not all(
                _same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(calls, again, strict=True)
            )
        return self._calls_depend_on_data

    @torch.no_grad()
    def forward(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """Output of block `index`, which must be loaded.

        Raises:
            ModelError: the block asks for something that an earlier one leaves beside its output.
        """
        return self.differentiable(index, hidden_BTH, call)

    def differentiable(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """`forward`, with a graph behind it where gradients are enabled."""
        try:
            with self._plain_experts() if self._fused else contextlib.nullcontext():
                made = self.blocks[index](hidden_BTH, *call.args, **call.kwargs)
        except LookupError as error:
            if call.empty:  # it looks for what an earlier one has left
                raise self._hand_more() from error
            raise
        except RuntimeError as error:
            if self.checkpoint is None or self.compute is torch.float32 or not _is_of_types(error):
                raise
            raise ModelError(
                f"{self.name(index)} of {type(self.model).__name__} does not compute in {str(self.compute).removeprefix('torch.')} "
                f"({first_line(error)}); try -o compute=float32"
            ) from error
        for value in call.empty:
            value.clear()
        self._items = 0 if isinstance(made, Tensor) else len(made)
        output: Tensor = made[0] if self._items else made
        return output

    @torch.no_grad()
    def logits(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """`tail`, without a graph."""
        return self.tail(inputs, hidden_BTH)

    def tail(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocabulary]` from the last block's output: the model's own norm and head.

        What follows the blocks of a language model acts on each token alone, so a caller may pass any slice of tokens.
        """
        made: Tensor = self.output(inputs, hidden_BTH).logits
        return made

    def features(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """Last hidden states of the model without its head; the last block's output where it ends with something else."""
        made = self.output(inputs, hidden_BTH, self.model.base_model).get("last_hidden_state")
        states: Tensor | None = made if isinstance(made, Tensor) and made.dim() == 3 else None
        return hidden_BTH if states is None else states

    def output(self, inputs: Inputs, hidden_BTH: Tensor, part: Any = None) -> Any:
        """What the model gives, or a part of it that holds all blocks, from the last block's output."""
        self._load_late()
        # A slice of one sample's tokens keeps the stride of the whole, for which torch would copy the head's weight each time.
        hidden_BTH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).view(hidden_BTH.shape)

        def pass_on(index: int, hidden: Tensor, _: Call) -> object:
            return self._output(hidden_BTH if index == len(self) - 1 else hidden)

        with self._stand_ins(pass_on):
            return self._call_model(_named(inputs), part)


def _named(inputs: Inputs) -> Mapping[str, Tensor]:
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


def live_stack(model: nn.Module) -> Stack:
    """A live model as a stack; its weights are used and changed in place.

    Raises:
        ModelError: some of its parameters are on the meta device, it has no blocks, or blocks share weights.
    """
    meta = next((n for n, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ModelError(
            f"parameter {meta!r} of the live model is on the meta device; load its weights first"
        )
    check_unshared(model)
    parameter = next(model.parameters())
    return Stack(model, None, parameter.dtype, str(parameter.device))


def chunks_of(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `range(count)`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
