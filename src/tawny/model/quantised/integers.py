"""Weights in integers of few bits that were packed into words: GPTQ and AWQ.

Both hold `[in, out]`: `qweight` in words of 32 bits, and for each group of inputs `scales` and `qzeros`.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tawny.errors import CheckpointError
from tawny.model.quantised.coded import Coded, Parts, Stored, made_of_bits

_GPTQ_BITS = (2, 3, 4, 8)


def _group_size(stored: Stored, inputs: int) -> int:
    size = stored.number("group_size")
    return inputs if size == -1 else size


def _with_groups(q_OI: Tensor, zeros_OG: Tensor, scales_OG: Tensor, group_I: Tensor) -> Tensor:
    values = q_OI.contiguous().float()
    values -= zeros_OG.float()[:, group_I]
    return values.mul_(scales_OG.float()[:, group_I])


def gptq(stored: Stored) -> dict[str, Coded]:
    """GPTQ (Frantar et al. 2022) as AutoGPTQ and GPTQModel write it, with or without `desc_act`.

    `qweight` is packed along the inputs, `qzeros` along the outputs. `g_idx` says which group an input is in.
    Version 1 stores each zero less one.

    Raises:
        CheckpointError: a layout for one kind of kernel, or tensors that do not fit each other.
    """
    layout = stored.settings.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2") or stored.settings.get("is_marlin_format"):
        raise CheckpointError(
            f"{stored.folder} is GPTQ in the layout {layout!r}; expected 'gptq' or 'gptq_v2': convert it first"
        )
    coded = {}
    for stem, entry in stored.ending(".qweight"):
        name = f"{stem}.qweight"
        stored.need(name, ("I32",))
        parts = {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales", "g_idx")}
        if parts["g_idx"] in stored.entries or stored.settings.get("desc_act"):
            (inputs,) = stored.need(parts["g_idx"], ("I32", "I64")).shape or (0,)
        else:
            del parts["g_idx"]
            inputs = entry.shape[0] * 32 // stored.number("bits")
        bits = entry.shape[0] * 32 // max(inputs, 1)
        if bits not in _GPTQ_BITS or bits * inputs != entry.shape[0] * 32:
            raise stored.refused(name, f"has shape {list(entry.shape)}, which no {inputs} inputs make")
        groups, outputs = stored.scale(parts["scales"]).shape or (0, 0)
        stored.need(name, ("I32",), (entry.shape[0], outputs))
        stored.need(parts["qzeros"], ("I32",), (groups, outputs * bits // 32))
        size = _group_size(stored, inputs)
        if size < 1 or groups != -(-inputs // size):
            raise stored.refused(
                parts["scales"],
                f"has {groups} groups; {inputs} inputs in groups of {size} need another number",
            )
        less = int(layout == "gptq")
        decode = partial(
            _gptq,
            bits=bits,
            inputs=inputs,
            size=size,
            less=less,
            refuse=partial(stored.refused, f"{stem}.g_idx"),
        )
        coded[f"{stem}.weight"] = Coded(parts, (outputs, inputs), f"int{bits}, groups of {size}", decode)
    return coded


def _gptq(
    parts: Parts, bits: int, inputs: int, size: int, less: int, refuse: partial[CheckpointError]
) -> Tensor:
    q_OI = made_of_bits(parts["qweight"].T, bits, inputs)
    scales_GO = parts["scales"]
    zeros_GO = made_of_bits(parts["qzeros"], bits, scales_GO.shape[1]).int() + less & 2**bits - 1
    group_I = parts["g_idx"].long() if "g_idx" in parts else torch.arange(inputs) // size
    if int(group_I.min()) < 0 or int(group_I.max()) >= len(scales_GO):
        raise refuse("names a group that has no scale")
    return _with_groups(q_OI, zeros_GO.T, scales_GO.T, group_I)


def awq(stored: Stored) -> dict[str, Coded]:
    """AWQ (Lin et al. 2023) as AutoAWQ writes it for its GEMM kernel: four bits, both packed along the outputs.

    Raises:
        CheckpointError: another layout, or tensors that do not fit each other.
    """
    version = str(stored.settings.get("version") or "gemm").lower()
    bits = stored.settings.get("bits", stored.settings.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        raise CheckpointError(
            f"{stored.folder} is AWQ in the layout {version!r} of {bits} bits; expected 'gemm' of 4: convert it first"
        )
    coded = {}
    for stem, entry in stored.ending(".qweight"):
        stored.need(f"{stem}.qweight", ("I32",))
        inputs, outputs = entry.shape[0], entry.shape[-1] * 8
        parts = {role: f"{stem}.{role}" for role in ("qweight", "qzeros", "scales")}
        groups = (stored.scale(parts["scales"]).shape or (0,))[0]
        if groups < 1 or inputs % groups:
            raise stored.refused(parts["scales"], f"has {groups} groups, which does not fit {inputs} inputs")
        stored.scale(parts["scales"], (groups, outputs))
        stored.need(parts["qzeros"], ("I32",), (groups, outputs // 8))
        form = f"int4, groups of {inputs // groups}"
        coded[f"{stem}.weight"] = Coded(parts, (outputs, inputs), form, _awq)
    return coded


def _awq(parts: Parts) -> Tensor:
    def columns(words: Tensor) -> Tensor:
        # Bits 0, 4, 8, … of a word hold columns 0, 2, 4, 6, 1, 3, 5, 7.
        return (
            made_of_bits(words, 4, 8 * words.shape[1]).view(len(words), -1, 2, 4).transpose(2, 3).flatten(1)
        )

    q_IO, zeros_GO = columns(parts["qweight"]), columns(parts["qzeros"])
    group_I = torch.arange(len(q_IO)) // (len(q_IO) // len(zeros_GO))
    return _with_groups(q_IO.T, zeros_GO.T, parts["scales"].T, group_I)
