"""Weights in eight or four bits of floating point with scales: FP8, MXFP8, MXFP4, NVFP4, and FP4 in the manner of DeepSeek.

The tensors themselves say what they are. Only the size of a block that is cut off at an edge is taken from the configuration.
A scale is multiplied with, whatever its name says (`weight_scale_inv`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tawny.model.quantised.coded import Coded, Parts, Stored, blocks_of, pairs, powers_of_two, scaled

EIGHT_BITS = {"F8_E4M3": "float8 e4m3", "F8_E5M2": "float8 e5m2", "I8": "int8"}
_EXPONENTS = ("U8", "F8_E8M0")
_SCALES = ("_scale_inv", "_scale", ".scale", ".qscale_weight")


def _matrix(scale: Tensor, rows: int) -> Tensor:
    """A scale as `[rows of scales, columns of scales]`: there may be one for a tensor, or a vector of one a row."""
    return (
        scale if scale.dim() == 2 else scale.reshape(-1, 1) if scale.numel() == rows else scale.reshape(1, 1)
    )


def _numbers(scale: Tensor) -> Tensor:
    return powers_of_two(scale) if scale.dtype in (torch.uint8, torch.float8_e8m0fnu) else scale.float()


def _decode(parts: Parts, block: tuple[int, int], four_bits: bool) -> Tensor:
    weight = parts["weight"]
    values_OI = pairs(weight) if four_bits else weight.float()
    if "zero_point" in parts:
        zeros = _matrix(parts["zero_point"].float(), len(values_OI))
        values_OI -= scaled(torch.ones_like(values_OI), zeros, block)
    scale = _matrix(_numbers(parts["scale"]), len(values_OI))
    if "global_scale" in parts:
        scale = scale * parts["global_scale"].float().reshape(())
    elif "global_divisor" in parts:
        scale = scale / parts["global_divisor"].float().reshape(())
    return scaled(values_OI, scale, block)


def of_blocks(
    stored: Stored, parts: dict[str, str], sizes: Sequence[Sequence[int]] = (), *, four_bits: bool = False
) -> Coded:
    """A weight `[…, out, in]` in eight bits, or two to a byte, with a scale for each block.

    Args:
        parts: `weight` and `scale`, and maybe `zero_point`, `global_scale` or `global_divisor`.
        sizes: rows and columns of a block, as the configuration has them.
    """
    weight, scale = stored.entries[parts["weight"]], stored.entries[parts["scale"]]
    shape = (*weight.shape[:-1], weight.shape[-1] * (2 if four_bits else 1))
    if len(shape) not in (2, 3):
        raise stored.refused(parts["weight"], f"has shape {list(weight.shape)}; expected matrices")
    grid = _grid(scale.shape, shape)
    block = None if grid is None else blocks_of(shape[-2:], grid, sizes)
    if block is None:
        raise stored.refused(
            parts["scale"], f"has shape {list(scale.shape)}, which does not fit {list(shape)}"
        )
    if "zero_point" in parts:
        stored.need(parts["zero_point"], ("I8", "U8", *EIGHT_BITS), scale.shape)
    form = "float4 e2m1" if four_bits else EIGHT_BITS[weight.dtype]
    how = f"{form}, {_words(block, shape)}"
    return Coded(parts, shape, how, partial(_decode, block=block, four_bits=four_bits))


def _grid(scale: Sequence[int], shape: Sequence[int]) -> Sequence[int] | None:
    """How many scales there are along rows and columns of a matrix."""
    lead, rows = list(shape[:-2]), shape[-2]
    if len(scale) == len(shape) and list(scale[:-2]) == lead:
        return scale[-2:]
    flat = list(scale[len(lead) :]) if list(scale[: len(lead)]) == lead else list(scale)
    if flat in ([], [1], [1, 1]):
        return 1, 1
    return (rows, 1) if flat == [rows] else None


def _words(block: tuple[int, int], shape: Sequence[int]) -> str:
    rows, columns = block
    if block == tuple(shape[-2:]):
        return "one scale"
    if columns == shape[-1]:
        return "a scale a row" if rows == 1 else f"a scale for {rows} rows"
    return f"groups of {columns}" if rows == 1 else f"blocks of {rows}×{columns}"


def fp8(stored: Stored) -> dict[str, Coded]:
    """Weights in float8 with scales beside them, as DeepSeek, Qwen and transformers write them; FP4 two to a byte, too."""
    named = stored.settings.get("weight_block_size")
    sizes = [named] if isinstance(named, list) and len(named) == 2 and all(named) else []
    coded = {}
    for name, entry in stored.entries.items():
        four_bits = entry.dtype in ("I8", "U8")
        if name.endswith(_SCALES) or not (four_bits or entry.dtype in EIGHT_BITS):
            continue
        stem = name.removesuffix(".weight")
        beside = [n + s for s in _SCALES for n in (name, stem) if n + s in stored.entries]
        if not beside:
            continue  # named by whoever looks at what is left
        parts = {"weight": name, "scale": beside[0]}
        coded[name] = of_blocks(stored, parts, sizes, four_bits=four_bits)
    return coded


def fp4(stored: Stored, stem: str, weight: str, beside: dict[str, str]) -> Coded:
    """A weight of two FP4 numbers a byte whose scales are exponents (MXFP4), or float8 with one for all beside (NVFP4)."""
    parts = {"weight": f"{stem}.{weight}", "scale": f"{stem}.weight_scale"}
    stored.need(parts["weight"], ("U8",))
    if stored.need(parts["scale"], ("F8_E4M3", *_EXPONENTS)).dtype == "F8_E4M3":
        ((role, name),) = beside.items()
        if (shape := stored.scale(f"{stem}.{name}").shape) not in ((), (1,)):
            raise stored.refused(f"{stem}.{name}", f"has shape {list(shape)}; expected one number")
        parts[role] = f"{stem}.{name}"
    return of_blocks(stored, parts, four_bits=True)


def modelopt(stored: Stored) -> dict[str, Coded]:
    """What NVIDIA's ModelOpt writes: FP8 with one scale, or NVFP4 (groups of 16 with a float8 scale, and one for all)."""
    for stem, _ in stored.ending("pre_quant_scale"):
        raise stored.refused(f"{stem}pre_quant_scale", "scales inputs, which Tawny cannot fold into weights")
    coded = {}
    for stem, entry in stored.ending(".weight"):
        name = f"{stem}.weight"
        if entry.dtype == "U8":
            coded[name] = fp4(stored, stem, "weight", {"global_scale": "weight_scale_2"})
        elif entry.dtype in EIGHT_BITS:
            stored.scale(f"{stem}.weight_scale")
            coded[name] = of_blocks(stored, {"weight": name, "scale": f"{stem}.weight_scale"})
    return coded


def mxfp4(stored: Stored) -> dict[str, Coded]:
    """Experts as gpt-oss holds them: `…_blocks` `[E, O, G, 16]` of two FP4 numbers a byte, `…_scales` `[E, O, G]` of exponents.

    The parameter they become is `[E, I, O]`.
    """
    coded = {}
    for stem, entry in stored.ending("_blocks"):
        if len(entry.shape) != 4 or entry.dtype != "U8":
            raise stored.refused(
                f"{stem}_blocks", f"has shape {list(entry.shape)}; expected bytes of four axes"
            )
        experts, rows, groups, size = entry.shape
        parts = {"weight": f"{stem}_blocks", "scale": f"{stem}_scales"}
        stored.need(parts["scale"], _EXPONENTS, entry.shape[:3])
        form = f"float4 e2m1, groups of {2 * size}"
        coded[stem] = Coded(parts, (experts, 2 * groups * size, rows), form, _transposed)
    return coded


def _transposed(parts: Parts) -> Tensor:
    values_OGS = pairs(parts["weight"])
    return (values_OGS * powers_of_two(parts["scale"]).unsqueeze(-1)).flatten(1).T
