"""What a module shows of itself: where its blocks are, whether they share weights, and the mode it is in.

The stack is the `nn.ModuleList` of same-class modules that holds most linear weights; nothing is known by name.
"""

from __future__ import annotations

__all__ = [
    "check_unshared",
    "evaluating",
    "find_stack",
    "head_of",
    "input_of",
    "pixels_for",
    "predicts_tokens",
]

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tawny.errors import ModelError
from tawny.model.linears import linears_of, prunable_numel


def find_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Module path and list of the blocks of `model`.

    Raises:
        ModelError: no list of same-class modules with linear weights exists.
    """
    best: tuple[int, str, nn.ModuleList] | None = None
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and len({type(block) for block in module}) == 1:
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

    return str(model.main_input_name) if isinstance(model, PreTrainedModel) else "input_ids"


def predicts_tokens(model: nn.Module) -> bool:
    """Whether the model says which token comes next; a class that transformers does not know is taken to."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not type(model).__module__.startswith("transformers."):
        return True
    return input_of(model) == "input_ids" and bool(model.can_generate())


def pixels_for(model: nn.Module, count: int) -> dict[str, Tensor]:
    """Random pixels `[count, channels, height, width]` as the model's configuration says that it takes them.

    Raises:
        ModelError: the model takes something else, or does not say in which size.
    """
    config, name = getattr(model, "config", None), input_of(model)
    size = getattr(config, "image_size", None)
    if name != "pixel_values" or size is None:
        raise ModelError(
            f"{type(model).__name__} takes {name} in a shape that is not known here; only models that take tokens, or pixels whose "
            "image_size their configuration says, can be probed"
        )
    height, width = (size, size) if isinstance(size, int) else size
    shape = (count, int(getattr(config, "num_channels", 3)), height, width)
    made = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return {name: made.to(next(model.parameters()).dtype)}


def check_unshared(model: nn.Module) -> None:
    """Refuse blocks that share weights: pruned for one block's inputs, they would not be what was measured in another.

    Raises:
        ModelError: names two places that hold the same parameter.
    """
    path, blocks = find_stack(model)
    owners: dict[int, tuple[int, str]] = {}
    held: dict[tuple[int, int | None], str] = {}
    for index, block in enumerate(blocks):
        for name, parameter in block.named_parameters(prefix=f"{path}.{index}", remove_duplicate=False):
            owner, first = owners.setdefault(id(parameter), (index, name))
            if owner != index:
                raise _shared(first, name)
        for linear in linears_of(block, f"{path}.{index}"):
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
