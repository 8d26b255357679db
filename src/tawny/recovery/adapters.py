"""Masked LoRA for peft: merging an adapter keeps 100 % of the zeros, and merging an ordinary one keeps none.

LoRA adds a dense product to every weight, and merging writes it into the zeros: at 50, 60 and 70 % the merged model had a
sparsity of 0 % (`lora-reprune` in benchmarks/results/recovery.json). Here the product is masked before it is added.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def mask_adapter(layer: Any, alive: Callable[[], Callable[[Tensor], Tensor] | None]) -> Callable[[], None]:
    """Let a LoRA layer add its product only where the weight survives; returns what undoes it.

    Args:
        alive: gives what gives the places of zeros on the device of a tensor; None once nobody keeps them.
    """
    plain, own = layer.forward, vars(layer).get("forward")

    def masked(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in layer.active_adapters if name in getattr(layer, "lora_A", {})]
        special = getattr(layer, "lora_variant", {})
        mask = alive()
        plainly = layer.disable_adapters or layer.merged or not active
        if plainly or mask is None or any(name in special for name in active):
            result: Tensor = plain(x, *args, **kwargs)
            return result
        result = layer.base_layer(x)
        for name in active:
            delta = layer.get_delta_weight(name).to(result.dtype)
            delta = delta.masked_fill(mask(delta), 0)
            seen = layer.lora_dropout[name](x).to(result.dtype)
            conv = isinstance(layer.base_layer, Conv1D)
            bias = layer.lora_B[name].bias  # of lora_bias=True
            if bias is not None:
                bias = (bias * layer.scaling[name]).to(result.dtype)
            result = result + nn.functional.linear(seen, delta.T if conv else delta, bias)
        return result

    layer.forward = masked

    def undo() -> None:
        del layer.forward
        if own is not None:  # of whoever masked it before
            layer.forward = own

    return undo
