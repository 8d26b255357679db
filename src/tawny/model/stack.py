"""A transformer as a stack of blocks that are loaded, run and dropped one at a time.

Its blocks are found by structure (structure.py), in one stack or in several that follow each other.
The model itself shows what each block is called with and what lies around the blocks (replay.py). So a walk over the blocks
computes what the model's own forward does, with the weights of one block in memory.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tawny.errors import CheckpointError, ModelError, TextError, first_line
from tawny.model.checkpoint import Checkpoint, Unit
from tawny.model.linears import Linear, linears_of
from tawny.model.replay import Call, Inputs, Replay, named
from tawny.model.structure import check_unshared, find_blocks

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _is_of_types(error: RuntimeError) -> bool:
    """Whether torch refuses to compute with tensors of several types."""
    return any(words in str(error) for words in ("scalar type", "same dtype"))


def check_tensors(given: Mapping[str, Any]) -> None:
    """Refuse inputs that are lists or arrays, such as a processor gives that was not asked for tensors.

    Raises:
        TextError: names the first of them.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TextError(
                f"{name} is of type {type(value).__name__}; expected a torch tensor: ask a processor or tokenizer for "
                'return_tensors="pt"'
            )


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
        self.structure = find_blocks(model)
        self.blocks = self.structure.modules
        self.stored: dict[str, Tensor] = {}
        self._outside: list[Unit] = []
        self._late: list[Unit] = []
        self._forgotten = False  # what is in no block
        self._fused = any(linear.expert is not None for i in range(len(self)) for linear in self.linears(i))
        self._configs = self._configurations()
        self._replay = Replay(model, self.structure, compute, self.device, self._recall)
        if checkpoint is not None:
            checkpoint.map_to(model)
            self._move_buffers()
            inside = {id(unit) for i in range(len(self)) for unit in checkpoint.units_of(self.name(i))}
            self._outside = [unit for unit in checkpoint.units if id(unit) not in inside]
            self._untie(self._outside)
            self._load_outside()
            model.requires_grad_(False)  # a live model stays as trainable as its owner left it

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, index: int) -> str:
        return self.structure.names[index]

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    @property
    def hidden_bytes(self) -> int:
        """Bytes of hidden states for each position in front of the first block: of a token, or where stacks differ, at most."""
        shapes, said = self._replay.shapes, getattr(self.config.get_text_config(), "hidden_size", None)
        if len(self.structure.starts) == 1 and isinstance(said, int):
            width = said
        elif shapes:
            width = max(math.ceil(x[1] * x[2] / shapes[0][1]) for x in shapes)
        else:
            width = max((min(widths) for widths in self.structure.widths if widths), default=0)
        return width * self.compute.itemsize

    def positions_at(self, index: int) -> float:
        """Positions in front of block `index`, for each in front of the first; 1 as long as nothing has been run."""
        shapes = self._replay.shapes
        return shapes[index][1] / shapes[0][1] if shapes else 1.0

    def routed(self, linear: Linear) -> float:
        """Of the tokens of a block, those that reach a linear, as far as the config says: an expert gets a share."""
        each: int | None = getattr(self.config.get_text_config(), "num_experts_per_tok", None)
        if linear.expert is None or not each:
            return 1.0
        experts = len(getattr(linear.module, linear.parameter))
        return min(1.0, each / experts)

    # --- weights -----------------------------------------------------------------------------------------------

    def _move_buffers(self) -> None:
        """Those that no file has, such as tables of positions, were made on the CPU."""
        for module in self.model.modules():
            for name, value in module._buffers.items():
                if value is not None and not value.is_meta:
                    module._buffers[name] = value.to(self.device)

    def _assign(self, parameters: dict[str, Tensor]) -> None:
        for key, value in parameters.items():
            path, _, leaf = key.rpartition(".")
            owner = self.model.get_submodule(path)
            if leaf in owner._parameters:
                dtype = self._dtype_of(key) if value.is_floating_point() else value.dtype
                parameter = nn.Parameter(value.to(self.device, dtype), requires_grad=False)
                owner._parameters[leaf] = parameter
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
        """Embeddings and norm: everything that is in no block; the head waits for `tail`."""
        assert self.checkpoint is not None
        head = self._head()
        self._late = [unit for unit in self._outside if unit.converter is None and unit.targets[0] == head]
        for unit in self._outside:
            if unit not in self._late:
                self._assign(self.checkpoint.load(unit, self.model))
        if not self._late:
            self.model.tie_weights(recompute_mapping=False)  # of two that differ, none is tied
        late = {target for unit in self._late for target in unit.targets}
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not self.structure.hold(name) and name not in late:
                raise CheckpointError(
                    f"{self.checkpoint.folder} lacks weights outside the blocks, first {name!r}"
                )
        self._forgotten = False

    def walks_alone(self, inputs: Inputs) -> bool:
        """Whether blocks run without anything that is outside them, once inputs of this shape are embedded.

        They do where all are in one stack, and each is called alike for all inputs of one shape.
        """
        return len(self.structure.starts) == 1 and self._replay.keeps(named(inputs))

    def forget_outside(self) -> None:
        """Drop what is in no block, such as embeddings and head; the model's own forward reads it again.

        A live model keeps it.
        """
        if self.checkpoint is None:
            return
        inside = {id(module) for block in self.blocks for module in block.modules()}
        _drop(module for module in self.model.modules() if id(module) not in inside)
        self._forgotten = True

    def _recall(self) -> None:
        if self._forgotten:
            self._load_outside()

    def _untie(self, outside: list[Unit]) -> None:
        """Two that the configuration ties, and that are stored apart and differ, are two: so transformers has it."""
        assert self.checkpoint is not None
        units = {unit.targets[0]: unit for unit in outside if unit.converter is None}
        tied = dict(getattr(self.model, "all_tied_weights_keys", None) or {})
        for twin, name in tied.items():
            if twin in units and name in units and not self.checkpoint.same(units[twin], units[name]):
                del self.model.all_tied_weights_keys[twin]

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
        self._recall()
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
            if index + 1 < len(self):
                self.checkpoint.read_ahead(self.name(index + 1))
        return self.blocks[index]

    def release(self, index: int) -> None:
        """Drop the weights of block `index`; a live model keeps them."""
        if self.checkpoint is None:
            return
        self.stored = {}
        _drop(self.blocks[index].modules())

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
        """Give a linear its new weight, in the stored dtype; forwards see what is stored. Returns the stored `[out, in]` view."""
        shown = linear.view(getattr(linear.module, linear.parameter).data)
        if not self.checkpoint:
            return shown.copy_(weight_OI)
        stored = linear.view(self.stored[linear.key])
        shown.copy_(stored.copy_(weight_OI))
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
        held.data.copy_(self.stored[key].copy_(bias_O) if self.checkpoint else bias_O)

    def _bias(self, linear: Linear) -> tuple[str, nn.Parameter | None]:
        own = linear.module._parameters.get("bias") if linear.expert is None else None
        return f"{linear.name}.bias", own

    # --- forwards ----------------------------------------------------------------------------------------------

    def _configurations(self) -> list[Any]:
        """Those that modules ask: blocks with settings of their own have copies of the model's.

        One hands a value on to those inside it, so the outermost comes first.
        """
        from transformers import PretrainedConfig

        asked = (getattr(module, "config", None) for module in self.model.modules())
        every = (*asked, self.config.get_text_config())
        return list({id(one): one for one in every if isinstance(one, PretrainedConfig)}.values())

    @contextlib.contextmanager
    def plain_experts(self) -> Iterator[None]:
        """Fused expert kernels hide which tokens an expert saw; the plain loop calls one linear an expert."""
        before = [getattr(one, "_experts_implementation", None) for one in self._configs]
        for one in self._configs:
            one._experts_implementation = "eager"
        try:
            yield
        finally:
            for one, implementation in zip(self._configs, before, strict=True):
                one._experts_implementation = implementation

    def enter(self, inputs: Inputs) -> Tensor:
        """Hidden states `[batch, positions, hidden]` the first block receives."""
        return self._replay.begin(named(inputs))[0].clone()

    def positions(self, inputs: Mapping[str, Tensor]) -> int:
        """How many hidden states a sample makes, in front of the first block.

        Raises:
            TextError: an input is not a tensor.
        """
        check_tensors(inputs)
        return int(self._replay.begin({name: value[:1] for name, value in inputs.items()})[0].shape[1])

    def calls(self, inputs: Inputs) -> list[Call]:
        """What each block is called with for these inputs."""
        return self._replay.calls(named(inputs))

    @torch.no_grad()
    def forward(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """What block `index`, which must be loaded, gives to the next one.

        Where another stack follows, its positions and width may be others.

        Raises:
            ModelError: the block asks for something that an earlier one leaves beside its output.
        """
        return self.differentiable(index, hidden_BTH, call)

    def differentiable(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """`forward`, with a graph behind it where gradients are enabled."""
        return self.onward(self.alone(index, hidden_BTH, call), call)

    @staticmethod
    def onward(made_BTH: Tensor, call: Call) -> Tensor:
        """What the next block receives where this one, which is called so, gives `made_BTH`."""
        return made_BTH if call.onward is None else call.onward(made_BTH)

    def alone(self, index: int, hidden_BTH: Tensor, call: Call) -> Tensor:
        """Output of block `index` in the shape of its input, with a graph behind it where gradients are enabled."""
        given = hidden_BTH if call.layout is None else call.layout.whole(hidden_BTH)
        try:
            with self.plain_experts() if self._fused else contextlib.nullcontext():
                given_back = self.blocks[index](given, *call.args, **call.kwargs)
        except LookupError as error:
            if call.empty:  # it looks for what an earlier one has left
                raise self._replay.hand_more() from error
            raise
        except RuntimeError as error:
            if self.checkpoint is None or self.compute is torch.float32 or not _is_of_types(error):
                raise
            raise ModelError(
                f"{self.name(index)} of {type(self.model).__name__} does not compute in {str(self.compute).removeprefix('torch.')} "
                f"({first_line(error)}); try compute=float32"
            ) from error
        for value in call.empty:
            value.clear()
        self._replay.items = 0 if isinstance(given_back, Tensor) else len(given_back)
        output: Tensor = given_back if isinstance(given_back, Tensor) else given_back[0]
        if output.shape != given.shape:
            raise self._replay.several()
        return output if call.layout is None else call.layout.flat(output)

    @torch.no_grad()
    def logits(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """`tail`, without a graph."""
        return self.tail(inputs, hidden_BTH)

    def tail(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """Logits `[batch, tokens, vocabulary]` from the last block's output: the model's own norm and head.

        What follows the blocks of a language model acts on each token alone, so a caller may pass any slice of tokens.
        """
        logits: Tensor = self.output(inputs, hidden_BTH).logits
        return logits

    def features(self, inputs: Inputs, hidden_BTH: Tensor) -> Tensor:
        """Last hidden states of the model without its head; the last block's output where it ends with something else."""
        last = self.output(inputs, hidden_BTH, self.model.base_model).get("last_hidden_state")
        states: Tensor | None = last if isinstance(last, Tensor) and last.dim() == 3 else None
        return hidden_BTH if states is None else states

    def output(self, inputs: Inputs, hidden_BTH: Tensor, part: Any = None) -> Any:
        """What the model gives, or a part of it that holds all blocks, from the last block's output."""
        self._recall()
        self._load_late()
        # A slice of one sample's tokens keeps the stride of the whole, for which torch would copy the head's weight each time.
        hidden_BTH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1]).view(hidden_BTH.shape)
        return self._replay.output(named(inputs), hidden_BTH, part)


def _drop(modules: Iterable[nn.Module]) -> None:
    """Free the weights of modules; what several of them share stays shared."""
    dropped: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        for leaf, value in module._parameters.items():
            if value is not None:
                if value not in dropped:
                    dropped[value] = nn.Parameter(value.to("meta"), requires_grad=False)
                module._parameters[leaf] = dropped[value]


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
