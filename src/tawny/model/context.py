"""Which tokens a model can be shown, and how many at once.

A model with a table of positions (learned, or made at the start) fails beyond its last row. Rotary angles and ALiBi
exist for any position, and such a model may be shown more than it was trained on. The table is found by its shape,
never by a model's name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tawny.errors import RecipeError, TextError
from tawny.model.structure import predicts_tokens

_ALIBI = "max_seq_len"  # of models that make a table of ALiBi as long as that in every forward (MPT)
_EXTRA_ROWS = 2  # OPT's table has two that no token uses


def context_of(model: Any) -> int | None:
    """Tokens the model is made for, by its configuration; None if that does not say.

    YaRN scales the angles of every text, so that a model with it is made for its factor's length, named or not.
    """
    said = _said(model, "max_position_embeddings")
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if said and rope.get("rope_type") == "yarn":
        original = rope.get("original_max_position_embeddings") or said
        return max(said, int(original * (rope.get("factor") or 1.0)))
    return said or _said(model, _ALIBI)


def _said(model: Any, name: str) -> int | None:
    said = getattr(model.config.get_text_config(decoder=True), name, None)
    return said if isinstance(said, int) and said > 0 else None


def hard_context_of(model: Any) -> int | None:
    """Tokens beyond which the model has no position to give; None where there is no such end."""
    limit = context_of(model)
    if limit is None or not _said(model, "max_position_embeddings"):
        return limit
    words = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            if module is not words and 0 <= module.num_embeddings - limit <= _EXTRA_ROWS:
                # Positions that begin after the row of the padding, as RoBERTa's do.
                return limit - (0 if module.padding_idx is None else module.padding_idx + 1)
            continue
        # A table the model makes itself is not in the checkpoint, which sets it apart from packed weights.
        buffers = (module._buffers[name] for name in module._non_persistent_buffers_set)
        if any(table is not None and table.dim() == 2 and table.shape[0] == limit for table in buffers):
            return limit
    return None


def longest_text(model: Any) -> int | None:
    """Tokens of a prompt and its text together: as many as there are positions for, or the model is made for."""
    return hard_context_of(model) or context_of(model)


def check_context(model: Any, seqlen: int) -> None:
    """Refuse samples or windows for whose last tokens the model has no position.

    Raises:
        RecipeError: `seqlen` is past the end of its table of positions.
    """
    limit = hard_context_of(model)
    if limit is not None and seqlen > limit:
        raise RecipeError(
            f"seqlen {seqlen} is more than the model's context of {limit}; give --seqlen {limit}"
        )


def seqlen_of(model: Any, wanted: int) -> int:
    """Tokens of a sample: as many as are wanted, or as an encoder has positions for.

    Raises:
        RecipeError: a language model has no position for the last of them.
    """
    if predicts_tokens(model):
        check_context(model, wanted)
        return wanted
    return min(wanted, hard_context_of(model) or wanted)


def words_of(model: Any) -> int:
    """Tokens that the model has an embedding for."""
    rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    return int(rows if rows is not None else model.config.get_text_config(decoder=True).vocab_size)


def check_ids(model: Any, tokens: Tensor) -> None:
    """Refuse tokens that the model has no embedding for, which torch would tell by an index.

    Args:
        tokens: integers of any shape, not empty.

    Raises:
        TextError: an id is none of the model's.
    """
    words = words_of(model)
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= words:
        raise TextError(
            f"the text holds token id {low if low < 0 else high} and the model has {words:,} words, ids 0 to {words - 1}: "
            "tokenise it with the model's own tokenizer"
        )
