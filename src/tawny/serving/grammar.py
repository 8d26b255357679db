"""Texts that must have a form: JSON, JSON of a schema, or calls of tools. llguidance says which tokens may come next."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tawny.errors import UserError, one_line, printable
from tawny.serving.protocol import Refused

# A model may break and indent lines, but not write spaces for ever.
_SPACES = r"( |\n[ \t]{0,16})?"
_MOST_CHARACTERS = 1 << 18  # of a grammar, which is read in 0.2 s while other requests wait


def bounded(schema: dict[str, Any], strict: bool) -> dict[str, Any]:
    """The same schema, with spaces that end. What llguidance does not know is left out of it, unless it is strict."""
    return schema | {"x-guidance": {"whitespace_pattern": _SPACES, "lenient": not strict}}


def of_schema(schema: dict[str, Any], strict: bool) -> str:
    """The grammar of JSON that a schema of `response_format` describes."""
    from llguidance import LLMatcher

    try:
        return str(LLMatcher.grammar_from_json_schema(bounded(schema, strict)))
    except ValueError as error:  # half of a character
        raise Refused(
            f"'response_format' cannot be read: {one_line(error)}", param="response_format"
        ) from None


class Grammars:
    """llguidance's view of one model's tokenizer; making it takes about a second.

    Args:
        words: length of the model's logits.
        ends: tokens that end a text.
    """

    def __init__(self, tokenizer: Any, words: int, ends: set[int]) -> None:
        from llguidance.hf import from_tokenizer

        try:
            self.tokenizer = from_tokenizer(tokenizer, n_vocab=words, eos_token=sorted(ends) or None)
        except (ValueError, AttributeError) as error:
            raise Refused(f"the model's tokenizer cannot hold a text to a form: {error}") from None
        self.words = words

    def form(self, grammar: str, param: str) -> GrammarState:
        """A new text of this grammar.

        Raises:
            Refused: it cannot be followed; `param` is the field it came from.
        """
        from llguidance import LLMatcher

        if len(grammar) > _MOST_CHARACTERS:
            long = f"has {len(grammar)} characters; expected at most {_MOST_CHARACTERS}"
            raise Refused(f"the grammar of '{param}' {long}", param=param)
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0)
        state = GrammarState(matcher, self.tokenizer, self.words)
        try:
            if matcher.is_error():
                raise UserError(_said(matcher))
            state.allowed()  # else a schema that no text fits would be an error in the middle of an answer
        except UserError as error:
            raise Refused(f"'{param}' describes what cannot be followed: {error}", param=param) from None
        return state


def _said(matcher: Any) -> str:
    """llguidance's reason in a line, without the state of its parser; of an expression the complaint is in the last one."""
    lines = matcher.get_error().strip().splitlines() or ["unknown"]
    return printable(lines[0] + (" " + lines[-1].removeprefix("error: ") if lines[0].endswith(":") else ""))


class GrammarState:
    """What one text may still be; a `Constraint` of the sampler."""

    def __init__(self, matcher: Any, tokenizer: Any, words: int) -> None:
        self.matcher, self.tokenizer, self.words = matcher, tokenizer, words

    def copy(self) -> GrammarState:
        """The same text apart, without reading the grammar again."""
        return GrammarState(self.matcher.deep_copy(), self.tokenizer, self.words)

    def starts_with(self, text: str) -> bool:
        """Take a text that is there already, if it may stand at the beginning."""
        tokens = self.tokenizer.tokenize_str(text) if text else []
        taken = self.matcher.try_consume_tokens(tokens) == len(tokens)
        if not taken:
            self.matcher.reset()
        return bool(taken)

    @property
    def over(self) -> bool:
        return bool(self.matcher.is_stopped())

    def allowed(self) -> Tensor:
        """Bool `[words]`."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), dtype=np.uint8)
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: self.words]).bool()
        if self.matcher.is_error() or not mask.any():
            why = f" ({_said(self.matcher)})" if self.matcher.is_error() else ""
            raise UserError(f"no token may come next{why}; does a $ref lead only to itself?")
        return mask

    def take(self, token: int) -> None:
        self.matcher.consume_token(token)
