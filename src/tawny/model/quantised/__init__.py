"""Quantised checkpoints, read as the float weights they stand for, one tensor at a time.

`READERS` has one reader for each `quant_method`. A reader looks at names, dtypes and shapes. It says which float tensors a
checkpoint holds, and how each is made from stored ones; nothing is read for that but a few numbers. So whatever opens a
model opens these, through `Checkpoint`, in the memory of the tensors it asks for.

The libraries of these formats are not needed. Their kernels for multiplying are what makes them large, and here a weight is
decoded once. The tests hold every reader to its library where that installs.
"""

from __future__ import annotations

__all__ = ["BESIDE", "READERS", "Coded", "read_quantised", "settings_of"]

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tawny.errors import CheckpointError, ModelError, nearest
from tawny.model.quantised.bitsandbytes import bitsandbytes
from tawny.model.quantised.coded import Coded, Reader, Stored
from tawny.model.quantised.compressed_tensors import compressed_tensors
from tawny.model.quantised.floats import fp8, modelopt, mxfp4
from tawny.model.quantised.integers import awq, gptq
from tawny.model.tensorfile import TensorEntry

READERS: dict[str, Reader] = {
    "awq": awq,
    "bitsandbytes": bitsandbytes,
    "compressed-tensors": compressed_tensors,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
    "modelopt": modelopt,
    "mxfp4": mxfp4,
    "mxfp8": fp8,
}
# Where older tools wrote what config.json says today.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
_INTEGERS = {"U8", "I8", "I16", "I32", "I64"}
# Scales of activations and of the cache: a float model has none.
_NOT_WEIGHTS = (
    ".activation_scale",
    ".input_scale",
    ".input_global_scale",
    ".input_zero_point",
    ".output_scale",
    ".k_scale",
    ".q_scale",
    ".v_scale",
    ".kv_scale",
    ".weight_format",
    ".weight_shape",
)


def settings_of(folder: Path) -> dict[str, Any] | None:
    """How a folder says it is quantised: `quantization_config`, or what an older tool wrote beside it. None where it is not."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (settings := config.get("quantization_config")) is not None:
            return settings if isinstance(settings, dict) else None
        for name, method in BESIDE.items():
            if (folder / name).is_file():
                plain = json.loads((folder / name).read_text(encoding="utf-8"))
                return {"quant_method": method, **plain}
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None  # whoever builds the model says what is wrong
    return None


def read_quantised(
    folder: Path,
    settings: Mapping[str, Any],
    entries: Mapping[str, TensorEntry],
    read: Callable[[str], Tensor],
) -> tuple[dict[str, Coded], set[str]]:
    """The float tensors of a quantised checkpoint that are made from stored ones, and names of stored tensors that are not weights.

    Raises:
        ModelError: no reader knows the method.
        CheckpointError: tensors are missing or do not fit each other: names one.
    """
    method = str(settings.get("quant_method"))
    reader = READERS.get(method)
    if reader is None:
        raise ModelError(
            f"{folder} is quantised ({method}); expected float weights or one of {', '.join(READERS)}{nearest(method, READERS)}: "
            "dequantise it first"
        )
    stored = Stored(folder, entries, settings, read)
    weights = reader(stored)
    if not weights:
        beside = next((name for name in BESIDE if (folder / name).is_file()), None)
        left = f"{beside} away" if beside else "quantization_config out of config.json"
        raise CheckpointError(
            f"{folder} says that it is quantised ({method}) and holds no such weight; fetch it again, or take {left} "
            "if its weights are floats"
        )
    used = {name for coded in weights.values() for name in coded.parts.values()}
    others = {name for name in entries if name.endswith(_NOT_WEIGHTS) or "quant_state.bitsandbytes__" in name}
    consumed = used | others
    for name, entry in entries.items():
        if name not in consumed and (
            entry.dtype.startswith("F8") or (name.endswith(".weight") and entry.dtype in _INTEGERS)
        ):
            raise stored.refused(name, f"is stored as {entry.dtype} and its scale is missing")
    return weights, consumed
