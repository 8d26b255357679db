"""The shapes of LLaMA that speeds and memory are measured on, and GGUF files of random weights in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model of LLaMA's layout; `shared` heads have keys and values."""

    blocks: int
    hidden: int
    inner: int
    heads: int
    shared: int
    vocabulary: int

    @property
    def settings(self) -> dict[str, Any]:
        """By the names of transformers' LlamaConfig."""
        return {
            "num_hidden_layers": self.blocks,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.shared,
            "vocab_size": self.vocabulary,
        }

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linears of a block, `[out, in]`."""
        hidden, inner, narrow = self.hidden, self.inner, self.hidden // self.heads * self.shared
        sides = {"q": (hidden, hidden), "k": (narrow, hidden), "v": (narrow, hidden), "o": (hidden, hidden)}
        return {**sides, "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


SHAPES = {
    "quick": Shape(2, 256, 512, 4, 2, 512),
    "135m": Shape(30, 576, 1536, 9, 3, 49152),
    "1.1b": Shape(22, 2048, 5632, 32, 4, 32000),
    "7b": Shape(32, 4096, 11008, 32, 32, 32000),
    "70b": Shape(80, 8192, 28672, 64, 8, 32000),
}
# Bytes of 256 weights, and where among them the float16 scales lie.
K_QUANTS = {"Q3_K": (110, (108,)), "Q4_K": (144, (0, 2)), "Q5_K": (176, (0, 2)), "Q6_K": (210, (208,))}
_IN_GGUF = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}  # others are ffn_NAME


def mixture(kind: str, name: str, block: int, blocks: int) -> str:
    """The type that llama.cpp gives a tensor of a model quantised to `kind`."""
    more = block < blocks // 8 or block >= 7 * blocks // 8 or (block - blocks // 8) % 3 == 2
    if kind == "Q8_0":
        return kind
    if name == "output":
        return "Q6_K"
    if kind == "Q4_0":
        return kind
    if kind == "Q4_K_M":
        return "Q6_K" if more and name in ("attn_v", "ffn_down") else "Q4_K"
    if name == "attn_v":
        return "Q5_K" if block < 2 else "Q4_K"
    if name == "ffn_down":
        return "Q5_K" if block < blocks // 16 else "Q4_K" if more else "Q3_K"
    return "Q4_K" if name == "attn_output" else "Q3_K"


def write_gguf(path: Path, shape: Shape, kind: str) -> None:
    """A LLaMA of random weights: each matrix made once for all blocks. K-quants are random bytes with small scales."""
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.blocks)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.shared)
    writer.add_rope_dimension_count(shape.hidden // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += [f"▁w{i}" for i in range(shape.vocabulary - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * len(pieces))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (len(pieces) - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    made: dict[tuple[str, int, int], Any] = {}

    def add(name: str, own: str, rows: int, cols: int) -> None:
        kept = made.get((own, rows, cols))
        if kept is None:
            if own in K_QUANTS:
                size, scales = K_QUANTS[own]
                kept = generator.integers(0, 256, (rows, cols // 256, size), dtype=np.uint8)
                for at in scales:
                    kept[..., at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), dtype=np.uint8)
                kept = kept.reshape(rows, -1)
            else:
                values = generator.standard_normal((rows, cols), dtype=np.float32) * cols**-0.5
                kept = gguf.quants.quantize(values, gguf.GGMLQuantizationType[own])
            made[own, rows, cols] = kept
        writer.add_tensor(f"{name}.weight", kept, raw_dtype=gguf.GGMLQuantizationType[own])

    sizes = {_IN_GGUF.get(name, f"ffn_{name}"): size for name, size in shape.linears.items()}
    ones = np.ones(shape.hidden, dtype=np.float32)
    add("token_embd", mixture(kind, "attn_q", 0, shape.blocks), shape.vocabulary, shape.hidden)
    add("output", mixture(kind, "output", 0, shape.blocks), shape.vocabulary, shape.hidden)
    writer.add_tensor("output_norm.weight", ones)
    for block in range(shape.blocks):
        for name, (rows, cols) in sizes.items():
            add(f"blk.{block}.{name}", mixture(kind, name, block, shape.blocks), rows, cols)
        writer.add_tensor(f"blk.{block}.attn_norm.weight", ones)
        writer.add_tensor(f"blk.{block}.ffn_norm.weight", ones)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
