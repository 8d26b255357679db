"""What llama.cpp calls a model: the architectures that are exported, their metadata, and what they change in the weights.

llama.cpp's graphs are written by hand for each architecture. So a configuration is exported only where every value that its
graph does not read is the one that the graph assumes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tawny.errors import ModelError

CONVERTER = "`python convert_hf_to_gguf.py MODEL --outfile FILE` of llama.cpp"


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Attributes:
        name: as GGUF has it.
        activation: of its gated feed-forward.
        biases: whether its linears may have them.
        permuted: rotary halves of q and k are interleaved, as Meta's first LLaMA had them.
        norm_plus_one: weights of norms are stored as what is multiplied with, 1 + weight.
        frequencies: its graph divides rotary frequencies by a tensor of the file, as Llama 3 needs.
        square_queries: its loader takes queries to be as wide as hidden states.
        whole_every: every so many blocks one attends to everything, the others to a window; 1 where all attend to everything.
    """

    name: str
    activation: tuple[str, ...]
    biases: bool = False
    permuted: bool = False
    norm_plus_one: bool = False
    frequencies: bool = False
    whole_every: int = 1
    square_queries: bool = False

    def changed(self, name: str, value: Tensor, heads: int, key_heads: int) -> Tensor:
        """A parameter, float32, as llama.cpp wants it; `name` is the one in GGUF."""
        if self.norm_plus_one and name.endswith("norm.weight"):
            return value + 1
        for part, count in ((".attn_q.", heads), (".attn_k.", key_heads)):
            if self.permuted and part in name:
                return value.unflatten(0, (count, 2, -1)).transpose(1, 2).reshape(value.shape)  # type: ignore[no-untyped-call,no-any-return]
        return value


# By `model_type` of config.json.
ARCHITECTURES = {
    "gemma": Architecture("gemma", ("gelu_pytorch_tanh", "gelu"), norm_plus_one=True),
    "gemma3_text": Architecture("gemma3", ("gelu_pytorch_tanh",), norm_plus_one=True, whole_every=6),
    "llama": Architecture("llama", ("silu",), biases=True, permuted=True, frequencies=True),
    "qwen2": Architecture("qwen2", ("silu",), biases=True, square_queries=True),
    "qwen3": Architecture("qwen3", ("silu",)),
}


def rope_factors(
    config: Any, architecture: Architecture, inverse_frequencies: Tensor | None
) -> Tensor | None:
    """What divides each rotary frequency, `[head_dim / 2]` float32, from the frequencies that the model uses.

    None where they are plain, or where `metadata` says all of their scaling.

    Raises:
        ModelError: a kind of scaling that the architecture does not know.
    """
    rope = _rope(config, "full_attention")
    kind = rope.get("rope_type", "default")
    if kind in ("default", "linear"):
        return None
    if kind != "llama3" or not architecture.frequencies or inverse_frequencies is None:
        raise ModelError(
            f"rotary positions of the kind {kind!r} are not exported for the architecture {architecture.name!r}; use {CONVERTER}"
        )
    size = 2 * inverse_frequencies.numel()
    plain: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / inverse_frequencies.float()


def metadata(config: Any, architecture: Architecture) -> dict[str, int | float | str]:
    """The values of the architecture, by their names in GGUF without its own in front.

    Raises:
        ModelError: a value of the configuration that llama.cpp's graph does not know.
    """
    _refuse(config, architecture)
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    rope = _rope(config, "full_attention")
    entries: dict[str, int | float | str] = {
        "context_length": int(config.max_position_embeddings),
        "embedding_length": int(config.hidden_size),
        "block_count": int(config.num_hidden_layers),
        "feed_forward_length": int(config.intermediate_size),
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.num_key_value_heads),
        "attention.key_length": size,
        "attention.value_length": size,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": size,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": int(config.vocab_size),
    }
    if rope.get("rope_type") == "linear":  # llama.cpp, too, leaves blocks with a window unscaled
        entries["rope.scaling.type"] = "linear"
        entries["rope.scaling.factor"] = float(rope["factor"])
    if architecture.whole_every > 1:
        entries["attention.sliding_window"] = int(config.sliding_window)
        entries["rope.freq_base_swa"] = float(_rope(config, "sliding_attention")["rope_theta"])
        if config.final_logit_softcapping:
            entries["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return entries


def _rope(config: Any, kind: str) -> dict[str, Any]:
    """The rotary parameters of blocks of one kind of attention; most models have one kind."""
    rope = dict(config.rope_parameters)
    return dict(rope.get(kind, rope))


def _refuse(config: Any, architecture: Architecture) -> None:
    # A GGUF file can say some of the widths block by block; which programs read them was not tried.
    if getattr(config, "is_heterogeneous", False):
        raise ModelError(
            "its blocks have different widths; expected one width for all: export the model as it was before `tawny slim`, "
            "or prune it with `-a uniform`"
        )
    plain: dict[str, Any] = config.to_dict()
    width = config.num_attention_heads * (
        plain.get("head_dim") or config.hidden_size // config.num_attention_heads
    )
    if architecture.square_queries and width != config.hidden_size:
        raise ModelError(
            f"its heads have {width} channels in all and its hidden states {config.hidden_size}, which llama.cpp takes to be equal for "
            f"{architecture.name!r}: slim channels only, and no heads"
        )
    every = architecture.whole_every
    kinds = [
        "sliding_attention" if (index + 1) % every else "full_attention"
        for index in range(config.num_hidden_layers)
    ]
    expected: dict[str, Callable[[Any], bool]] = {
        "hidden_act": lambda value: value in architecture.activation,
        "hidden_activation": lambda value: value in (None, *architecture.activation),
        "layer_types": lambda value: value is None or list(value) == kinds,
        "attn_logit_softcapping": lambda value: not value,
        "query_pre_attn_scalar": lambda value: value == plain["head_dim"],
        "use_bidirectional_attention": lambda value: not value,
    }
    for key, fits in expected.items():
        if key in plain and not fits(plain[key]):
            raise ModelError(
                f"{key} is {plain[key]!r}, which the architecture {architecture.name!r} of llama.cpp does not know; use {CONVERTER}"
            )
    if every > 1 and _rope(config, "sliding_attention").get("rope_type", "default") != "default":
        raise ModelError(f"scaled rotary positions of blocks with a window are not exported; use {CONVERTER}")
    if _rope(config, "full_attention").get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"rotary positions of a part of a head are not exported; use {CONVERTER}")
