"""Tiny random models of every family, small enough to prune in a second and odd enough to catch mistakes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 256
_COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_GATED = {
    **_COMMON,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "head_dim": 8,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GATED},
    "mistral": {**_GATED, "sliding_window": 8},
    "qwen2": {**_GATED, "tie_word_embeddings": True},
    "qwen3": {**_GATED},
    "gemma3_text": {
        **_GATED,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi": {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 128},
    "opt": {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 16,
    },
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {**_COMMON, "intermediate_size": 48, "max_position_embeddings": 128},
    "falcon": {**_COMMON, "alibi": False, "new_decoder_architecture": False, "multi_query": True},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    "mixtral": {**_GATED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GATED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
    },
}

# State-space layers beside attention; not among the families that every test goes through.
BAMBA = {
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}


def tiny_config(family: str, **changes: Any) -> Any:
    return CONFIG_MAPPING[family](
        **{**FAMILIES.get(family, _GATED), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    )


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A random model whose linears differ enough in scale to have outliers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).eval()
    return with_outliers(model, seed + 1)


def with_outliers(model: Any, seed: int) -> Any:
    """The model with random matrices, a hundredth of whose weights are large."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2 + (noise.abs() > 2.5) * noise)
    return model


def tokens(samples: int = 4, length: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


def endless(family, seed=0):
    """A tiny model that never ends its text."""
    model = tiny_model(family, seed)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    return model
