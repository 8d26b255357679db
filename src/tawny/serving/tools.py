"""Calls of tools, in the format of the model's chat template.

The format is learnt: a call with a known name and known arguments is rendered, and what stands around them is the format.
The name of the model or of the format is never asked. A template whose arguments are not JSON is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tawny.decoding.text import TextPieces
from tawny.errors import first_line
from tawny.serving.grammar import Grammars, GrammarState, bounded
from tawny.serving.protocol import Function, Refused

_NAMES = ("tawny_first", "tawny_second")
_ARGUMENTS = {"tawny_key": "tawny_value"}
_ID = "tawnyid00"  # nine letters and digits, which some templates insist on
_TEXT = "☃"  # which no call begins with


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is not JSON")


_RAW = json.JSONDecoder(parse_constant=_no_constant)


class ParsedCall(NamedTuple):
    name: str
    arguments: str  # JSON


@dataclass(frozen=True)
class CallFormat:
    """What stands around names and arguments; `_ID` in it stands for any identifier.

    begin: before the first name. middle: between a name and its arguments. between: from one call's arguments to the next
    name; None where the template takes one call at once. end: after the last arguments. special: whether special tokens are
    part of it.
    """

    begin: str
    middle: str
    between: str | None
    end: str
    special: bool = False

    @staticmethod
    def learn(tokenizer: Any, ends: set[int]) -> CallFormat:
        """
        Raises:
            Refused: the template shows no tools, or writes calls in a way that has no names before JSON.
        """
        tools = [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": "",
                    "parameters": {"type": "object", "properties": {}},
                },
            }
            for name in _NAMES
        ]
        asked: dict[str, Any] = {"role": "user", "content": "?"}

        def render(count: int, **more: str) -> str:
            calls = [
                {"id": _ID, "type": "function", "function": {"name": name, "arguments": _ARGUMENTS}}
                for name in _NAMES[:count]
            ]
            said = {"role": "assistant", "content": ""} | ({"tool_calls": calls} if count else more)
            return str(
                tokenizer.apply_chat_template(
                    [asked, said], tools=tools, tokenize=False, add_generation_prompt=False
                )
            )

        try:
            plain = render(0, content=_TEXT)
            if _NAMES[0] not in plain:
                raise Refused("the model's chat template shows it no tools; leave 'tools' out", param="tools")
            one = render(1)
        except Refused:
            raise
        except Exception as error:  # templates are programs of others
            raise Refused(
                f"the model's chat template refuses tools: {first_line(error)}", param="tools"
            ) from None
        try:
            two = render(2)
        except Exception:  # it takes one call at once
            two = None
        start = _alike(plain, one)
        first = _pieces(one[start:], 1)
        second = first if two is None else _pieces(two[start:], 2)
        if first is None or second is None or not first[0].strip():
            raise Refused(
                "the model's chat template writes calls of tools in a way that is not supported; leave 'tools' out",
                param="tools",
            )
        words = [tokenizer.decode([end], skip_special_tokens=False) for end in sorted(ends)]
        end = min((first[2].split(word)[0] for word in words if word), key=len, default=first[2])
        begin, middle, end = first[0].strip(), first[1], end.rstrip()
        between = None if two is None else second[2]
        pieces = (begin, middle, between or "", end)
        special = any(word in piece for word in tokenizer.all_special_tokens for piece in pieces)
        return CallFormat(begin, middle, between, end, special)

    def parse(self, text: str) -> tuple[str, list[ParsedCall]]:
        """The text before the first call, and the calls."""
        begin, middle = _pattern(self.begin), _pattern(self.middle)
        between = None if self.between is None else _pattern(self.between)
        opening = begin.search(text)
        if opening is None:
            return text, []
        content, calls, at = text[: opening.start()], [], opening.end()
        while (named := middle.search(text, at)) is not None:
            name = text[at : named.start()]
            try:
                _, at = _RAW.raw_decode(text, named.end())
            except (ValueError, RecursionError):
                break
            # As the model wrote them: written anew, 1e400 would be no JSON.
            calls.append(ParsedCall(name, text[named.end() : at]))
            following = between and (between.match(text, at) or begin.search(text, at))
            if following is None:
                break
            at = following.end()
        return (content.strip(), calls) if calls else (text, [])

    def grammar(self, functions: list[Function], grammars: Grammars, tokenizer: Any, several: bool) -> str:
        """In Lark's notation of llguidance: what comes after `begin`."""
        write = _Writer(grammars, tokenizer)
        names = [f"call{i}" for i in range(len(functions))]
        again = f" ({write.text(self.between)} call)*" if several and self.between is not None else ""
        lines = [
            f"start: call{again} {write.text(self.end)}",
            f"call: {' | '.join(names)}",
            "ID: /[a-zA-Z0-9]{9}/",
        ]
        for name, function in zip(names, functions, strict=True):
            schema = json.dumps(bounded(function.parameters, bool(function.strict)))
            lines.append(f"{name}: {write.text(function.name + self.middle)} {name}_arguments")
            lines.append(f"{name}_arguments: %json {schema}")
        return "\n".join(lines)

    def whole_grammar(self, inside: str, grammars: Grammars, tokenizer: Any) -> str:
        """The same, from `begin` on."""
        begin = _Writer(grammars, tokenizer).text(self.begin)
        return inside.replace("start: ", f"start: {begin} ", 1)


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _pieces(text: str, count: int) -> tuple[str, str, str] | None:
    """What stands before the first name, between it and its arguments, and then up to the next name or the end."""
    at = text.find(_NAMES[0])
    if at < 0:
        return None
    behind = at + len(_NAMES[0])
    for brace in re.finditer(r"\{", text[behind:]):
        begin = behind + brace.start()
        try:
            arguments, end = _RAW.raw_decode(text, begin)
        except ValueError:
            continue
        if arguments == _ARGUMENTS:
            last = text.find(_NAMES[1], end) if count == 2 else len(text)
            return (text[:at], text[behind:begin], text[end:last]) if last >= 0 else None
    return None


def _atoms(piece: str) -> list[str]:
    """A piece of the format as patterns of one after the other, whatever spaces the model writes."""
    atoms = re.findall(rf"{_ID}|\s+|.", piece)
    return [r"[A-Za-z0-9_-]+" if x == _ID else r"\s*" if x.isspace() else re.escape(x) for x in atoms]


def _pattern(piece: str) -> re.Pattern[str]:
    return re.compile("".join(_atoms(piece)))


class Beginning:
    """Finds where a call begins in a text that comes in pieces; what may be the beginning of one is held back."""

    def __init__(self, begin: str) -> None:
        self._whole, self._atoms = _pattern(begin), [re.compile(atom) for atom in _atoms(begin)]
        self.held = ""
        self.behind: str | None = None  # what follows the beginning; None until there is one

    def add(self, piece: str) -> str:
        """The characters that are not part of it; none once it was found."""
        if self.behind is not None:
            self.behind += piece
            return ""
        text = self.held + piece
        if match := self._whole.search(text):
            self.held, self.behind = "", text[match.end() :]
            return text[: match.start()]
        at = next((at for at in range(len(text)) if self._may_begin(text, at)), len(text))
        self.held = text[at:]
        return text[:at]

    def _may_begin(self, text: str, at: int) -> bool:
        """Whether all that the text has from there on is the first part of a beginning."""
        for atom in self._atoms:
            match = atom.match(text, at)
            if match is None:
                return at == len(text)
            at = match.end()
        return False


class _Writer:
    """Writes text for a grammar, where special tokens are not text."""

    def __init__(self, grammars: Grammars, tokenizer: Any) -> None:
        self.special = {
            str(token): number
            for number, token in tokenizer.added_tokens_decoder.items()
            if grammars.tokenizer.is_special_token(number)
        }

    def text(self, text: str) -> str:
        stops = "|".join(map(re.escape, sorted([*self.special, _ID], key=len, reverse=True)))
        parts = [part for part in re.split(f"({stops})", text) if part]
        return " ".join(
            "ID"
            if part == _ID
            else f"<[{self.special[part]}]>"
            if part in self.special
            else json.dumps(part, ensure_ascii=False)
            for part in parts
        )


class Watched:
    """A text that is free until it begins a call, and then keeps the form of calls; a `Constraint` of the sampler."""

    def __init__(self, begin: str, form: GrammarState, tokenizer: Any) -> None:
        self.begin, self.form = begin, form
        self.beginning = Beginning(begin)
        self.pieces = TextPieces(tokenizer, special=True)
        self.inside = False

    def copy(self) -> Watched:
        """Another that nothing was taken of."""
        return Watched(self.begin, self.form.copy(), self.pieces.tokenizer)

    @property
    def over(self) -> bool:
        return self.inside and self.form.over

    def allowed(self) -> Tensor:
        return self.form.allowed() if self.inside else torch.ones(self.form.words, dtype=torch.bool)

    def take(self, token: int) -> None:
        if self.inside:
            return self.form.take(token)
        self.beginning.add(self.pieces.add(token))
        behind = self.beginning.behind
        if behind is not None:
            self.inside = self.form.starts_with(behind)
            self.beginning = Beginning(self.begin)
