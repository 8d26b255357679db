"""Which settings of a configuration would give linears without a bias one, found by trying."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch

from tawny.model.skeleton import build_skeleton
from tawny.model.stack import Stack


def bias_settings(stack: Stack, names: Iterable[str]) -> dict[str, bool]:
    """Settings such as `mlp_bias: true` that give the linears of these module paths a bias; empty if some get none."""
    wanted = {f"{name}.bias" for name in names} - {name for name, _ in stack.model.named_parameters()}
    settings: dict[str, bool] = {}
    text = stack.config.get_text_config()
    for key, value in text.to_dict().items():
        if value is False and key.endswith("bias"):
            config = copy.deepcopy(stack.config)
            setattr(config.get_text_config(), key, True)
            parameters = {name for name, _ in build_skeleton(config, torch.float32).named_parameters()}
            if wanted & parameters:
                settings[key], wanted = True, wanted - parameters
    return {} if wanted else settings
