"""What makes a model of each family tiny: settings by transformers' model type, and the random models of families.py.

Keys that a family's configuration does not have are left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tawny.errors import first_line

VOCABULARY = 256
LARGEST = 30_000_000  # weights of a model that is still tiny

Settings = Mapping[str, Any]

STANDARD: Settings = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "hidden_size_global": 32,
    "eos_token_id": None,  # so that a text is as long as was asked for
    "is_decoder": True,
    "is_encoder_decoder": False,
}
_LATENT: Settings = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_FEW: Settings = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS: Settings = {
    **_FEW,
    **_LATENT,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_GPT: Settings = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
_LINEAR: Settings = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_SLIDING: Settings = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_STATE: Settings = {"mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_head": 8, "mamba_chunk_size": 8}
# Keys and values are made from a latent vector for every head.
_LATENT_EXPERTS: Settings = {**EXPERTS, "num_key_value_heads": 4}
_BART: Settings = {
    "d_model": 32,
    "decoder_layers": 3,
    "encoder_layers": 1,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
}
_GEMMA_4: Settings = {
    **_SLIDING,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 16,
}
_ZAMBA: Settings = {
    "num_hidden_layers": 6,
    "mamba_d_state": 8,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}

SETTINGS: dict[str, Settings] = {
    "axk1": _LATENT_EXPERTS,
    "axk2": _LATENT_EXPERTS,
    "bailing_hybrid": {**_LATENT_EXPERTS, "layer_group_size": 3},
    "bamba": {**_STATE, "attn_layer_indices": [1], "mamba_n_heads": 8},
    "bart": _BART,
    "bigbird_pegasus": _BART,
    "big_bird": {"attention_type": "original_full"},
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "bloom": {"n_layer": 3, "n_head": 4},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "codegen": {**_GPT, "rotary_dim": 4, "n_ctx": 128},
    "cohere2": _SLIDING,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
        }
    },
    "ctrl": {**_GPT, "dff": 48},
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "deepseek_v2": _LATENT_EXPERTS,
    "deepseek_v3": _LATENT_EXPERTS,
    "deepseek_v32": _LATENT_EXPERTS,
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
        "n_recurrent_loops": 2,
    },
    "dots3_note_text": {
        **_LATENT_EXPERTS,
        "layer_types": ["indexed_attention"] * 3,
        "shared_experts_intermediate_size": 16,
        "index_head_dim": 8,
        "index_n_heads": 4,
        "index_topk": 16,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 2,
    },
    "exaone4": _SLIDING,
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon_h1": {**_STATE, "mamba_d_ssm": 32, "mamba_n_heads": 4},
    "falcon_mamba": {"state_size": 8, "time_step_rank": 4, "conv_kernel": 4},
    "fuyu": {"patch_size": 4},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": _SLIDING,
    "gemma3n_text": {
        **_GEMMA_4,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "laurel_rank": 8,
        "altup_num_inputs": 4,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _GEMMA_4,
    "gemma4_unified_text": _GEMMA_4,
    "glm4_moe_lite": _LATENT_EXPERTS,
    "glm_moe_dsa": _LATENT_EXPERTS,
    "gpt-sw3": _GPT,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "num_layers": 4,
        "num_hidden_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 8,
    },
    "gpt_oss": {**_FEW, **_SLIDING},
    "gptj": {**_GPT, "rotary_dim": 4},
    "granitemoehybrid": {
        **_FEW,
        **_STATE,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "shared_intermediate_size": 24,
    },
    "granitemoeshared": {**_FEW, "shared_intermediate_size": 24},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "use_mamba_kernels": False,
    },
    "jetmoe": {**_FEW, "kv_channels": 8},
    "kimi_linear": {
        **_LATENT_EXPERTS,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": _LINEAR["layer_types"],
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention", "conv"],
        "block_ff_dim": 48,
        "block_multiple_of": 8,
    },
    "lfm2_moe": {**EXPERTS, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "llama4_text": {
        **_FEW,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "attention_chunk_size": 64,
    },
    "longcat_flash": {
        **_LATENT,
        "num_key_value_heads": 4,
        "num_layers": 2,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 2,
        "zero_expert_num": 1,
        "n_routed_experts": 4,
    },
    "mamba": {"state_size": 8, "time_step_rank": 4, "conv_kernel": 4},
    "mamba2": {
        "num_heads": 8,
        "head_dim": 8,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "expand": 2,
    },
    "marian": _BART,
    "mbart": _BART,
    "mimo_v2_flash": EXPERTS,
    "minicpm3": {**_LATENT, "num_key_value_heads": 4},
    "minimax": {**_FEW, "layer_types": _LINEAR["layer_types"], "block_size": 8},
    "moshi": {"ffn_dim": 96},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "expansion_ratio": 2},
    "mvp": _BART,
    "nemotron_h": {
        **EXPERTS,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 1,
        "ssm_state_size": 8,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "olmo_hybrid": {**_LINEAR, "linear_num_value_heads": 2},
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "pegasus": _BART,
    "phi3": {"original_max_position_embeddings": 128},
    "phi4_multimodal": {"num_hidden_layers": 8},
    "phimoe": _FEW,
    "plbart": _BART,
    "prophetnet": {
        "num_decoder_layers": 3,
        "num_encoder_layers": 1,
        "num_decoder_attention_heads": 4,
        "num_encoder_attention_heads": 4,
        "decoder_ffn_dim": 48,
        "encoder_ffn_dim": 48,
    },
    "qwen3_5_moe_text": {**EXPERTS, **_LINEAR},
    "qwen3_5_text": _LINEAR,
    "qwen3_next": {**EXPERTS, **_LINEAR},
    "qwen4_exp_text": {
        **EXPERTS,
        **_LINEAR,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {
        "lru_width": 32,
        "attention_window_size": 8,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "reformer": {
        "attn_layers": ["local", "local", "local"],
        "attention_head_size": 8,
        "feed_forward_size": 48,
        "axial_pos_embds": False,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8},
    "rwkv": {"attention_hidden_size": 32, "context_length": 128},
    "sarvam_mla": _LATENT_EXPERTS,
    "smollm3": {"layer_types": ["full_attention"] * 3, "no_rope_layers": [1, 0, 1]},
    "trocr": {"d_model": 32, "decoder_layers": 3, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
    "whisper": {**_BART, "max_target_positions": 128, "max_source_positions": 16, "num_mel_bins": 8},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "xlm": {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "causal": True},
    "xlnet": {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48},
    "xlstm": {"num_heads": 4, "num_blocks": 3, "chunk_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {**_LATENT, "num_key_value_heads": 4},
    "zamba": {
        **_ZAMBA,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 4,
        "n_mamba_heads": 2,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **_ZAMBA,
        "layer_types": ["mamba", "hybrid"] * 3,
        "layers_block_type": ["mamba", "hybrid"] * 3,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_headdim": 8,
        "chunk_size": 8,
        "num_mem_blocks": 1,
        "use_mem_rope": True,
        "adapter_rank": 4,
    },
    "zaya": {**EXPERTS, "num_experts_per_tok": 1},
}

# Parts of a configuration of several, where a part may be of any family.
PARTS: dict[str, dict[str, str]] = {
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"vision_config": "siglip_vision_model"},
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "got_ocr2": {"text_config": "qwen2"},
    "moshi": {"audio_encoder_config": "mimi"},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
    "musicgen": {"text_encoder": "t5", "audio_encoder": "encodec"},
    "musicgen_melody": {"text_encoder": "t5", "audio_encoder": "encodec"},
}
# Of parts that see or hear: they have no part in a text.
_SENSES: Settings = {
    "num_hidden_layers": 1,
    "num_layers": 1,
    "depth": 1,
    "num_blocks": 1,
    "encoder_layers": 1,
    "num_global_layers": 1,
    "embed_dim": 32,
    "d_model": 32,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "image_size": 16,
    "patch_size": 8,
    "output_channels": 32,
    "mlp_dim": 48,
    "ext_pw_out_channel": 32,
    "depthwise_separable_out_channel": 32,
    "nemo_conv_channels": 32,
    "mm_embed_dim": 32,
    "mm_posemb_size": 16,
    "output_proj_dims": 32,
    "attention_dim": 32,
    "out_hidden_size": 32,
    "ext_hidden_size": 32,
    "window_size": 0,
}


def config_of(family: str) -> Any:
    """A tiny configuration; one made of parts has tiny parts."""
    settings = {**STANDARD, **SETTINGS.get(family, EXPERTS)}
    kind = CONFIG_MAPPING[family]
    for name, part in getattr(kind, "sub_configs", {}).items():
        named = PARTS.get(family, {}).get(name) or getattr(part, "model_type", "")
        if name in settings:
            continue
        if named in SETTINGS or ("text" in name and named in CONFIG_MAPPING):
            settings[name] = config_of(named)
        elif named:
            of = CONFIG_MAPPING[named] if named in CONFIG_MAPPING else part  # noqa: SIM401 - get() finds nothing there
            settings[name] = _known(of, {**STANDARD, **_SENSES})
    return _known(kind, settings)


def _known(kind: Any, settings: Settings) -> Any:
    """A configuration with those settings that its class has."""
    known = set(getattr(kind, "attribute_map", None) or {})
    for parent in kind.__mro__:
        known |= set(getattr(parent, "__annotations__", {}))
        known |= set(inspect.signature(parent.__init__).parameters) if parent is not object else set()
    return kind(**{key: value for key, value in settings.items() if key in known})


def tokens(samples: int, length: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (samples, length), generator=generator)


class NotTried(Exception):
    """There is no tiny model of this family to try Tawny on."""


@torch.no_grad()
def logits_of(model: Any, ids: Tensor) -> Tensor:
    """Logits of a whole forward without a cache."""
    takes = inspect.signature(model.forward).parameters
    made: Tensor = model(input_ids=ids, **({"use_cache": False} if "use_cache" in takes else {})).logits
    return made


def said(error: BaseException) -> str:
    return f"{type(error).__name__}: {first_line(error)[:200]}"


def with_outliers(model: Any) -> Any:
    """The model with random matrices, a hundredth of whose weights are large."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.2 + (noise.abs() > 2.5) * noise)
    return model


def tiny_model(family: str) -> Any:
    """A random model whose weights differ enough to have outliers."""
    try:
        config = config_of(family)
        with torch.device("meta"):
            shapes = AutoModelForCausalLM.from_config(config)
        size = sum(p.numel() for p in shapes.parameters())
        if size > LARGEST:
            raise NotTried(f"no settings here make it small: {size:,} weights")
        torch.manual_seed(0)
        model = with_outliers(AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval())
        seen = logits_of(model, tokens(2, 16, 0))
    except NotTried:
        raise
    except Exception as error:
        raise NotTried(said(error)) from error
    if not bool(seen.isfinite().all()):
        raise NotTried("a random model of it gives NaN")
    return model
