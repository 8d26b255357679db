"""From what a client asks to requests of the worker, and from the worker's events to the protocol's objects.

`Service` prepares: it renders, tokenises, checks, and gives requests beside an `Answer`. An answer takes the events of its
requests one by one; it returns the chunks that a stream sends for each, and has the whole object at the end.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tawny.decoding.sampling import Constraint, Likelihood, Sampler
from tawny.decoding.scheduler import TextRequest, Token, Usage
from tawny.decoding.text import TextPieces, decode, end_tokens, tokens_of
from tawny.errors import CheckpointError, one_line
from tawny.model.context import words_of
from tawny.serving.grammar import Grammars, GrammarState, of_schema
from tawny.serving.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    NamedTool,
    Refused,
    SamplingFields,
    Tool,
)
from tawny.serving.tools import Beginning, CallFormat, Watched

Json = dict[str, Any]
_TOO_LONG = "context_length_exceeded"  # by which clients know that shorter messages may do
_BYTE = re.compile("<0x[0-9A-F]{2}>")  # of a vocabulary that falls back on bytes


class Answer(Protocol):
    """What a client gets for its requests, which are numbered from 0.

    tells_usage: whether a stream ends with its usage.
    """

    tells_usage: bool

    def opening(self) -> Iterable[Json]:
        """Chunks before the first event."""

    def add(self, index: int, event: list[Likelihood | None] | Token | Usage) -> Iterable[Json]:
        """Chunks for one event."""

    def usage_chunk(self) -> Json: ...

    def whole(self) -> Json: ...


class Service:
    """One model, its tokenizer, and its name to clients. One thread at a time may prepare.

    capacity: tokens of a prompt and its text, at most.
    most: texts that there is room for, running and waiting.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str, capacity: int, most: int) -> None:
        self.model, self.tokenizer, self.name, self.capacity = model, tokenizer, name, capacity
        self.most = most
        self.ends, self.words = end_tokens(model, tokenizer), words_of(model)
        self._front: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
        self._shown: dict[int, str] = {}  # of each token so far: a prompt's logprobs ask for thousands

    @functools.cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.words, self.ends)

    @functools.cached_property
    def calls(self) -> CallFormat:
        return CallFormat.learn(self.tokenizer, self.ends)

    @functools.cached_property
    def _most_characters(self) -> int:
        """That any text in the context may have."""
        return self.capacity * max(map(len, self.tokenizer.get_vocab()))

    def _check_length(self, characters: int, param: str) -> None:
        """Refuse what is far too long before it is tokenised, for which all other requests would wait."""
        if characters > self._most_characters:
            said = (
                f"the prompt has {characters} characters, far more than the context of {self.capacity} tokens"
            )
            raise Refused(f"{said}; shorten it", param=param, code=_TOO_LONG)

    def _check_room(self, tokens: int, param: str) -> None:
        """Refuse what leaves no room for a token before a sampler is made for each choice."""
        if tokens >= self.capacity:
            said = f"the prompt has {tokens} tokens and the context is {self.capacity}"
            raise Refused(f"{said}; shorten it", param=param, code=_TOO_LONG)

    def chat(self, asked: ChatRequest) -> tuple[list[TextRequest], Answer]:
        """
        Raises:
            Refused: the model or the template cannot do what is asked.
        """
        self._check(asked, asked.n)
        tools = [] if asked.tool_choice == "none" else asked.tools
        shown: list[ChatMessage | Tool] = [*asked.messages, *tools]
        self._check_length(sum(map(_characters, shown)), "messages")
        calls = self.calls if tools else None
        try:
            ids, _ = tokens_of(
                [message.for_template() for message in asked.messages],
                self.tokenizer,
                True,
                [tool.model_dump(exclude_none=True) for tool in tools],
                most=self._most_characters,
            )
        except CheckpointError:
            raise Refused("the model has no chat template; use /v1/completions", param="messages") from None
        except Exception as error:  # a template is a program, and a tokenizer takes no half of a character
            raise Refused(f"the messages cannot be read: {one_line(error)}", param="messages") from None
        self._check_room(len(ids), "messages")
        constraint = self._constraint(asked)
        requests = [
            TextRequest(
                ids,
                self._sampler(asked, ids, number, constraint and constraint.copy()),
                asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens,
                tuple(asked.stop),
                (asked.top_logprobs or 0) if asked.logprobs else None,
                special=calls is not None and calls.special,
            )
            for number in range(asked.n)
        ]
        return requests, _Chat(self, asked, calls)

    def complete(self, asked: CompletionRequest) -> tuple[list[TextRequest], Answer]:
        """
        Raises:
            Refused: the model cannot do what is asked.
        """
        self._check(asked, len(asked.prompt) * asked.n)
        requests, prompts = [], []
        longest = max((len(prompt) for prompt in asked.prompt if isinstance(prompt, str)), default=0)
        self._check_length(longest, "prompt")
        for prompt in asked.prompt:
            if not isinstance(prompt, str):
                self._check_room(len(prompt), "prompt")
                unknown = [token for token in prompt if not 0 <= token < self.words]
                if unknown:
                    raise Refused(f"the prompt has token id {unknown[0]} of {self.words}", param="prompt")
            try:
                given = prompt if isinstance(prompt, str) else torch.tensor(prompt, dtype=torch.long)
                ids, _ = tokens_of(given, self.tokenizer, False)
            except Exception as error:
                raise Refused(f"the prompt cannot be read: {one_line(error)}", param="prompt") from None
            self._check_room(len(ids), "prompt")
            text = prompt if isinstance(prompt, str) else decode(self.tokenizer, prompt, special=True)
            prompts += [(text, ids.tolist())] * asked.n
            requests += [
                TextRequest(
                    ids,
                    self._sampler(asked, ids, number, None),
                    asked.max_tokens,
                    tuple(asked.stop),
                    asked.logprobs,
                    of_prompt=asked.echo and asked.logprobs is not None,
                    continues=True,
                )
                for number in range(asked.n)
            ]
        return requests, _Completion(self, asked, prompts)

    def check_name(self, name: str) -> None:
        """Refuse a model that is not this one."""
        if name != self.name:
            said = f"the model {name!r} is not served here; {self.name!r} is"
            raise Refused(said, 404, param="model", code="model_not_found")

    def _check(self, asked: SamplingFields, texts: int) -> None:
        self.check_name(asked.model)
        if texts > self.most:
            raise Refused(f"{texts} texts in one request are more than the {self.most} there is room for")
        beyond = [token for token in asked.logit_bias if token >= self.words]
        if beyond:
            raise Refused(f"logit_bias names token {beyond[0]} of {self.words}", param="logit_bias")

    def _sampler(
        self, asked: SamplingFields, prompt: torch.Tensor, number: int, constraint: Constraint | None
    ) -> Sampler:
        seed = secrets.randbits(63) if asked.seed is None else asked.seed
        return Sampler(
            asked.temperature,
            asked.top_p,
            (seed + number) % 2**63,
            top_k=asked.top_k,
            min_p=asked.min_p,
            presence_penalty=asked.presence_penalty,
            frequency_penalty=asked.frequency_penalty,
            repetition_penalty=asked.repetition_penalty,
            logit_bias=asked.logit_bias,
            constraint=constraint,
            prompt=prompt,
        )

    def _constraint(self, asked: ChatRequest) -> GrammarState | Watched | None:
        wanted = asked.response_format
        if wanted is not None and wanted.type != "text":
            described = wanted.json_schema
            schema = {"type": "object"} if described is None else described.schema_
            grammar = of_schema(schema, strict=described is not None and described.strict is True)
            return self.grammars.form(grammar, "response_format")
        if not asked.tools or asked.tool_choice == "none":
            return None
        functions = [tool.function for tool in asked.tools]
        if isinstance(asked.tool_choice, NamedTool):
            functions = [f for f in functions if f.name == asked.tool_choice.function.name]
        several = asked.parallel_tool_calls and not isinstance(asked.tool_choice, NamedTool)
        inside = self.calls.grammar(functions, self.grammars, self.tokenizer, several)
        if asked.tool_choice in (None, "auto"):
            return Watched(self.calls.begin, self.grammars.form(inside, "tools"), self.tokenizer)
        whole = self.calls.whole_grammar(inside, self.grammars, self.tokenizer)
        return self.grammars.form(whole, "tools")

    def word(self, token: int) -> str:
        """A token's text, with the space that it begins with."""
        if token not in self._shown:
            # Some decoders drop a space from the front of whatever they are given.
            front = decode(self.tokenizer, self._front, special=True)
            both = decode(self.tokenizer, [*self._front, token], special=True)
            alone = None if both.startswith(front) else decode(self.tokenizer, [token], special=True)
            self._shown[token] = both[len(front) :] if alone is None else alone
        return self._shown[token]

    def bytes_of(self, token: int) -> list[int] | None:
        """UTF-8 of a token's text, or of its part of a character; None where the vocabulary does not tell that."""
        word = self.word(token)
        if "�" not in word:
            return list(word.encode())
        entry = self.tokenizer.convert_ids_to_tokens(token)
        spelled = bytes.fromhex(entry[3:5]) if _BYTE.fullmatch(entry) else _bytes_of_letters(entry)
        return list(spelled) if spelled.decode(errors="replace") == word else None

    def lengths(self, text: str, ids: list[int]) -> list[int]:
        """How many characters of a prompt each of its tokens makes whole."""
        pieces, count, lengths = TextPieces(self.tokenizer, special=True), 0, []
        for token in ids:
            # The tokenizer may have put something before the text, as a token that begins it.
            added = not text.startswith(self.word(token), count) and not decode(self.tokenizer, [token])
            lengths.append(0 if added else len(pieces.add(token)))
            count += lengths[-1]
        return lengths


def _characters(part: ChatMessage | Tool) -> int:
    """That a template writes for it, at least."""
    if isinstance(part, Tool):
        function = part.function
        written = json.dumps(function.parameters, ensure_ascii=False)
        return len(function.name) + len(function.description or "") + len(written)
    called = [call.function for call in part.tool_calls]
    return len(part.role) + len(part.content or "") + sum(len(f.name) + len(f.arguments) for f in called)


def _bytes_of_letters(entry: str) -> bytes:
    """The bytes that a vocabulary of bytes writes as letters, as GPT-2's does; empty for any other vocabulary."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain} | {chr(256 + at): byte for at, byte in enumerate(others)}
    return bytes(letters[letter] for letter in entry) if letters.keys() >= {*entry} else b""


def _finish(usage: Usage) -> str:
    return "length" if usage.finish == "context" else usage.finish


class _Common:
    """What both kinds of answers have: a head, choices, usage."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, service: Service, asked: SamplingFields) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.usages: dict[int, Usage] = {}  # of each choice
        self.tells_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def _head(self, kind: str) -> Json:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}

    def _chunk(self, choice: Json) -> Json:
        chunk = self._head(self.chunk_kind) | {"choices": [choice]}
        return chunk | {"usage": None} if self.tells_usage else chunk

    def usage_chunk(self) -> Json:
        return self._head(self.chunk_kind) | {"choices": [], "usage": self._usage()}

    def _usage(self) -> Json:
        # A prompt that several choices share counts once.
        read = [usage for index, usage in self.usages.items() if index % self.asked.n == 0]
        prompt, cached = sum(usage.prompt for usage in read), sum(usage.cached for usage in read)
        completed = sum(usage.made for usage in self.usages.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completed,
            "total_tokens": prompt + completed,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


# --- chat --------------------------------------------------------------------------------------------------------


@dataclass
class _Reply:
    """One choice of a chat."""

    beginning: Beginning | None  # holds back what may be the beginning of a call
    text: str = ""
    sent: int = 0  # characters of it
    logprobs: list[Json] = field(default_factory=list)
    calls: list[Json] = field(default_factory=list)
    finish: str = ""


class _Chat(_Common):
    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, service: Service, asked: ChatRequest, calls: CallFormat | None) -> None:
        super().__init__(service, asked)
        self.format, self.several, self.logprobs = calls, asked.parallel_tool_calls, asked.logprobs
        self.replies = [_Reply(None if calls is None else Beginning(calls.begin)) for _ in range(asked.n)]

    def opening(self) -> Iterable[Json]:
        return [self._delta(index, {"role": "assistant", "content": ""}) for index in range(self.asked.n)]

    def _delta(self, index: int, delta: Json, finish: str | None = None, logprobs: Any = None) -> Json:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish})

    def add(self, index: int, event: list[Likelihood | None] | Token | Usage) -> Iterable[Json]:
        reply = self.replies[index]
        if isinstance(event, Token):
            reply.text += event.text
            safe = event.text if reply.beginning is None else reply.beginning.add(event.text)
            reply.sent += len(safe)
            told = None
            if event.likelihood is not None and event.id is not None:
                told = {"content": [_told(self.service, event.id, event.likelihood)]}
                reply.logprobs += told["content"]
            if safe or told:
                yield self._delta(index, {"content": safe}, logprobs=told)
        elif isinstance(event, Usage):
            self.usages[index] = event
            reply.finish = _finish(event)
            if self.format is not None:
                yield from self._called(index, reply, self.format)
            yield self._delta(index, {}, reply.finish)

    def _called(self, index: int, reply: _Reply, format: CallFormat) -> Iterable[Json]:
        whole = reply.text
        reply.text, calls = format.parse(whole)
        if not calls:
            if len(whole) > reply.sent:
                yield self._delta(index, {"content": whole[reply.sent :]})
            return
        if reply.finish == "stop":
            reply.finish = "tool_calls"
        for number, call in enumerate(calls if self.several else calls[:1]):
            function = {"name": call.name, "arguments": call.arguments}
            # Nine letters and digits: some templates refuse others when the call is sent back.
            reply.calls.append({"id": uuid.uuid4().hex[:9], "type": "function", "function": function})
            yield self._delta(index, {"tool_calls": [{"index": number, **reply.calls[-1]}]})

    def whole(self) -> Json:
        choices = []
        for index, reply in enumerate(self.replies):
            message: Json = {"role": "assistant", "content": reply.text, "refusal": None}
            if reply.calls:
                message |= {"content": reply.text or None, "tool_calls": reply.calls}
            logprobs = {"content": reply.logprobs, "refusal": None} if self.logprobs else None
            choices.append(
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish}
            )
        return self._head(self.kind) | {"choices": choices, "usage": self._usage()}


def _told(service: Service, token: int, likelihood: Likelihood) -> Json:
    def entry(number: int, logprob: float) -> Json:
        return {"token": service.word(number), "logprob": logprob, "bytes": service.bytes_of(number)}

    tops = [entry(*each) for each in likelihood.top]
    return entry(token, likelihood.logprob) | {"top_logprobs": tops}


# --- completions ---------------------------------------------------------------------------------------------------


@dataclass
class _Text:
    """One choice of a completion."""

    pieces: TextPieces
    text: str = ""
    finish: str = ""
    logprobs: Json = field(
        default_factory=lambda: {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    )
    offset: int = 0  # in the text, of the next token


class _Completion(_Common):
    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(
        self, service: Service, asked: CompletionRequest, prompts: Sequence[tuple[str, list[int]]]
    ) -> None:
        super().__init__(service, asked)
        self.prompts, self.echo, self.tells = prompts, asked.echo, asked.logprobs is not None
        self.texts = [_Text(TextPieces(service.tokenizer, after=ids)) for _, ids in prompts]

    def opening(self) -> Iterable[Json]:
        if not self.echo:
            return
        for index, (text, _) in enumerate(self.prompts):
            self.texts[index].text = text
            if not self.tells:
                yield self._piece(index, text)

    def _piece(self, index: int, text: str, logprobs: Json | None = None, finish: str | None = None) -> Json:
        return self._chunk({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish})

    def add(self, index: int, event: list[Likelihood | None] | Token | Usage) -> Iterable[Json]:
        made = self.texts[index]
        if isinstance(event, list):
            text, ids = self.prompts[index]
            lengths = self.service.lengths(text, ids)
            yield self._piece(index, text, self._tell(made, ids, event, lengths))
            made.offset = len(text)
        elif isinstance(event, Token):
            made.text += event.text
            told = None
            if self.tells and event.id is not None:
                length = len(made.pieces.add(event.id))
                told = self._tell(made, [event.id], [event.likelihood], [length])
            if event.text or told:
                yield self._piece(index, event.text, told)
        else:
            self.usages[index] = event
            made.finish = _finish(event)
            yield self._piece(index, "", finish=made.finish)

    def _tell(
        self, made: _Text, ids: list[int], likelihoods: Sequence[Likelihood | None], lengths: list[int]
    ) -> Json:
        """The logprobs of these tokens, which are added to the choice's."""
        logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, likelihood, length in zip(ids, likelihoods, lengths, strict=True):
            word = self.service.word(token)
            top: dict[str, float] | None = None
            if likelihood is not None:
                top = {}  # of two tokens that look alike the likelier one
                for number, logprob in (*likelihood.top, (token, likelihood.logprob)):
                    top.setdefault(self.service.word(number), logprob)
            logprobs["tokens"].append(word)
            logprobs["token_logprobs"].append(None if likelihood is None else likelihood.logprob)
            logprobs["top_logprobs"].append(top)
            logprobs["text_offset"].append(made.offset)
            made.offset += length
        for key, values in logprobs.items():
            made.logprobs[key] += values
        return logprobs

    def whole(self) -> Json:
        choices = [
            {
                "index": index,
                "text": text.text,
                "logprobs": text.logprobs if self.tells else None,
                "finish_reason": text.finish,
            }
            for index, text in enumerate(self.texts)
        ]
        return self._head(self.kind) | {"choices": choices, "usage": self._usage()}
