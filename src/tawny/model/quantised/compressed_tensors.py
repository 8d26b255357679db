"""The format `compressed-tensors` of vLLM's LLM Compressor: int4 and int8, packed or not, FP8, MXFP8, MXFP4 and NVFP4.

The tensors beside a weight and their shapes say which of its forms a weight has, so mixed checkpoints need nothing more.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tawny.errors import CheckpointError
from tawny.model.quantised.coded import Coded, Parts, Stored, blocks_of, made_of_bits, scaled
from tawny.model.quantised.floats import EIGHT_BITS, fp4, of_blocks


def compressed_tensors(stored: Stored) -> dict[str, Coded]:
    """Every weight that has `weight_packed`, or `weight` in eight bits with a `weight_scale`.

    Raises:
        CheckpointError: weights were rotated, or stored sparse, or tensors do not fit each other.
    """
    for key in ("transform_config", "sparsity_config"):
        activations = stored.settings.get(key) or {}
        if activations.get("config_groups") or activations.get("format", "dense") != "dense":
            raise CheckpointError(
                f"{stored.folder}: {key} of quantization_config is not read; decompress the checkpoint with its own library first"
            )
    groups = _groups(stored)
    sizes = _block_sizes(groups)
    coded = {}
    for stem, entry in stored.ending(".weight_packed"):
        if entry.dtype == "U8":
            coded[f"{stem}.weight"] = fp4(
                stored, stem, "weight_packed", {"global_divisor": "weight_global_scale"}
            )
        else:
            coded[f"{stem}.weight"] = _packed(stored, stem)
            if groups and all(group.get("symmetric") is False for group in groups):
                stored.need(f"{stem}.weight_zero_point", ("I32", "I8"))
    for stem, entry in stored.ending(".weight"):
        if entry.dtype not in EIGHT_BITS:
            continue
        parts = {"weight": f"{stem}.weight", "scale": f"{stem}.weight_scale"}
        stored.need(parts["scale"], ("F16", "BF16", "F32", "U8", "F8_E8M0"))
        if (order := f"{stem}.weight_g_idx") in stored.entries and bool(
            (stored.read(order).diff() < 0).any()
        ):
            raise stored.refused(order, "puts columns of 8 bits into groups out of order, which is not read")
        if f"{stem}.weight_zero_point" in stored.entries:
            parts["zero_point"] = f"{stem}.weight_zero_point"
        coded[parts["weight"]] = of_blocks(stored, parts, sizes)
    return coded


def _groups(stored: Stored) -> list[dict[str, Any]]:
    """What the configuration says of weights, for each group of linears that it tells apart."""
    groups = stored.settings.get("config_groups")
    sections = groups.values() if isinstance(groups, dict) else ()
    wanted = [group.get("weights") for group in sections if isinstance(group, dict)]
    return [weights for weights in wanted if isinstance(weights, dict)]


def _block_sizes(groups: list[dict[str, Any]]) -> list[list[int]]:
    """Rows and columns of a block, wherever blocks are named: `[128, 128]` or `"128x128"`."""
    sizes = []
    for weights in groups:
        numbers = [int(number) for number in re.findall(r"\d+", str(weights.get("block_structure")))]
        if len(numbers) == 2 and all(numbers):
            sizes.append(numbers)
    return sizes


def _packed(stored: Stored, stem: str) -> Coded:
    """Integers of 1 to 8 bits along the inputs, the zeros of asymmetric ones along the outputs."""
    name = f"{stem}.weight_packed"
    words = stored.need(name, ("I32",)).shape
    parts = {"weight": name, "scale": f"{stem}.weight_scale"}
    stored.need(f"{stem}.weight_shape", ("I64", "I32"), (2,))
    outputs, inputs = map(int, stored.read(f"{stem}.weight_shape"))
    bits = next((n for n in range(1, 9) if words == (outputs, -(-inputs * n // 32))), None)
    if bits is None:
        raise stored.refused(name, f"has shape {list(words)}, which [{outputs}, {inputs}] does not make")
    scale = stored.scale(parts["scale"]).shape
    grid = (1, 1) if scale in ((), (1,)) else scale
    block = blocks_of((outputs, inputs), grid, ()) if len(grid) == 2 else None
    if block is None:
        raise stored.refused(
            parts["scale"], f"has shape {list(scale)}, which does not fit [{outputs}, {inputs}]"
        )
    if (zeros := f"{stem}.weight_zero_point") in stored.entries:
        packed_shape = (-(-grid[0] * bits // 32), grid[1])
        if stored.entries[zeros].dtype == "I32":
            stored.need(zeros, ("I32",), packed_shape)
        else:
            stored.need(zeros, ("I8",), scale)
        parts["zero_point"] = zeros
    if (order := f"{stem}.weight_g_idx") in stored.entries:
        stored.need(order, ("I32", "I64"), (inputs,))
        parts["g_idx"] = order
    decode = partial(
        _decode,
        bits=bits,
        shape=(outputs, inputs),
        grid=(grid[0], grid[1]),
        block=block,
        refuse=partial(stored.refused, order),
    )
    return Coded(parts, (outputs, inputs), f"int{bits}, groups of {block[1]}", decode)


def _decode(
    parts: Parts,
    bits: int,
    shape: tuple[int, int],
    grid: tuple[int, int],
    block: tuple[int, int],
    refuse: partial[CheckpointError],
) -> Tensor:
    middle = 1 << (bits - 1)
    values_OI = made_of_bits(parts["weight"], bits, shape[1]).float() - middle
    scale_OG = parts["scale"].float().reshape(grid)
    zeros_OG = None
    if "zero_point" in parts:
        zeros_OG = parts["zero_point"]
        if zeros_OG.dtype == torch.int32:
            zeros_OG = made_of_bits(zeros_OG.T, bits, grid[0]).T.float() - middle
    group_I = parts["g_idx"].long() if "g_idx" in parts else None
    if group_I is not None and int(group_I.max()) >= 0:  # -1 everywhere: in order
        if int(group_I.min()) < 0 or int(group_I.max()) >= grid[1]:
            raise refuse("names a group that has no scale")
        if zeros_OG is not None:
            values_OI -= zeros_OG.float()[:, group_I]
        values_OI *= scale_OG[:, group_I]
        return values_OI
    if zeros_OG is not None:
        values_OI -= scaled(torch.ones_like(values_OI), zeros_OG, block)
    return scaled(values_OI, scale_OG, block)
