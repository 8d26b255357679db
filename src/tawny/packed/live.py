"""Pack the linears of a live transformers model, in place.

Blocks and linears are found by structure, as pruning finds them. A linear whose zeros are too few to pay stays dense
and decodes through our dense kernel. Fused experts are packed one by one, all of a parameter or none (experts.py).
A linear that does more than multiply stays as it is: one with hooks, or of a class with a forward of its own.
Embedding and head stay dense unless `head` is given; if they are tied, one packed matrix serves both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tawny.errors import ModelError, NumericalError, UserError
from tawny.model.linears import Linear, is_plain, linears_of
from tawny.model.structure import find_blocks, staying_dense
from tawny.packed.choice import PackingKinds, experts_by_parameter, pack_end, tell
from tawny.packed.experts import PackedExperts
from tawny.packed.format import PackedTensor
from tawny.packed.install import (
    check_ends,
    ends_of,
    install_experts,
    install_head,
    install_linear,
    install_table,
    keep_dense,
    table_of,
)
from tawny.packed.linear import DenseLinear, PackedLinear
from tawny.progress import Progress, silent


@torch.no_grad()
def pack_model(
    model: Any,
    values: str = "bf16",
    group: int | None = None,
    head: str | None = None,
    embedding: str | None = None,
    *,
    progress: Progress = silent,
) -> Any:
    """Replace the linears of a model's blocks by packed ones, one at a time, in place.

    Packed experts are run by Tawny: `config._experts_implementation` becomes "tawny".

    Args:
        model: a transformers decoder or encoder with its weights in memory.
        values: kind of the survivors, such as bf16 or int8; `tawny pack --help` lists them.
        group: columns that share a scale, of integers; None is the kind's usual number.
        head: kind of values to pack the head in too, whatever its zeros (int8 is what saves bytes).
        embedding: kind of an embedding that shares no weight with the head; None is that of the head.
        progress: told what stays dense, and why.

    Returns:
        The model itself.

    Raises:
        ModelError: no blocks, weights on the meta device, or a model that is packed already.
        UserError: unknown values or group, no linear head to pack, or no embedding of its own.
        NumericalError: a weight is not finite, or too large for the kind.
    """
    choice = PackingKinds(values, group, head, embedding)
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ModelError(f"parameter {meta!r} of the model is on the meta device; load its weights first")
    if any(isinstance(module, (PackedLinear, DenseLinear)) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is packed already; expected a dense model: load it again and pack it once, with "
            "values and head together"
        )
    blocks = find_blocks(model)
    check_ends(model, head, embedding)
    _check_head(model, head)
    work = _LivePacking(model, choice)
    progress.phase("packing", len(blocks))
    try:
        for name, block in zip(blocks.names, blocks.modules, strict=True):
            work.block(linears_of(block, name))
            progress.step(name)
        work.ends()
    except BaseException as error:
        if work.packed:
            _keep_from_saving(model, choice)
            if isinstance(error, NumericalError):
                raise NumericalError(
                    f"{error}; {work.packed} linears of the model are packed already: load it anew first"
                ) from error
        raise
    _keep_from_saving(model, choice)
    tell(progress, work.packed, work.dense, len(work.untouched))
    for line in staying_dense(model, blocks):
        progress.say(line)
    return model


def _check_head(model: Any, values: str | None) -> None:
    """Refuse to pack a head that is none, or no linear."""
    head = model.get_output_embeddings()
    if head is None and ends_of(model)[1] is not None:
        return
    if values is not None and not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear head to pack; leave head out")
    if values is not None and not is_plain(head):
        raise UserError(
            f"the head of {type(model).__name__}, a {type(head).__name__}, does more than multiply by its weight and "
            "cannot be packed; leave head out"
        )


class _LivePacking:
    """One model on its way, and how many of its linears went which way."""

    def __init__(self, model: Any, choice: PackingKinds) -> None:
        self.model, self.choice = model, choice
        self.packed = self.dense = 0
        self.untouched: set[str] = set()

    def block(self, linears: list[Linear]) -> None:
        for linear in linears:
            if linear.expert is not None:
                continue
            if not is_plain(linear.module):
                self.untouched.add(linear.key)
                continue
            weight = linear.view(getattr(linear.module, linear.parameter).data)
            packed, _ = self.choice.pack_linear(weight, linear.name)
            if packed is None:
                keep_dense(self.model, linear.name)
                self.dense += 1
            else:
                install_linear(self.model, linear.name, _over(linear.module, linear.dtype, packed))
                self.packed += 1
        for key, experts in experts_by_parameter(linears).items():
            self._experts(key, experts)

    def _experts(self, key: str, experts: list[Linear]) -> None:
        fused = getattr(experts[0].module, experts[0].parameter).data
        sparsities, together = self.choice.sparsities(fused, experts)
        if not self.choice.pays(together):
            self.dense += len(experts)
            return
        each = [self.choice.pack_expert(fused, x, own) for x, own in zip(experts, sparsities, strict=True)]
        install_experts(self.model, key, PackedExperts(each, experts[0].transposed, fused.dtype))
        self.packed += len(experts)

    def ends(self) -> None:
        outside, inside, tied = ends_of(self.model)
        if inside is not None and not tied and self.choice.table is not None:
            embedding = self.model.get_submodule(inside)
            if isinstance(embedding, nn.Embedding):
                packed = pack_end(embedding.weight.data, self.choice.table, table_of(inside))
                install_table(self.model, inside, PackedLinear(packed, None, embedding.weight.dtype))
        if outside is None:
            return
        if self.choice.head is None:
            keep_dense(self.model, outside)
        else:
            head = self.model.get_submodule(outside)
            packed = pack_end(head.weight.data, self.choice.head, outside)
            install_head(
                self.model, outside, inside if tied else None, _over(head, head.weight.dtype, packed)
            )


def _over(old: nn.Module, dtype: torch.dtype, packed: PackedTensor) -> PackedLinear:
    """A packed linear with the bias of the dense one."""
    bias: nn.Parameter | None = getattr(old, "bias", None)
    return PackedLinear(packed, None if bias is None else bias.detach(), dtype)


def _keep_from_saving(model: Any, choice: PackingKinds) -> None:
    """Make `save_pretrained` refuse: its file would open elsewhere with random weights."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from tawny.packed.quantizer import TawnyConfig, TawnyQuantizer

        config = TawnyConfig(**choice.told)
        model.hf_quantizer = TawnyQuantizer(config, pre_quantized=True)
