"""A real tokenizer for tiny models: one token a character."""

from __future__ import annotations

from typing import Any


def tiny_tokenizer(*, begins: bool = False) -> Any:
    """`begins`: it puts BOS before a text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import VOCABULARY

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {chr(code): len(vocabulary) + i for i, code in enumerate(range(32, 32 + VOCABULARY - 3))}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
