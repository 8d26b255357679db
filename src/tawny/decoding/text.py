"""From a prompt or a chat to tokens, and from tokens back to text as they come.

A piece of text is given out once its last character is whole: a character of several bytes may take several tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tawny.errors import CheckpointError, TextError, UserError, first_line
from tawny.model.streams import holds_integers

Message = Mapping[str, Any]  # as chat templates take it: {"role": "user", "content": "…"}
Prompt = str | Tensor | Sequence[Message]

_MANY = 32  # tokens that are decoded at once, at most
_FRONT = 8  # tokens that may be needed for a whole character, special ones among them


class Tokenizer(Protocol):
    """What is used of a tokenizer of transformers."""

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def apply_chat_template(
        self, conversation: Any, *, tokenize: bool, add_generation_prompt: bool, **more: Any
    ) -> Any: ...

    def decode(self, ids: Any, *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> Any: ...


def check_prompt(prompt: Prompt) -> None:
    """Refuse what is not a prompt, before a model is opened for it.

    Raises:
        TextError: several prompts at once, no ids, a message without role or content, or a text that is not valid UTF-8.
    """
    if isinstance(prompt, Tensor):
        if prompt.dim() not in (1, 2) or (prompt.dim() == 2 and len(prompt) != 1):
            raise TextError(
                f"the prompt is a tensor of shape {list(prompt.shape)}; give one prompt, [tokens] or [1, tokens]"
            )
        if not holds_integers(prompt):
            raise TextError(f"the prompt is a tensor of {prompt.dtype}; give token ids, torch.long")
        return
    if not isinstance(prompt, str) and not (
        isinstance(prompt, list | tuple) and all(isinstance(one, Mapping) for one in prompt)
    ):
        raise TextError(
            f"the prompt is a {type(prompt).__name__}; give a text, messages with role and content, or token ids as a torch tensor"
        )
    for message in _messages(prompt):
        if not {"role", "content"} <= message.keys():
            raise TextError(f"a message has the keys {sorted(message)}; give role and content")
        try:
            str(message["content"]).encode()
        except UnicodeEncodeError as error:
            raise TextError(
                f"the prompt is not valid UTF-8 (at character {error.start + 1}); encode it anew"
            ) from None


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def tokens_of(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    chat: bool | None,
    tools: Sequence[Mapping[str, Any]] = (),
    most: int | None = None,
) -> tuple[Tensor, bool]:
    """Tokens `[tokens]` of a prompt that `check_prompt` has let pass, and whether the chat template made them.

    Args:
        chat: put a text into the chat template; None does so where there is one. Messages always go there.
        tools: what the model may call, for the chat template.
        most: characters that the template may make, before they are tokenised.

    Raises:
        TextError: the prompt holds no token, the template refuses it, or makes too much of it.
        CheckpointError: the tokenizer has no chat template.
    """
    if isinstance(prompt, Tensor):
        ids, chat = prompt.reshape(-1).long(), False
    elif tokenizer is None:
        raise UserError("a live model needs tokenizer=… to read a text, or a prompt of tokens")
    else:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        chat = chat or not isinstance(prompt, str) or (chat is None and has_template)
        if chat and not has_template:
            raise CheckpointError(
                "the model's tokenizer has no chat template, which a chat needs: give a plain text (`tawny generate MODEL PROMPT`), or "
                "another model"
            )
        if isinstance(prompt, str) and not chat:
            read = tokenizer(prompt)
        else:
            written = _templated(tokenizer, prompt, tools)
            if most is not None and len(written) > most:
                raise TextError(f"the chat template makes {len(written)} characters of them, and {most} fit")
            read = tokenizer(written, add_special_tokens=False)
        ids = torch.tensor(read["input_ids"], dtype=torch.long)
    if not len(ids):
        raise TextError("the prompt holds no token; give at least one word")
    return ids, chat


def _templated(
    tokenizer: Tokenizer, prompt: str | Sequence[Message], tools: Sequence[Mapping[str, Any]]
) -> str:
    from jinja2 import TemplateError

    messages, more = _messages(prompt), {"tools": list(tools)} if tools else {}
    try:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **more)
        )
    except TemplateError as error:  # many templates refuse roles or their order
        raise TextError(f"the model's chat template refuses the messages: {first_line(error)}") from None


def end_tokens(model: Any, tokenizer: Tokenizer | None) -> set[int]:
    """Tokens that end a text: what the model's generation settings say, else its configuration, else the tokenizer."""
    owners = (getattr(model, "generation_config", None), model.config, tokenizer)
    ends = next((e for o in owners if (e := getattr(o, "eos_token_id", None)) is not None), None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


class TextPieces:
    """The text of tokens that come one at a time. Without a tokenizer every text is empty.

    special: whether special tokens are part of the text.
    after: tokens whose text is continued.
    """

    def __init__(self, tokenizer: Tokenizer | None, special: bool = False, after: Sequence[int] = ()) -> None:
        self.tokenizer, self.special = tokenizer, special
        self._ids: list[int] = []  # since `_said` begins
        self._said = ""
        if tokenizer is not None:
            self._go_on_from(after)

    def add(self, token: int) -> str:
        """The characters that this token makes whole."""
        if self.tokenizer is None:
            return ""
        self._ids.append(token)
        whole = self._decode(self._ids)
        if whole.endswith("�"):
            return ""
        piece = self._new(whole)
        if len(self._ids) > _MANY:
            self._go_on_from(self._ids)
        return piece

    def rest(self) -> str:
        """What is left when no token comes any more; half a character is a `�`."""
        return "" if self.tokenizer is None else self._new(self._decode(self._ids))

    def _go_on_from(self, ids: Sequence[int]) -> None:
        """Decode from the last of these tokens on, which have been said.

        Decoded from its beginning, a long text would cost its square. Decoded without what is before it, it would lose
        a space: some decoders drop one from the front of whatever they are given. So the front is a text, however short.
        """
        for count in range(1, min(_FRONT, len(ids)) + 1):
            front = list(ids[-count:])
            said = self._decode(front)
            if (said or count == len(ids)) and not said.endswith("�"):
                self._ids, self._said = front, said
                return

    def _decode(self, ids: list[int]) -> str:
        assert self.tokenizer is not None
        return decode(self.tokenizer, ids, self.special)

    def _new(self, whole: str) -> str:
        if len(whole) <= len(self._said):
            return ""
        piece, self._said = whole[len(self._said) :], whole
        return piece


class StopStrings:
    """Ends a text before the first of several strings, wherever tokens begin and end.

    What may be the beginning of one is held back until it is known.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings, self.found, self._held = tuple(strings), False, ""

    def add(self, piece: str) -> str:
        """The characters that may be given out now; none once a string was found."""
        if not self.strings or self.found:
            return "" if self.found else piece
        text, self._held = self._held + piece, ""
        ends = [at for string in self.strings if (at := text.find(string)) >= 0]
        if ends:
            self.found = True
            return text[: min(ends)]
        held = max(
            (
                size
                for string in self.strings
                for size in range(1, min(len(string), len(text) + 1))
                if text.endswith(string[:size])
            ),
            default=0,
        )
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, when no text comes any more."""
        held, self._held = self._held, ""
        return held


def decode(tokenizer: Tokenizer, ids: list[int], special: bool = False) -> str:
    # Tidied up, a text would change behind what has been given out.
    return str(tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False))
