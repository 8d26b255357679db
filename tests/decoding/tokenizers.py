"""Tokenizers that show where text is taken apart wrongly."""

from __future__ import annotations


class Bytes:
    """A tokenizer whose tokens are bytes, so that one letter may need several."""

    chat_template = "there is one"
    eos_token_id = None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": list(text.encode())}

    def apply_chat_template(self, conversation, tokenize, add_generation_prompt):
        return f"<{conversation[0]['content']}>"

    def decode(self, ids, skip_special_tokens, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces  # it would change what has been said
        return bytes(ids).decode(errors="replace")


def llama_2_tokenizer(words):
    """One that writes spaces as ▁ and bytes as <0x0A>, and drops a space from the front of what it decodes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    steps = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(list(steps))
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=False
    )
