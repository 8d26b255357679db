"""The tokenizer in a GGUF file: taken over from another GGUF file unchanged, or made from tokenizer.json.

llama.cpp splits words by code, chosen by a name (`tokenizer.ggml.pre`). A wrong name changes tokens and nothing fails. So a
name is written only where the tokenizer encodes llama.cpp's own check text as the one that the name stands for.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tawny.errors import CheckpointError, ModelError, in_one_line
from tawny.exporting.architectures import CONVERTER
from tawny.model.gguf_header import open_gguf
from tawny.model.source import load_tokenizer

# From llama.cpp's converter: the text, and the SHA-256 of the list of its tokens, by the name of how words are split.
_CHECK = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis concatenated) ✅ 🦙🦙 3 33 333 3333 33333 "
    "333333 3333333 33333333 3.3 3..3 3...3 កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure I'll make it, 'D you like some "
    "tea? We'Ve a'lL"
)
SPLITS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
}


@dataclass(frozen=True)
class Key:
    """A value of a GGUF file; `types` are those of gguf: one, or ARRAY and that of its items."""

    value: Any
    types: tuple[Any, ...]


def keys_of_gguf(path: Path) -> dict[str, Key]:
    """Everything that a GGUF file says of its tokenizer, as it stands there.

    Raises:
        CheckpointError: the file cannot be read, or has no tokenizer.
    """
    with in_one_line(
        CheckpointError, lambda said: f"{path} cannot be opened as a GGUF file ({said}); fetch it again"
    ):
        fields = open_gguf(path).fields
        keys = {
            name: Key(field.contents(), (field.types[0], field.types[-1]))
            for name, field in fields.items()
            if name.startswith("tokenizer.")
        }
    if "tokenizer.ggml.tokens" not in keys:
        raise CheckpointError(f"{path} holds no tokenizer; name another GGUF file of the same model")
    return keys


def keys_of_folder(folder: Path, words: int) -> dict[str, Key]:
    """The same from `tokenizer.json`, for byte-level BPE.

    Args:
        words: rows of the embedding; those without a token are called unused.

    Raises:
        ModelError: another kind of tokenizer, or one that splits words in a way that was not checked.
    """
    from gguf import GGUFValueType, SpecialVocab, TokenType

    tokenizer = load_tokenizer(folder)
    encoded = hashlib.sha256(str(tokenizer.encode(_CHECK)).encode()).hexdigest()
    if encoded not in SPLITS:
        raise ModelError(
            f"{folder}: its tokenizer is none of {', '.join(sorted(SPLITS.values()))}, whose splitting of words is known; pass "
            f"--tokenizer-from with a GGUF file of the same model, or use {CONVERTER}"
        )
    ids = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(words):
        tokens.append(ids.get(number, f"[PAD{number}]"))
        special = number in added and added[number].special
        plain = TokenType.USER_DEFINED if number in added else TokenType.NORMAL
        kinds.append(TokenType.UNUSED if number not in ids else TokenType.CONTROL if special else plain)
    logging.getLogger("gguf.vocab").setLevel(logging.ERROR)
    vocabulary = SpecialVocab(folder, load_merges=True, n_vocab=words)
    text, number, truth = (GGUFValueType.STRING, GGUFValueType.UINT32, GGUFValueType.BOOL)
    entries = {
        "model": Key("gpt2", (text,)),
        "pre": Key(SPLITS[encoded], (text,)),
        "tokens": Key(tokens, (GGUFValueType.ARRAY, text)),
        "token_type": Key([int(kind) for kind in kinds], (GGUFValueType.ARRAY, GGUFValueType.INT32)),
        "merges": Key(vocabulary.merges, (GGUFValueType.ARRAY, text)),
    }
    names = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # as GGUF spells them
    for kind, token in vocabulary.special_token_ids.items():
        entries[f"{names.get(kind, kind)}_token_id"] = Key(token, (number,))
    for kind, wanted in vocabulary.add_special_token.items():
        entries[f"add_{kind}_token"] = Key(wanted, (truth,))
    keys = {f"tokenizer.ggml.{name}": key for name, key in entries.items()}
    template = tokenizer.chat_template
    if isinstance(template, str):
        keys["tokenizer.chat_template"] = Key(template, (text,))
    return keys
