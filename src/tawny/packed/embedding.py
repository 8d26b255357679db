"""The embedding lookup of a tied, packed head: rows unpacked from the head's own storage.

A tied model holds one matrix for head and embedding. Once the head is packed there is no dense matrix left to look
rows up in, so the embedding module unpacks the rows it is asked for: bit for bit those of `PackedLinear.dense`.

The module keeps its own class (some scale or offset what they look up) with the lookup below put under it, and keeps
an empty `weight` of the model's type, which says what type rows come out in and follows `model.to(dtype)`.
"""

from __future__ import annotations

__all__ = ["PackedEmbedding", "gather_rows", "serve_from"]

from typing import Any

import torch
from torch import Tensor, nn

from tawny.kernels import native, ops, reference
from tawny.packed.linear import _TENSORS, PackedLinear


def gather_rows(
    ids: Tensor,
    masks: Tensor,
    values: Tensor,
    offsets: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows `ids` of a packed weight [rows, cols] → [*ids.shape, cols]."""
    wanted, back = torch.unique(ids.reshape(-1), return_inverse=True)
    if wanted.numel() and not 0 <= int(wanted[0]) <= int(wanted[-1]) < rows:
        raise IndexError(
            f"token ids {int(wanted[0])} to {int(wanted[-1])} where 0 to {rows - 1} are embedded"
        )
    native_ = native.chosen() and masks.device.type == "cpu" and dtype in ops.KINDS
    packed = ops._as_packed(masks, values, offsets, scales, sums, rows, cols)
    weight = ops._weight(masks, values, offsets, scales, sums, rows, cols)
    found = torch.empty(wanted.numel(), cols, dtype=dtype, device=masks.device)
    four = torch.empty(4, cols, dtype=dtype, device=masks.device)
    before = -1
    for place, row in enumerate(wanted.tolist()):
        group = row // 4
        if group != before:
            before = group
            if native_:
                code = native.library().tawny_expand(
                    *weight, group, group + 1, four.data_ptr(), ops.KINDS[dtype], cols, 1
                )
                native.raise_for(code, f"reading row {row} of a packed embedding ({rows}, {cols})")
            else:
                four = reference.expand(packed, dtype, group, group + 1)
        found[place] = four[row % 4]
    return found[back].view(*ids.shape, cols)


_PACKED = "Tensor masks, Tensor values, Tensor offsets, Tensor? scales, Tensor? sums"
torch.library.define(
    "tawny::gather_rows", f"(Tensor ids, {_PACKED}, int rows, int cols, ScalarType dtype) -> Tensor"
)
torch.library.impl("tawny::gather_rows", "default", gather_rows)


def _gather_fake(ids: Tensor, masks: Tensor, *rest: Any) -> Tensor:
    return masks.new_empty((*ids.shape, rest[-2]), dtype=rest[-1])


torch.library.register_fake("tawny::gather_rows", _gather_fake)


class PackedEmbedding(nn.Embedding):
    """An embedding without a matrix of its own; see `serve_from`."""

    head: PackedLinear
    looked_up: type[nn.Embedding] = nn.Embedding  # the class the lookup was put under

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Classes made at run time are in no module, so pickle cannot find them by name.
        return _unmade, (self.looked_up,), self.__dict__.copy()

    def forward(self, input: Tensor) -> Tensor:
        head = self.__dict__["head"]
        tensors = (getattr(head, name) for name in _TENSORS)
        found: Tensor = torch.ops.tawny.gather_rows(
            input, *tensors, head.out_features, head.in_features, self.weight.dtype
        )
        return found

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, served from the packed head"


_made: dict[type[nn.Embedding], type[nn.Embedding]] = {nn.Embedding: PackedEmbedding}


def _over_lookup(kind: type[nn.Embedding]) -> type[nn.Embedding]:
    if kind not in _made:
        own = {"__module__": kind.__module__, "looked_up": kind}
        _made[kind] = type(f"Packed{kind.__name__}", (kind, PackedEmbedding), own)
    return _made[kind]


def _unmade(kind: type[nn.Embedding]) -> nn.Embedding:
    """An object without state, for pickle to fill."""
    made = _over_lookup(kind)
    return made.__new__(made)


def serve_from(embedding: nn.Embedding, head: PackedLinear, dtype: torch.dtype) -> None:
    """Drop the embedding's matrix, in place; rows come from `head` from now on."""
    device = head.masks.device
    embedding.__class__ = _over_lookup(type(embedding))
    # Beside the modules, not among them: the head is in the model already, and once is enough in a state dict.
    embedding.__dict__["head"] = head
    del embedding.weight
    empty = torch.empty(0, embedding.embedding_dim, dtype=dtype, device=device)
    embedding.register_buffer("weight", empty, persistent=False)
    # It only matters to gradients, and transformers would zero that row of the empty weight.
    embedding.padding_idx = None
