"""What a module shows of itself: where its blocks are, whether they share weights, and the mode it is in.

The stack is the `nn.ModuleList` of same-class modules that holds most linear weights; nothing is known by name.
Where each of these modules holds a list of blocks itself, and no width is common to all of the lists, the model has several
stacks, one after the other (Swin, ConvNeXt). Experts are such lists too, but all of them take the width of the model.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from tawny.errors import ModelError
from tawny.model.linears import linears_of, products_of, prunable_numel

# What a model's forward calls its token ids and their mask, and pictures.
TOKENS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"


@dataclass(frozen=True)
class BlockList:
    """The blocks of a model, in the order they lie in it.

    Attributes:
        path: module path of the list that holds them all.
        names: module path of each.
        starts: number of the first block of each stack; most models have one stack.
        widths: for each stack, what the width of its hidden states may be, by the shapes of its linears.
    """

    path: str
    names: Sequence[str]
    modules: Sequence[nn.Module]
    starts: Sequence[int]
    widths: Sequence[frozenset[int]]

    def __len__(self) -> int:
        return len(self.names)

    def stack_of(self, index: int) -> int:
        """The number of the stack that block `index` belongs to."""
        return sum(start <= index for start in self.starts) - 1

    def ends_stack(self, index: int) -> bool:
        """Whether another stack follows block `index`."""
        return index + 1 in self.starts

    def hold(self, name: str) -> bool:
        """Whether a module or parameter lies in a block."""
        return name.startswith(tuple(f"{block}." for block in self.names))


def find_blocks(model: nn.Module) -> BlockList:
    """The blocks of `model`, of one stack or several.

    Raises:
        ModelError: as `find_stack` does.
    """
    path, outer = find_stack(model)
    stacks = _stacks_in(outer) or {"": outer}
    names = [
        ".".join(filter(None, (path, inner, str(index))))
        for inner, blocks in stacks.items()
        for index in range(len(blocks))
    ]
    lengths = [len(blocks) for blocks in stacks.values()]
    return BlockList(
        path,
        names,
        [block for blocks in stacks.values() for block in blocks],
        [sum(lengths[:number]) for number in range(len(lengths))],
        [_widths(blocks) for blocks in stacks.values()],
    )


def _stacks_in(outer: nn.ModuleList) -> dict[str, nn.ModuleList] | None:
    """The lists of blocks that the members of a list hold, by path below it; None where they are not stacks."""
    stacks: dict[str, nn.ModuleList] = {}
    tails: set[str] = set()
    for number, member in enumerate(outer):
        lists = [(prunable_numel(held), tail, held) for tail, held in _lists(member)]
        size, tail, held = max(lists, key=lambda each: each[0], default=(0, "", outer))
        if size <= prunable_numel(member) / 2:
            return None
        tails.add(tail)
        stacks[".".join(filter(None, (str(number), tail)))] = held
    kinds = {type(block) for held in stacks.values() for block in held}
    widths = [_widths(held) for held in stacks.values()]
    apart = all(widths) and not frozenset.intersection(*widths)
    return stacks if apart and len(tails) == len(kinds) == 1 else None


def _lists(module: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    for path, held in module.named_modules():
        if isinstance(held, nn.ModuleList) and len(held) and len({type(block) for block in held}) == 1:
            yield path, held


def _widths(blocks: nn.ModuleList) -> frozenset[int]:
    """Numbers that are the inputs or the outputs of more than half of the linears."""
    shapes = [set(shape) for block in blocks for shape in products_of(block)]
    counts = Counter(size for shape in shapes for size in shape)
    return frozenset(size for size, count in counts.items() if count > len(shapes) / 2)


def adapters(model: nn.Module) -> list[Any]:
    """peft's layers inside a model; none if peft was never imported."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    return [m for m in model.modules() if isinstance(m, peft.BaseTunerLayer)] if peft else []


def staying_dense(model: nn.Module, blocks: BlockList) -> list[str]:
    """One line that names what is not pruned in a model of several stacks: convolutions, and linears between the stacks.

    Empty for a model of one stack, whose other weights are embeddings, norms and heads.
    """
    if len(blocks.starts) == 1:
        return []
    stay = Counter(
        re.sub(r"\.\d+(?=\.|$)", ".*", name)
        for name, module in model.named_modules()
        if isinstance(module, _ConvNd)
        or (isinstance(module, nn.Linear) and name.startswith(blocks.path + ".") and not blocks.hold(name))
    )
    named = ", ".join(name if count == 1 else f"{name} ({count})" for name, count in stay.items())
    return [f"convolutions and linears between the stacks stay dense: {named}"] if stay else []


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the blocks of `model`.

    Raises:
        ModelError: no list of same-class modules with linear weights exists.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in _lists(model):
        size = sum(prunable_numel(block) for block in module)
        if size and (best is None or size > best[0]):
            best = (size, path, module)
    if best is None:
        raise ModelError(
            f"{type(model).__name__} holds no list of blocks with linear weights; expected a transformer whose blocks are all "
            "of one class"
        )
    size, path, blocks = best
    base, head = getattr(model, "base_model", model), head_of(model)
    everywhere = prunable_numel(base) - (prunable_numel(head) if base is model and head is not None else 0)
    if size < everywhere / 2:
        raise ModelError(
            f"{path}, the largest list of blocks of {type(model).__name__}, holds {size:,} of its {everywhere:,} linear "
            "weights; expected a transformer that is one stack of blocks of one class"
        )
    return path, blocks


def head_of(model: nn.Module) -> nn.Module | None:
    """The head, where the model says which it is."""
    ask = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = ask() if ask is not None else None
    return head


def input_of(model: nn.Module) -> str:
    """What the model's forward calls its main input: `input_ids`, `pixel_values`, `input_features`, …"""
    from transformers import PreTrainedModel

    return str(model.main_input_name) if isinstance(model, PreTrainedModel) else TOKENS


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model says which token comes next; a class that transformers does not know is taken to."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return True
    return input_of(model) == TOKENS and bool(model.can_generate())


def pixels_for(model: nn.Module, count: int) -> dict[str, Tensor]:
    """Random pixels `[count, channels, height, width]` as the model's configuration says that it takes them.

    Raises:
        ModelError: the model takes something else, or does not say in which size.
    """
    config, name = getattr(model, "config", None), input_of(model)
    size = getattr(config, "image_size", None)
    if name != PIXELS or size is None:
        raise ModelError(
            f"{type(model).__name__} takes {name} in a shape that is not known here; only models that take tokens, or pixels whose "
            "image_size their configuration says, can be probed"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (count, int(getattr(config, "num_channels", 3)), height, width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {name: noise.to(next(model.parameters()).dtype)}


def check_unshared(model: nn.Module) -> None:
    """Refuse blocks that share weights: pruned for one block's inputs, they would not be what was measured in another.

    Raises:
        ModelError: names two places that hold the same parameter.
    """
    blocks = find_blocks(model)
    owners: dict[int, tuple[int, str]] = {}
    held: dict[tuple[int, int | None], str] = {}
    for index, (path, block) in enumerate(zip(blocks.names, blocks.modules, strict=True)):
        for name, parameter in block.named_parameters(prefix=path, remove_duplicate=False):
            owner, first = owners.setdefault(id(parameter), (index, name))
            if owner != index:
                raise _shared(first, name)
        for linear in linears_of(block, path):
            place = (id(getattr(linear.module, linear.parameter)), linear.expert)
            if held.setdefault(place, linear.key) != linear.key:
                raise _shared(held[place], linear.key)


def _shared(first: str, second: str) -> ModelError:
    return ModelError(
        f"{first} and {second} are one parameter; expected blocks with weights of their own: give each its own "
        "(copy.deepcopy) first"
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, so that no dropout makes what is computed random; afterwards each in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def plain_head(model: Any) -> Iterator[None]:
    """The head of a model that writes takes the states of its last tokens as they would be alone.

    Of several prompts they lie apart in memory, and torch then copies the head's weight for each: 1.8 GB for 32 prompts of SmolLM2-135M.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    joining = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        joining.remove()
