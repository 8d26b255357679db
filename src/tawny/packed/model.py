"""Pack the linears of a live transformers model, in place.

Blocks and linears are found by structure, as pruning finds them. A linear whose zeros are too few to pay stays dense
and decodes through our dense kernel. Fused experts are packed one by one, all of a parameter or none (experts.py).
A linear that does more than multiply stays as it is: one with hooks, or of a class with a forward of its own.
Embedding and head stay dense unless `head` is given; a tied embedding is then served from the packed head's storage.
"""

from __future__ import annotations

__all__ = ["LinearForm", "pack_model"]

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from tawny.errors import ModelError, NumericalError, UserError
from tawny.model.linears import Linear, is_plain, linears_of
from tawny.model.structure import find_stack
from tawny.packed import format
from tawny.packed.embedding import serve_from
from tawny.packed.experts import PackedExperts, install_experts
from tawny.packed.format import PackedTensor, Values
from tawny.packed.linear import DenseLinear, PackedLinear, worth_packing
from tawny.progress import Progress, silent


@dataclass(frozen=True)
class LinearForm:
    """What became of one weight: `form` is "packed" or "dense", and `why` says why it stayed dense."""

    name: str
    shape: tuple[int, int]
    sparsity: float
    form: str
    bytes: int
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_values(values: str, group: int | None, head: str | None) -> None:
    """Refuse kinds that do not exist before any work is done."""
    format._known(values, group)
    if head is not None:
        format._known(head, None)


def pack_or_not(W_OI: Tensor, values: Values, group: int | None = None) -> tuple[PackedTensor | None, float]:
    """The packed weight, or None where dense is cheaper; and its share of zeros."""
    format.check_dtype(W_OI)
    sparsity = 1.0 - int(torch.count_nonzero(W_OI)) / W_OI.numel()
    if not worth_packing(sparsity, values):
        return None, sparsity
    return format.pack(W_OI, values, group, whole=format.cheaper_whole(1 - sparsity, values)), sparsity


def experts_by_parameter(linears: Sequence[Linear]) -> dict[str, list[Linear]]:
    """The experts among `linears`, by the name of the fused parameter that holds them."""
    found: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.expert is not None:
            found.setdefault(linear.key, []).append(linear)
    return found


def sparsities_of(fused: Tensor, experts: Sequence[Linear]) -> list[float]:
    """Each expert's share of zeros."""
    format.check_dtype(fused)
    return [1.0 - int(torch.count_nonzero(fused[x.expert])) / x.numel for x in experts]


def pack_expert(
    fused: Tensor, expert: Linear, sparsity: float, values: Values, group: int | None
) -> PackedTensor:
    """One expert of a fused parameter; all are packed where their mean sparsity is worth it."""
    with format.naming(expert.name):
        return format.pack(
            expert.view(fused), values, group, whole=format.cheaper_whole(1 - sparsity, values)
        )


def pack_head(W_OI: Tensor, values: Values) -> PackedTensor:
    """A head is packed whatever its zeros: it is asked for to save bytes, and int8 alone does."""
    format.check_dtype(W_OI)
    density = int(torch.count_nonzero(W_OI)) / W_OI.numel()
    return format.pack(W_OI, values, None, whole=format.cheaper_whole(density, values))


@torch.no_grad()
def pack_model(
    model: Any,
    values: Values = "bf16",
    group: int | None = None,
    head: Values | None = None,
    *,
    progress: Progress = silent,
) -> Any:
    """Replace the linears of a model's blocks by packed ones, one at a time, in place.

    Packed experts are run by Tawny: `config._experts_implementation` becomes "tawny".

    Args:
        model: a transformers decoder with its weights in memory.
        values: kind of the survivors: bf16, f16, f32 or int8.
        group: with int8, 128 for a scale each 128 columns; None for one a row.
        head: kind of values to pack the head in too, whatever its zeros (int8 is what saves bytes).
        progress: told what stays dense, and why.

    Returns:
        The model itself.

    Raises:
        ModelError: no blocks, weights on the meta device, or a model that is packed already.
        UserError: unknown values or group.
    """
    check_values(values, group, head)
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta is not None:
        raise ModelError(f"parameter {meta!r} of the model is on the meta device; load its weights first")
    if any(isinstance(module, (PackedLinear, DenseLinear)) for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is packed already; expected a dense model: load it again and pack it once, with "
            "values and head together"
        )
    path, blocks = find_stack(model)
    _check_head(model, head)
    dense: list[str] = []
    untouched: set[str] = set()
    packed = 0
    progress.phase("packing", len(blocks))
    try:
        for index, block in enumerate(blocks):
            linears = linears_of(block, f"{path}.{index}")
            for linear in linears:
                if linear.expert is not None:
                    continue
                if not is_plain(linear.module):
                    untouched.add(linear.key)
                    continue
                with format.naming(linear.name):
                    made, _ = pack_or_not(
                        linear.view(getattr(linear.module, linear.parameter).data), values, group
                    )
                replace_linear(model, linear, made)
                packed += made is not None
                if made is None:
                    dense.append(linear.name)
            for key, experts in experts_by_parameter(linears).items():
                fused = getattr(experts[0].module, experts[0].parameter).data
                sparsities = sparsities_of(fused, experts)
                if not worth_packing(mean(sparsities), values):
                    dense += [expert.name for expert in experts]
                    continue
                each = [
                    pack_expert(fused, x, own, values, group)
                    for x, own in zip(experts, sparsities, strict=True)
                ]
                install_experts(model, key, PackedExperts(each, experts[0].transposed, fused.dtype))
                packed += len(experts)
            progress.step(f"{path}.{index}")
        _head(model, head)
    except BaseException as error:
        if packed:
            keep_from_saving(model, values, group, head)
            if isinstance(error, NumericalError):
                raise NumericalError(
                    f"{error}; {packed} linears of the model are packed already: load it anew first"
                ) from error
        raise
    keep_from_saving(model, values, group, head)
    tell(progress, packed, len(dense), len(untouched))
    return model


def _check_head(model: Any, values: Values | None) -> None:
    """Refuse to pack a head that is none, or no linear."""
    head = model.get_output_embeddings()
    if values is not None and not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear head to pack; leave head out")
    if values is not None and not is_plain(head):
        raise UserError(
            f"the head of {type(model).__name__}, a {type(head).__name__}, does more than multiply by its weight and "
            "cannot be packed; leave head out"
        )


def tell(progress: Progress, packed: int, dense: int, untouched: int) -> None:
    progress.say(f"{packed} linears packed, {dense} left dense because their zeros are too few to pay")
    if untouched:
        progress.say(
            f"{untouched} weights stay as they are: their modules do more than multiply, or their file holds them in a "
            "layout that is not packed"
        )


def replace_linear(model: nn.Module, linear: Linear, packed: PackedTensor | None) -> None:
    """Put a packed linear, or a dense one with our kernel, where `linear` was."""
    old = linear.module
    bias: nn.Parameter | None = getattr(old, "bias", None)
    if packed is None:
        keep_dense(model, linear.name)
        return
    made = PackedLinear(packed, None if bias is None else bias.detach(), linear.dtype)
    model.set_submodule(linear.name, made.train(old.training))


def keep_dense(model: nn.Module, name: str) -> None:
    """Let a linear that stays dense decode through our kernel. Transposed storage would need a copy: it stays."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear) and is_plain(old):
        made = DenseLinear.from_linear(old)
        setattr(made, "weight", old.weight)  # noqa: B010 - the very same parameter: a tied one stays tied
        model.set_submodule(name, made.train(old.training))


def name_of(model: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, found in model.named_modules() if found is module)
    return name


def ends_of(model: Any) -> tuple[str | None, str, bool]:
    """Module path of the head (None if it has none) and of the embedding, and whether they share a weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    inside = name_of(model, embedding)
    if head is None:
        return None, inside, False
    outside = name_of(model, head)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared = (
        tied.get(f"{outside}.weight") == f"{inside}.weight"
        or tied.get(f"{inside}.weight") == f"{outside}.weight"
    )
    return outside, inside, shared or getattr(head, "weight", None) is embedding.weight


def _head(model: Any, values: Values | None) -> None:
    outside, inside, tied = ends_of(model)
    head = None if outside is None else model.get_submodule(outside)
    if values is None:
        if outside is not None:
            keep_dense(model, outside)
        return
    assert isinstance(head, nn.Linear) and outside is not None  # as checked at the beginning
    with format.naming(outside):
        packed = pack_head(head.weight.data, values)
    made = PackedLinear(packed, None if head.bias is None else head.bias.detach(), head.weight.dtype)
    install_head(model, outside, inside if tied else None, made)


def install_head(model: Any, outside: str, inside: str | None, made: PackedLinear) -> None:
    """Put a packed head in its place; `inside` names the embedding it serves too."""
    dtype = model.get_submodule(outside).weight.dtype
    model.set_submodule(outside, made.train(model.training))
    if inside is None:
        return
    serve_from(model.get_submodule(inside), made, dtype)
    # Nothing is left that could be tied by name.
    ends = {f"{outside}.weight", f"{inside}.weight"}
    for attribute in ("all_tied_weights_keys", "_tied_weights_keys"):
        keys = getattr(model, attribute, None)
        if isinstance(keys, dict):
            setattr(model, attribute, {k: v for k, v in keys.items() if not {k, v} & ends})


def keep_from_saving(model: Any, values: str, group: int | None, head: str | None) -> None:
    """Make `save_pretrained` refuse: its file would open elsewhere with random weights."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from tawny.packed.quantizer import TawnyConfig, TawnyQuantizer

        config = TawnyConfig(values=values, group=group, head=head)
        model.hf_quantizer = TawnyQuantizer(config, pre_quantized=True)
