"""What a run is given: told apart, and refused where it cannot be what was meant."""

from __future__ import annotations

__all__ = ["check_dense", "check_live", "compute_dtype", "samples_of", "text_or_tokens"]

from pathlib import Path
from typing import Any

import torch

from tawny.errors import ModelError, RecipeError, TextError
from tawny.model.checkpoint import is_packed
from tawny.model.stack import Stack
from tawny.model.streams import Samples
from tawny.packed.linear import PackedLinear
from tawny.precision import DTYPES, native_dtype
from tawny.recipe.schema import Recipe


def text_or_tokens(calibration: Any) -> tuple[dict[str, Any], Any]:
    """`calibration` as recipe keys where it names a text, and as tokens where it is those."""
    if isinstance(calibration, str | Path):
        return {"calibration.text": str(calibration)}, None
    return {}, calibration


def samples_of(given: Any) -> Samples:
    """Tokens, or `(tokens, attention mask)`.

    Raises:
        TextError: they are neither.
    """
    if isinstance(given, Samples):
        return given
    if isinstance(given, tuple):
        if len(given) != 2:
            raise TextError(f"calibration is a tuple of {len(given)}; expected (tokens, attention mask)")
        return Samples(*given)
    return Samples(given)


def check_dense(source: str | Path, folder: Path) -> None:
    """Refuse a packed folder.

    Raises:
        ModelError: it is one.
    """
    if is_packed(folder):
        raise ModelError(f"{source} is packed; `tawny unpack` it first and prune the dense checkpoint")


def check_live(recipe: Recipe, stack: Stack) -> None:
    """Refuse keys that would change how a live model is kept or computes: it stays as it is. Refuse a packed one.

    Raises:
        ModelError: linears of the model are packed.
        RecipeError: one of them says another thing than the model does.
    """
    if any(isinstance(module, PackedLinear) for module in stack.model.modules()):
        raise ModelError(
            f"the live {type(stack.model).__name__} is packed: what is packed is not pruned or profiled; load the dense model"
        )
    own = str(stack.compute).removeprefix("torch.")
    for key, given in (
        ("dtype", recipe.dtype),
        ("compute", None if recipe.compute == "auto" else recipe.compute),
    ):
        if given is not None and given != own:
            raise RecipeError(
                f"{key} is {given} and the live model is {own}: leave {key} out, or convert the model first (model.to(torch.{given}))"
            )
    if recipe.device != "cpu" and torch.device(recipe.device).type != stack.device.type:
        raise RecipeError(
            f"device is {recipe.device} and the live model is on {stack.device}: leave device out, or move the model first"
        )


def compute_dtype(recipe: Recipe) -> torch.dtype:
    """dtype of forwards: the recipe's, or what the machine multiplies natively."""
    return native_dtype() if recipe.compute == "auto" else DTYPES[recipe.compute]
