"""Several texts in given shares: one grammar for `--calibration` and `--text`, wherever they are read.

    wiki                                     a named text, all of it
    wiki=0.4 code.jsonl=0.4 self=0.2         so much of what is read comes from each
    chat:talks.jsonl                         messages, rendered by the model's chat template
    self                                     text that the dense model writes (decoding/author.py)
    images:DIR, sample                       pictures, for models that see (pictures.py)

What this file promises:

- Shares add up to 1. Sources without one share what is left evenly.
- `sha256` names the whole: its texts, their order and their shares.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tawny.calibration.text import (
    NAMED_TEXTS,
    Role,
    Text,
    joined,
    json_lines,
    load_text,
    printable,
    unknown_text,
)
from tawny.errors import RecipeError, TextError, first_line

Texts = str | Path | Sequence[str]  # as a recipe, a setting or an option gives them

CHAT, OWN, IMAGES, SAMPLE = "chat", "self", "images", "sample"
_DAY = "01 Jan 2026"  # templates that tell the model today's date take it as `date_string`
_ROUNDING = 0.011  # three thirds may be written 0.33


@dataclass(frozen=True)
class Source:
    """One text as it was named, without its share: `wiki`, `code.jsonl`, `chat:talks.jsonl`, `self`."""

    spec: str
    share: float

    @property
    def messages(self) -> str | None:
        """The file of a chat."""
        return self._behind(CHAT)

    @property
    def pictures(self) -> str | None:
        """The folder of pictures."""
        return self._behind(IMAGES)

    @property
    def is_pictures(self) -> bool:
        return self.pictures is not None or self.spec == SAMPLE

    def _behind(self, wanted: str) -> str | None:
        kind, colon, path = self.spec.partition(":")
        return path if colon and kind == wanted else None

    @property
    def path(self) -> Path | None:
        """The file or folder behind it; None where a name says it all."""
        named = self.messages or self.pictures or self.spec
        return None if named in (*NAMED_TEXTS, OWN, SAMPLE) else Path(named).expanduser()


def parse_texts(given: Texts) -> tuple[Source, ...]:
    """The sources of a text or of several, with shares that add up to 1.

    Raises:
        TextError: nothing is named, a share is none, or they do not add up.
    """
    named = [str(given)] if isinstance(given, str | Path) else [str(one) for one in given]
    parted = [_parted(one) for one in named]
    if not parted or not all(spec.strip() for spec, _ in parted):
        raise TextError(
            f"text {in_words(given)!r} names nothing: give one such as wiki, or wiki=0.6 and code.jsonl=0.4"
        )
    shares = [share for _, share in parted if share is not None]
    total, silent = sum(shares), len(parted) - len(shares)
    off = total >= 1 if silent else abs(total - 1) > _ROUNDING
    if off or any(not share > 0 for share in shares):
        rest = " and leave something for those without one" if silent else ""
        raise TextError(
            f"the shares of {in_words(given)} add up to {total:g}; expected shares above 0 that add up to 1{rest}"
        )
    each = (1 - total) / silent if silent else 0.0
    scale = 1.0 if silent else 1 / total
    return tuple(Source(spec, each if share is None else share * scale) for spec, share in parted)


def check_texts(given: Texts) -> None:
    """Raise a TextError, before anything is read, for what `parse_texts` refuses and for files that are not there."""
    for source in parse_texts(given):
        try:
            exists = source.path is None or source.path.exists()
        except PermissionError as error:
            raise TextError(f"{source.spec!r} may not be read: {error.strerror}") from None
        except (OSError, RuntimeError):  # too long for a name, or of a home that nobody has
            raise unknown_text(f"{source.spec[:60]}…" if len(source.spec) > 60 else source.spec) from None
        if not exists:
            if source.pictures is not None:
                raise TextError(f"{source.spec!r}: no such folder; give one that holds pictures")
            raise unknown_text(source.spec)


def _parted(given: str) -> tuple[str, float | None]:
    """`wiki=0.4` → `("wiki", 0.4)`; what stands after the last `=` of a path need not be a share."""
    spec, equals, share = given.rpartition("=")
    try:
        number = float(share) if equals else math.nan
    except ValueError:
        number = math.nan
    return (given, None) if math.isnan(number) else (spec, number)


def in_words(given: Texts) -> str:
    """The sources as they were given, in a line."""
    return str(given) if isinstance(given, str | Path) else " + ".join(map(str, given))


def texts_identity(given: Texts) -> list[list[Any]]:
    """The sources, and what their files hold; the name of a text that Tawny knows says that."""
    identity = []
    for source in parse_texts(given):
        file = source.path
        held = hashlib.sha256(file.read_bytes()).hexdigest() if file is not None and file.is_file() else None
        identity.append([source.spec, source.share, held])
    return identity


@dataclass(frozen=True)
class TextMixture:
    """Texts and their shares; most often one text and 1."""

    texts: tuple[Text, ...]
    shares: tuple[float, ...] = (1.0,)

    @property
    def name(self) -> str:
        if len(self.texts) == 1:
            return self.texts[0].name
        return " + ".join(
            f"{100 * share:.3g} % {text.name}" for text, share in zip(self.texts, self.shares, strict=True)
        )

    @property
    def sha256(self) -> str:
        if len(self.texts) == 1:
            return self.texts[0].sha256
        lines = [f"{share:.9f} {text.sha256}" for text, share in zip(self.texts, self.shares, strict=True)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def characters(self) -> int:
        return sum(len(text.text) for text in self.texts)

    def about(self, tokens: Sequence[int]) -> dict[str, Any]:
        """For a record: names, hashes and sizes; `tokens` are those of each text."""
        facts: dict[str, Any] = {"name": self.name, "sha256": self.sha256, "tokens": sum(tokens)}
        if len(self.texts) > 1 or self.texts[0].written:
            facts["sources"] = [
                {"name": text.name, "share": share, "sha256": text.sha256, "tokens": count}
                | ({"written": dict(text.written)} if text.written else {})
                for text, share, count in zip(self.texts, self.shares, tokens, strict=True)
            ]
        return facts


def load_texts(
    given: Texts,
    role: Role = "calibration",
    tokenizer: Any = None,
    own: Callable[[float], Text] | None = None,
) -> TextMixture:
    """The texts behind names and paths.

    Args:
        tokenizer: whose chat template renders messages.
        own: lets the dense model write the text of `self` for a share of what is read; None where no dense model is at hand.

    Raises:
        TextError: shares that do not add up; a text that is unknown, unreadable, empty or out of reach.
    """
    check_texts(given)  # before the dense model writes hours of it
    sources = parse_texts(given)
    texts = []
    for source in sources:
        if source.is_pictures:
            raise TextError(
                f"{source.spec!r} names pictures, and this model reads text: give a text such as wiki"
            )
        if source.spec == OWN:
            if own is None:
                raise TextError(
                    "text 'self' needs a dense language model that writes it, and none is at hand: give another text (`tawny eval --against` and "
                    "`tawny recover --teacher` name one)"
                )
            texts.append(own(source.share))
        elif source.messages is not None:
            texts.append(_chat(source.messages, source.spec, tokenizer))
        else:
            texts.append(load_text(source.spec, role))
    return TextMixture(tuple(texts), tuple(source.share for source in sources))


def _chat(path: str, name: str, tokenizer: Any) -> Text:
    """Conversations, one a line, each `{"messages": [{"role", "content"}, …]}`, rendered one by one."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise TextError(
            f"text {name!r} is rendered by the model's chat template, and this model's tokenizer has none: give plain text"
        )
    documents = []
    begins = first_token(tokenizer, None) is not None  # with BOS, as windows then do anyway
    for number, line in json_lines(path, name):
        messages = line.get("messages") if isinstance(line, dict) else None
        if not isinstance(messages, list) or not messages:
            raise TextError(
                f"text {name!r}, line {number}: expected a JSON object with a list under 'messages'"
            )
        try:
            text = rendered(tokenizer, messages)
        except TextError as error:
            raise TextError(f"text {name!r}, line {number}: {error}") from None
        documents.append(text.removeprefix(tokenizer.bos_token) if begins else text)
    if not documents:
        raise TextError(f"text {name!r} holds no messages: expected one JSON object with 'messages' a line")
    return joined(name, documents)


def rendered(tokenizer: Any, messages: Sequence[Any]) -> str:
    """A conversation as the model's chat template writes it, on one day for ever where the template takes one.

    Raises:
        TextError: the template refuses a role or an order, in words of its own.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=_DAY)
    except Exception as error:  # what a template raises is its author's choice
        raise TextError(f"the chat template refuses its messages ({first_line(error)[:160]})") from None
    return printable(text)


def first_token(tokenizer: Any, bos: bool | None) -> int | None:
    """BOS where windows begin with it: if that is asked for, or the tokenizer begins a text with it."""
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos and token is None:
        raise RecipeError("bos: true given, but this tokenizer has no BOS: leave it out")
    if token is None or bos is False:
        return None
    if bos is None and tokenizer("a", return_attention_mask=False, verbose=False)["input_ids"][:1] != [token]:
        return None
    return int(token)
