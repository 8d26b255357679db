"""Put packed modules into a live model, one at a time: linears, experts, the head and the embedding it serves.

live.py does it with weights in memory, quantizer.py before a folder's weights are read.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from tawny.errors import UserError
from tawny.model.linears import is_plain
from tawny.model.structure import TOKENS
from tawny.packed.embedding import serve_from
from tawny.packed.expert_loop import IMPLEMENTATION, can_run
from tawny.packed.experts import PackedExperts
from tawny.packed.linear import DenseLinear, PackedLinear


def install_linear(model: nn.Module, name: str, made: nn.Module) -> None:
    """Put `made` in the place of a linear."""
    model.set_submodule(name, made.train(model.get_submodule(name).training))


def keep_dense(model: nn.Module, name: str) -> None:
    """Let a linear that stays dense decode through our kernel. Transposed storage would need a copy: it stays."""
    old = model.get_submodule(name)
    if isinstance(old, nn.Linear) and is_plain(old):
        dense = DenseLinear.from_linear(old)
        setattr(dense, "weight", old.weight)  # noqa: B010 - the very same parameter: a tied one stays tied
        install_linear(model, name, dense)


def install_experts(model: nn.Module, key: str, experts: PackedExperts) -> None:
    """Put packed experts in the place of the fused parameter `key`, and have transformers run them by `run_experts`."""
    path, _, name = key.rpartition(".")
    owner = model.get_submodule(path)
    delattr(owner, name)
    owner.add_module(name, experts.train(owner.training))
    config: Any = getattr(owner, "config", None)
    if hasattr(config, "_experts_implementation"):
        # Of transformers' own ways only the plain loop takes one expert after the other.
        config._experts_implementation = IMPLEMENTATION if can_run(owner) else "eager"


def _name_of(model: nn.Module, module: nn.Module) -> str:
    name: str = next(name for name, submodule in model.named_modules() if submodule is module)
    return name


def ends_of(model: Any) -> tuple[str | None, str | None, bool]:
    """Module path of the head (None if it has none) and of the embedding of tokens, and whether they share a weight."""
    head, inside, embedding = model.get_output_embeddings(), None, None
    if model.main_input_name == TOKENS:
        embedding = model.get_input_embeddings()
        inside = _name_of(model, embedding)
    if head is None:
        return None, inside, False
    outside = _name_of(model, head)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    shared = inside is not None and (
        tied.get(f"{outside}.weight") == f"{inside}.weight"
        or tied.get(f"{inside}.weight") == f"{outside}.weight"
        or (embedding is not None and getattr(head, "weight", None) is embedding.weight)
    )
    return outside, inside, shared


def check_ends(model: Any, head: str | None, embedding: str | None) -> None:
    """
    Args:
        head, embedding: their kinds; None where nothing was said.

    Raises:
        UserError: an embedding is to have a kind of its own, and there is none that could.
    """
    if embedding in (None, head):
        return
    _, inside, tied = ends_of(model)
    if inside is None or not isinstance(model.get_submodule(inside), nn.Embedding):
        raise UserError(
            f"{type(model).__name__} has no plain embedding of tokens to pack; leave --embedding out"
        )
    if tied:
        raise UserError(
            f"embedding and head of {type(model).__name__} are one matrix, which has one kind: give --head alone"
        )


def table_of(embedding: str) -> str:
    """Where the packed rows of an embedding lie that no head shares."""
    return f"{embedding}.table"


def install_table(model: Any, embedding: str, made: PackedLinear) -> None:
    """Serve an embedding that no head shares from packed rows of its own."""
    held = model.get_submodule(embedding)
    dtype = held.weight.dtype
    held.add_module("table", made.train(model.training))
    serve_from(held, made, dtype)


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
