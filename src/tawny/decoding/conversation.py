"""A conversation with one model: what was said before is read once, as far as the prefix cache holds it."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import torch

from tawny.decoding import opening
from tawny.decoding.sampling import Sampler
from tawny.decoding.scheduler import Event, Scheduler, TextRequest, Token, Usage
from tawny.decoding.text import Message, check_prompt, tokens_of
from tawny.errors import TextError
from tawny.model.context import longest_text
from tawny.model.source import load_tokenizer, resolve
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent

_CONTEXT = 8192  # tokens of a conversation, where the model's context is longer


class Conversation:
    """Arguments are those of `tawny.stream`; `system` is what the model is told first.

    `context` is the tokens of the conversation; None: the model's own, at most 8192.

    Attributes:
        finish: how the last answer ended, as `Usage` says it; None where it was closed early.
    """

    @opens_models
    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        max_tokens: int = 1024,
        context: int | None = None,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress = silent,
        trust_remote_code: bool = False,
    ) -> None:
        check_prompt(system or "")
        folder = resolve(model, progress.say)
        self.tokenizer, self.max_tokens, self.threads = load_tokenizer(folder), max_tokens, threads
        self.choose = Sampler(temperature, top_p, seed)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.kept = len(self.messages)  # that are never forgotten
        self.finish: str | None = None
        with opening.threads(threads):
            self.model = opening.open_model(folder).model
        most = longest_text(self.model)
        capacity = min(most or _CONTEXT, _CONTEXT) if context is None else min(context, most or context)
        with opening.ready(self.model) as lock, opening.alone(lock, self.threads):
            self.scheduler = Scheduler(self.model, self.tokenizer, capacity, 1)

    def say(self, text: str) -> Generator[str, None, None]:
        """The model's answer, piece by piece. Closed early, the answer ends there.

        Raises:
            TextError: the text alone is longer than the context; nothing is forgotten for it.
            CheckpointError: the model has no chat template.
        """
        check_prompt(text)
        self.finish = None
        ids = self._ids({"role": "user", "content": text})
        events: list[Event] = []
        answer = ""
        job = self.scheduler.submit(TextRequest(ids, self.choose, self.max_tokens), events.append)
        try:
            with opening.ready(self.model) as lock:
                while self.scheduler.busy:
                    with opening.alone(lock, self.threads):
                        self.scheduler.turn()
                    for event in events:
                        if isinstance(event, Exception):
                            raise event
                        if isinstance(event, Token) and event.text:
                            answer += event.text
                            yield event.text
                        if isinstance(event, Usage):
                            self.finish = event.finish
                    events.clear()
        finally:
            self.scheduler.cancel(job)
            self.messages.append({"role": "assistant", "content": answer})

    def _ids(self, question: Message) -> torch.Tensor:
        """The tokens with a new question; the oldest questions and answers are forgotten for room for an answer."""
        capacity = self.scheduler.capacity
        room = min(self.max_tokens, capacity // 4)
        first, old = self.messages[: self.kept], self.messages[self.kept :]
        while True:
            messages = [*first, *old, question]
            ids, _ = tokens_of(messages, self.tokenizer, True)
            if len(ids) + room <= capacity or not old:
                break
            del old[:2]
        if len(ids) >= capacity:
            raise TextError(f"the text has {len(ids)} tokens and the context is {capacity}; shorten it")
        self.messages = messages
        return ids
