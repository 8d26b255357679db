"""One tiny model in every format of quantised checkpoints, and the float weights that it stands for.

Where the library of a format installs, it writes the tensors and decodes them again; else the published layout does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import quantised as reference
from tests.tiny import tiny_model

Written = tuple[dict[str, Tensor], Tensor]
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_hidden_layers": 1,
    "num_local_experts": 4,
}


@dataclass(frozen=True)
class Format:
    """`write` makes the stored tensors of one weight, and the weight they stand for; `says` is in what inspection tells."""

    settings: dict[str, Any]
    write: Callable[[Tensor], Written]
    says: str
    family: str = "llama"
    weights: str = r"proj\.weight$"
    rounding: float = 0.0  # of the library that decodes


def _fp8(
    block: tuple[int, int], name: str, dtype: torch.dtype = torch.float8_e4m3fn
) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        rows, columns = (min(size, length) for size, length in zip(block, weight.shape, strict=True))
        grid = [-(-length // size) for length, size in zip(weight.shape, (rows, columns), strict=True)]
        scale = torch.rand(grid, generator=torch.Generator().manual_seed(1)) * 0.01 + 0.005
        wide = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[
            : len(weight), : weight.shape[1]
        ]
        stored = (weight / wide).to(dtype)
        return {"weight": stored, name: scale}, reference.by_block(stored.float(), scale, rows, columns)

    return write


def _gptq(
    bits: int, size: int, shuffled: bool = False, asymmetric: bool = True
) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        q, zeros, scales, groups = _integers(weight, bits, size, asymmetric)
        if shuffled:
            groups = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(2))]
        return reference.gptq(q, zeros, scales, groups, bits), reference.grouped(q, zeros, scales, groups)

    return write


def _integers(
    weight: Tensor, bits: int, size: int, asymmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    count = weight.shape[1] // size
    q = torch.randint(0, 2**bits, weight.shape, generator=generator)
    zeros = torch.randint(0, 2**bits, (len(weight), count), generator=generator)
    zeros = zeros if asymmetric else torch.full_like(zeros, 2 ** (bits - 1))
    scales = (torch.rand(len(weight), count, generator=generator) * 0.1).half()
    return q, zeros, scales, torch.arange(weight.shape[1]) // size


def _awq(weight: Tensor) -> Written:
    q, zeros, scales, groups = _integers(weight, 4, 32, True)
    return reference.awq(q, zeros, scales), reference.grouped(q, zeros, scales, groups)


def _nvfp4_of_modelopt(weight: Tensor) -> Written:
    scale = (weight.unflatten(1, (-1, 16)).abs().amax(2) * 20).to(torch.float8_e4m3fn)
    wide = scale.float().repeat_interleave(16, 1) / 120
    bits = reference.nearest_fp4(weight / wide)
    stored = {
        "weight": reference.low_first(bits),
        "weight_scale": scale,
        "weight_scale_2": torch.tensor(1 / 120),
        "input_scale": torch.tensor(0.5),
    }
    return stored, reference.fp4_value(bits) * (scale.float() * stored["weight_scale_2"]).repeat_interleave(
        16, 1
    )


def _mxfp4_of_gpt_oss(weight: Tensor) -> Written:
    """`weight` is a parameter `[E, I, O]`; the file holds `[E, O, G, 16]`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    straight = weight.transpose(1, 2).unflatten(2, (-1, 32))
    exponents = torch.log2(straight.abs().amax(3) / 6).ceil()
    bits = reference.nearest_fp4(straight / torch.exp2(exponents).unsqueeze(3))
    blocks, scales = reference.low_first(bits), (exponents + 127).to(torch.uint8)
    made = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"_blocks": blocks, "_scales": scales}, made


def _compressed(
    form: str, scale: Callable[[Tensor], Tensor], *, zeros: bool = False, **weights: Any
) -> Format:
    """Written and decoded by compressed-tensors."""

    def write(weight: Tensor) -> Written:
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights), format=form)
        compressor = BaseCompressor.get_value_from_registry(form)
        given = {"weight": weight, "weight_scale": scale(weight)}
        if zeros:
            generator = torch.Generator().manual_seed(4)
            given["weight_zero_point"] = torch.randint(
                -3, 3, given["weight_scale"].shape, generator=generator
            ).to(torch.int8)
        if form.startswith("nvfp4"):
            given["weight_global_scale"] = torch.tensor([100.0])
        stored = compressor.compress(given, scheme)
        return stored, compressor.decompress(stored, scheme)["weight"].float()

    kept = {key: value for key, value in weights.items() if not isinstance(value, torch.dtype)}
    settings = {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kept, "format": form}},
    }
    bits = weights["num_bits"]
    said = f"{weights['type']}{bits}"
    return Format(settings, write, said, rounding=2**-8 if form.startswith("nvfp4") else 0.0)


def _largest(size: int, over: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.unflatten(1, (-1, min(size, weight.shape[1]))).abs().amax(2) / over


def _row(over: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.abs().amax(1, keepdim=True) / over


def _power(size: int, over: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.exp2(torch.log2(_largest(size, over)(weight)).ceil())


def _blocks(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    return lambda weight: torch.rand(-(-len(weight) // rows), -(-weight.shape[1] // columns)) * 0.01 + 0.005


def _four_bits(kind: str, nested: bool) -> Callable[[Tensor], Written]:
    def write(weight: Tensor) -> Written:
        functional = pytest.importorskip("bitsandbytes").functional
        stored, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=nested
        )
        beside = {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        # As one row: with AVX-512, bitsandbytes (0.50) is wrong where a block of 64 goes on in the next row.
        state.shape = (1, weight.numel())
        return {"weight": stored, **beside}, functional.dequantize_4bit(stored, state).view(weight.shape)

    return write


def _eight_bits(weight: Tensor) -> Written:
    functional = pytest.importorskip("bitsandbytes").functional
    stored, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return {"weight": stored, "SCB": scale}, functional.int8_vectorwise_dequant(stored, scale)


def _settings(method: str, **others: Any) -> dict[str, Any]:
    return {"quant_method": method, **others}


_INT = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
_FLOAT = {"type": "float", "symmetric": True}

# The names are those of the table in docs/models.md.
FORMATS = {
    "FP8, blocks": Format(
        _settings("fp8", weight_block_size=[40, 48]), _fp8((40, 48), "weight_scale_inv"), "float8 e4m3"
    ),
    "FP8, one scale": Format(
        _settings("fp8"), _fp8((10**6, 10**6), "weight_scale_inv", torch.float8_e5m2), "float8 e5m2"
    ),
    "FP8, FBGEMM": Format(_settings("fbgemm_fp8"), _fp8((1, 10**6), "weight_scale"), "a scale a row"),
    "FP8, experts": Format(
        _settings("fp8", weight_block_size=[16, 16]),
        _fp8((16, 16), "weight_scale_inv"),
        "blocks of 16×16",
        "qwen3_moe",
    ),
    "FP8, ModelOpt": Format(_settings("modelopt"), _fp8((10**6, 10**6), "weight_scale"), "one scale"),
    "NVFP4, ModelOpt": Format(_settings("modelopt"), _nvfp4_of_modelopt, "groups of 16"),
    "MXFP4, gpt-oss": Format(
        _settings("mxfp4"), _mxfp4_of_gpt_oss, "float4 e2m1, groups of 32", "gpt_oss", r"experts\.\w+_proj$"
    ),
    "GPTQ, 4 bits": Format(_settings("gptq", bits=4, group_size=32, desc_act=False), _gptq(4, 32), "int4"),
    "GPTQ, `desc_act`": Format(
        _settings("gptq", bits=4, group_size=32, desc_act=True), _gptq(4, 32, True), "int4"
    ),
    "GPTQ, 3 bits": Format(_settings("gptq", bits=3, group_size=32), _gptq(3, 32, asymmetric=False), "int3"),
    "GPTQ, 8 bits": Format(
        _settings("gptq", bits=8, group_size=32, lm_head=True),
        _gptq(8, 32),
        "int8",
        weights=r"(proj|lm_head)\.weight$",
    ),
    "AWQ": Format(_settings("awq", bits=4, group_size=32, version="gemm"), _awq, "int4, groups of 32"),
    "bitsandbytes, NF4": Format(_settings("bitsandbytes", load_in_4bit=True), _four_bits("nf4", True), "nf4"),
    "bitsandbytes, FP4": Format(
        _settings("bitsandbytes", load_in_4bit=True), _four_bits("fp4", False), "fp4"
    ),
    "bitsandbytes, int8": Format(_settings("bitsandbytes", load_in_8bit=True), _eight_bits, "int8"),
    "compressed-tensors, int4": _compressed("pack-quantized", _largest(32, 7), num_bits=4, **_INT),
    "compressed-tensors, int4 with zeros": _compressed(
        "pack-quantized", _largest(32, 7), zeros=True, num_bits=4, **{**_INT, "symmetric": False}
    ),
    "compressed-tensors, int3": _compressed("pack-quantized", _largest(32, 3), num_bits=3, **_INT),
    "compressed-tensors, int8": _compressed(
        "int-quantized", _row(127), num_bits=8, type="int", strategy="channel", symmetric=True
    ),
    "compressed-tensors, FP8": _compressed(
        "float-quantized", _row(448), num_bits=8, strategy="channel", **_FLOAT
    ),
    "compressed-tensors, FP8 in blocks": _compressed(
        "float-quantized", _blocks(40, 48), num_bits=8, strategy="block", block_structure=[40, 48], **_FLOAT
    ),
    "compressed-tensors, NVFP4": _compressed(
        "nvfp4-pack-quantized",
        lambda weight: (_largest(16, 6)(weight) * 100).to(torch.float8_e4m3fn).float(),
        num_bits=4,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        **_FLOAT,
    ),
    "compressed-tensors, MXFP4": _compressed(
        "mxfp4-pack-quantized", _power(32, 6), num_bits=4, strategy="group", group_size=32, **_FLOAT
    ),
    "compressed-tensors, MXFP8": _compressed(
        "mxfp8-quantized", _power(32, 448), num_bits=8, strategy="group", group_size=32, **_FLOAT
    ),
}


def quantised(folder: Path, form: Format) -> dict[str, Tensor]:
    """Write a tiny model in a format; returns the float weights that its quantised tensors stand for."""
    tiny_model(form.family, **SIZES).save_pretrained(folder)
    path = folder / "model.safetensors"
    stored: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    for name, value in load_file(path).items():
        if re.search(form.weights, name):
            parts, expected[name] = form.write(value.float())
            stem = name.removesuffix("weight")
            stored |= {f"{stem}{part}": tensor.contiguous() for part, tensor in parts.items()}
        else:
            stored[name] = value
    assert expected
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": form.settings}))
    return expected


def table() -> list[str]:
    """The rows of the table in docs/models.md: what `test_quantised.py` takes every format through."""
    return [
        f"| {name} | `{form.settings['quant_method']}` | yes | yes | dense, packed |"
        for name, form in FORMATS.items()
    ]
