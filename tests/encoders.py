"""Tiny random encoders: of text, of pictures and of sound."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tests.tiny import with_outliers

_TEXT = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
_VISION = {k: v for k, v in _TEXT.items() if k[0] in "hni"} | {"image_size": 32, "patch_size": 8}
_SWIN = {"image_size": 32, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
_CONVNEXT = {
    "image_size": 32,
    "hidden_sizes": [16, 32],
    "depths": [2, 2],
    "num_stages": 2,
    "layer_scale_init_value": 0.5,
}
_WHISPER = {
    "d_model": 32,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "max_source_positions": 16,
    "num_mel_bins": 8,
}

# Name → module and class in transformers, and settings.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert.BertModel", _TEXT),
    "masked": ("bert.BertForMaskedLM", _TEXT),
    "roberta": ("roberta.RobertaModel", _TEXT),
    "mpnet": ("mpnet.MPNetModel", _TEXT),
    "vit": ("vit.ViTForImageClassification", {**_VISION, "num_labels": 7}),
    "dinov2": ("dinov2.Dinov2Model", {**_VISION, "mlp_ratio": 2}),
    "whisper": ("whisper.WhisperEncoder", _WHISPER),
    "swin": ("swin.SwinModel", _SWIN),
    "swinv2": ("swinv2.Swinv2Model", _SWIN),
    "swin, classes": ("swin.SwinForImageClassification", {**_SWIN, "num_labels": 7}),
    "swin, maps": ("swin.SwinBackbone", {**_SWIN, "out_features": ["stage1", "stage2"]}),
    "convnext": ("convnext.ConvNextModel", _CONVNEXT),
}


def tiny_encoder(name: str, seed: int = 0) -> Any:
    path, settings = ENCODERS[name]
    module, kind_name = path.split(".")
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), kind_name)
    torch.manual_seed(seed)
    return with_outliers(kind(kind.config_class(**settings)).eval(), seed + 1)


def inputs_for(model: Any, samples: int = 6, seed: int = 0) -> dict[str, Tensor]:
    generator, name = torch.Generator().manual_seed(seed), model.main_input_name
    if name == "input_ids":
        return {name: torch.randint(3, 256, (samples, 20), generator=generator)}
    shape = (samples, 3, 32, 32) if name == "pixel_values" else (samples, 8, 32)
    return {name: torch.randn(shape, generator=generator)}


def padded(inputs: dict[str, Tensor], real: int = 12) -> dict[str, Tensor]:
    """Every other sample ends after `real` tokens."""
    mask = torch.ones_like(inputs["input_ids"])
    mask[::2, real:] = 0
    return {**inputs, "attention_mask": mask}
