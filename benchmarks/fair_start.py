"""A model that computes the same with other weights: seeded scales of channels that cancel out.

A checkpoint that was dequantised from few bits lies on a grid, and a tool that meets the same grid again loses nothing. So
both sides of a comparison start from weights off every grid: a norm divides by what the linears behind it multiply by, `up`
by what `down` multiplies by, `v` by what `o` does. For models of LLaMA's layout, whose norms have no bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def scale_channels(model: Any, seed: int = 0, spread: float = 0.1) -> None:
    """Scale channels of a live model in place by log-normal numbers with standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        return torch.exp(spread * torch.randn(count, generator=generator, dtype=torch.float64))

    def times(weight: Tensor, by: Tensor) -> None:
        weight.copy_((weight.double() * by).to(weight.dtype))

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        behind = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        )
        for norm, linears in behind:
            s_I = scales(norm.weight.numel())
            times(norm.weight, 1 / s_I)
            for linear in linears:
                times(linear.weight, s_I)
        s_O = scales(mlp.up_proj.out_features)
        times(mlp.up_proj.weight, s_O[:, None])
        times(mlp.down_proj.weight, 1 / s_O)
        s_V = scales(attention.v_proj.out_features)
        times(attention.v_proj.weight, s_V[:, None])
        if attention.v_proj.bias is not None:
            times(attention.v_proj.bias, s_V)
        heads = s_V.view(-1, attention.head_dim).repeat_interleave(attention.num_key_value_groups, 0)
        times(attention.o_proj.weight, 1 / heads.flatten())
