"""Weights that bitsandbytes stored: NF4 and FP4 in blocks (QLoRA, Dettmers et al. 2023), and int8 with a scale a row.

Everything needed lies beside a weight, its code book and the code book of its scales too.
"""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

from torch import Tensor

from tawny.model.quantised.coded import Coded, Parts, Stored, pairs

_STATE = ".quant_state.bitsandbytes__"


def bitsandbytes(stored: Stored) -> dict[str, Coded]:
    """Weights of four bits, which have a `quant_state`, and of eight, which have an `SCB`."""
    coded = {}
    for kind in ("nf4", "fp4"):
        for name, _ in stored.ending(f"{_STATE}{kind}"):
            coded[name] = _four_bits(stored, name, kind)
    for stem, _ in stored.ending(".SCB"):
        name = f"{stem}.weight"
        shape = stored.need(name, ("I8",)).shape
        stored.need(f"{stem}.SCB", ("F32",), shape[:1])
        coded[name] = Coded(
            {"weight": name, "scale": f"{stem}.SCB"}, shape, "int8, a scale a row", _eight_bits
        )
    return coded


def _eight_bits(parts: Parts) -> Tensor:
    return parts["weight"].float().mul_(parts["scale"].unsqueeze(1) / 127)


def _four_bits(stored: Stored, name: str, kind: str) -> Coded:
    state_name = f"{name}{_STATE}{kind}"
    stored.need(state_name, ("U8",))
    try:
        state: dict[str, Any] = json.loads(bytes(stored.read(state_name).tolist()))
        shape, size = tuple(map(int, state["shape"])), int(state["blocksize"])
        inner, offset = int(state.get("nested_blocksize", 1)), float(state.get("nested_offset", 0.0))
        if min(*shape, size, inner) < 1:
            raise ValueError("a size below 1")
    except (ValueError, KeyError, TypeError) as error:
        raise stored.refused(state_name, f"says nothing useful ({error})") from error
    count = math.prod(shape)
    if math.prod(stored.need(name, ("U8",)).shape) != (count + 1) // 2:
        raise stored.refused(
            name, f"has shape {list(stored.entries[name].shape)}, which does not fit {list(shape)}"
        )
    parts = {"weight": name, "absmax": f"{name}.absmax", "quant_map": f"{name}.quant_map"}
    blocks = -(-count // size)
    nested = f"{name}.nested_absmax" in stored.entries
    stored.need(parts["quant_map"], ("F32",), (16,))
    stored.need(parts["absmax"], ("U8",) if nested else ("F32",), (blocks,))
    if nested:
        parts |= {role: f"{name}.{role}" for role in ("nested_absmax", "nested_quant_map")}
        stored.need(parts["nested_absmax"], ("F32",), (-(-blocks // inner),))
        stored.need(parts["nested_quant_map"], ("F32",), (256,))
    decode = partial(_decode, shape=shape, size=size, inner=inner, offset=offset)
    return Coded(parts, shape, f"{kind}, groups of {size}", decode)


def _decode(parts: Parts, shape: tuple[int, ...], size: int, inner: int, offset: float) -> Tensor:
    count = math.prod(shape)
    values = pairs(parts["weight"].flatten().unsqueeze(0), parts["quant_map"], high_first=True)[0, :count]
    scale = parts["absmax"]
    if "nested_absmax" in parts:
        outer = parts["nested_absmax"].repeat_interleave(inner)[: len(scale)]
        scale = parts["nested_quant_map"][scale.int()] * outer + offset
    if count % size == 0:
        return values.view(-1, size).mul_(scale.unsqueeze(1)).reshape(shape)
    return values.mul_(scale.repeat_interleave(size)[:count]).reshape(shape)
