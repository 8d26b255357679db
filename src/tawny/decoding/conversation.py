"""A conversation with one model: what was said before is read once, as far as the prefix cache holds it."""

from __future__ import annotations

__all__ = ["Conversation"]

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path

import torch

from tawny.calibration.context import context_of
from tawny.decoding import opening
from tawny.decoding.sampling import Sampler
from tawny.decoding.scheduler import Event, Request, Scheduler, Token
from tawny.decoding.text import Message, check_prompt, tokens_of
from tawny.errors import TextError
from tawny.model.source import load_tokenizer, resolve
from tawny.model.trust import opens_models
from tawny.progress import Progress, silent

_CONTEXT = 8192  # tokens of a conversation, where the model's context is longer


class Conversation:
    """Arguments are those of `tawny.stream`; `system` is what the model is told first."""

    @opens_models
    def __init__(
        self,
        model: str | Path,
        *,
        system: str | None = None,
        max_tokens: int = 1024,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress = silent,
        trust_remote_code: bool = False,
    ) -> None:
        folder = resolve(model, progress.say)
        self.tokenizer, self.max_tokens, self.threads = load_tokenizer(folder), max_tokens, threads
        self.choose = Sampler(temperature, top_p, seed)
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.kept = len(self.messages)  # that are never forgotten
        with opening.threads(threads):
            self.model = opening.open_model(folder).model
        capacity = min(context_of(self.model) or _CONTEXT, _CONTEXT)
        with opening.ready(self.model) as lock, self._alone(lock):
            self.scheduler = Scheduler(self.model, self.tokenizer, capacity, 1)

    @contextlib.contextmanager
    def _alone(self, lock: contextlib.AbstractContextManager[object]) -> Iterator[None]:
        with lock, torch.inference_mode(), opening.threads(self.threads):
            yield

    def say(self, text: str) -> Generator[str, None, None]:
        """The model's answer, piece by piece. Closed early, the answer ends there.

        Raises:
            TextError: the text alone is longer than the context.
            CheckpointError: the model has no chat template.
        """
        check_prompt(text)
        self.messages.append({"role": "user", "content": text})
        ids = self._ids()
        events: list[Event] = []
        answer = ""
        job = self.scheduler.submit(Request(ids, self.choose, self.max_tokens), events.append)
        try:
            with opening.ready(self.model) as lock:
                while self.scheduler.busy:
                    with self._alone(lock):
                        self.scheduler.turn()
                    for event in events:
                        if isinstance(event, Exception):
                            raise event
                        if isinstance(event, Token) and event.text:
                            answer += event.text
                            yield event.text
                    events.clear()
        finally:
            self.scheduler.cancel(job)
            self.messages.append({"role": "assistant", "content": answer})

    def _ids(self) -> torch.Tensor:
        """The conversation's tokens; the oldest question and answer are forgotten where it is too long."""
        while True:
            ids, _ = tokens_of(self.messages, self.tokenizer, True)
            if len(ids) < self.scheduler.capacity:
                return ids
            if len(self.messages) - self.kept < 2:
                self.messages.pop()
                raise TextError(
                    f"the text has {len(ids)} tokens and the context is {self.scheduler.capacity}; shorten it"
                )
            del self.messages[self.kept : self.kept + 2]
