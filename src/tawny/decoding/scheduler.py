"""Continuous batching: requests join a running batch and leave it between two steps.

    scheduler = Scheduler(model, tokenizer, capacity=4096, count=8)
    job = scheduler.submit(request, print)
    while scheduler.busy:
        scheduler.turn()

A turn is: waiting requests take free places, first come first; one of the prompts that are not read is read on by one
chunk; every text whose prompt is read grows by one token. So a long prompt costs the others one chunk a turn, and prompts
take turns, too (chunked prefill: Agrawal et al. 2023, SARATHI).

A listener is told each token, and once why the text ended or what went wrong. It is called inside `turn` and must be
quick. What goes wrong in one text ends that text alone. One thread may use a scheduler, under `torch.inference_mode()`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tawny.decoding.sampling import Likelihood, Sampler, likelihood
from tawny.decoding.sequences import Sequence, Sequences
from tawny.decoding.text import StopStrings, TextPieces, Tokenizer, end_tokens
from tawny.errors import TextError
from tawny.model.context import check_ids, longest_text, words_of

# Tokens of a prompt that are read in one turn: beside texts that wait for their next token, and where there are none.
_CHUNK, _ALONE = 64, 512
_LOGITS = 1 << 29  # numbers that the likelihoods of a prompt may be made of at once


@dataclass(frozen=True)
class TextRequest:
    """One text to be made.

    ids: its prompt `[tokens]`.
    choose: used by this request alone.
    most: tokens to make at most; None for as many as there is room for.
    stops: strings before which the text ends.
    likelihoods: how many of the likeliest tokens are told with each; None for no likelihoods.
    of_prompt: tell the likelihoods of the prompt's tokens, too, before the first token, and that of the token that ends the
        text. They need a forward of their own over the whole prompt, for which the others wait.
    special: whether special tokens are part of the text.
    continues: whether the text continues that of the prompt; the answer of a chat does not.
    """

    ids: Tensor
    choose: Sampler
    most: int | None = None
    stops: tuple[str, ...] = ()
    likelihoods: int | None = None
    of_prompt: bool = False
    special: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Token:
    """One more token and the text it made whole; `id` is None where only text that was held back comes."""

    id: int | None
    text: str
    likelihood: Likelihood | None = None


@dataclass(frozen=True)
class Usage:
    """How a text ended: `stop` (the model ended it, or a stop string came), `length`, or `context` (no room is left).

    cached: tokens of the prompt that were found in the prefix cache.
    """

    finish: str
    prompt: int
    cached: int
    made: int


# What a listener is told: the prompt's likelihoods (the first token has none), tokens, and at last how it ended.
Event = list[Likelihood | None] | Token | Usage | Exception
Listener = Callable[[Event], None]


class ScheduledText:
    """A request that waits or runs."""

    def __init__(
        self, request: TextRequest, listener: Listener, room: int, tokenizer: Tokenizer | None
    ) -> None:
        self.request, self.tell = request, listener
        self.room = room if request.most is None else min(room, request.most)
        self.finish = "length" if self.room == request.most else "context"
        before = request.ids.tolist() if request.continues else []
        self.text, self.stops = TextPieces(tokenizer, request.special, before), StopStrings(request.stops)
        self.sequence: Sequence | None = None
        self.asks = request.of_prompt  # still wants the prompt's likelihoods
        self.last: int | None = None  # the token that its next step is made with
        self.made = self.cached = 0
        self.over = False

    @property
    def reading(self) -> bool:
        return self.last is None


class Scheduler:
    """Requests to one model, at most `count` of them at once.

    capacity: tokens of a prompt and its text together, at most.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer | None, capacity: int, count: int) -> None:
        limit = longest_text(model)
        self.model, self.tokenizer = model, tokenizer
        self.capacity = capacity if limit is None else min(capacity, limit)
        self.sequences = Sequences(model, self.capacity, count)
        self.count = self.sequences.count
        self.ends = end_tokens(model, tokenizer)
        self.waiting: deque[ScheduledText] = deque()
        self.running: list[ScheduledText] = []

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def check(self, request: TextRequest) -> None:
        """Refuse what cannot be made; any thread may ask.

        Raises:
            TextError: the prompt leaves no room for a token, is too long for its likelihoods, or has ids that the model
                has not.
        """
        length, words = len(request.ids), words_of(self.model)
        if length >= self.capacity:
            raise TextError(f"the prompt has {length} tokens and the context is {self.capacity}; shorten it")
        if request.of_prompt and length > _LOGITS // words:
            raise TextError(
                f"the prompt has {length} tokens, and likelihoods are made of at most {_LOGITS // words}; shorten it"
            )
        check_ids(self.model, request.ids)

    def submit(self, request: TextRequest, listener: Listener) -> ScheduledText:
        """Let a request that was checked wait for its turn."""
        job = ScheduledText(request, listener, self.capacity - len(request.ids), self.tokenizer)
        self.waiting.append(job)
        return job

    def cancel(self, job: ScheduledText) -> None:
        """Forget a request, wherever it is; its listener is told nothing more."""
        if not job.over:
            if job in self.waiting:
                self.waiting.remove(job)
            self._leave(job)

    def close(self, reason: Exception) -> None:
        """End every request with a reason."""
        for job in (*self.running, *self.waiting):
            self._fail(job, reason)
        self.waiting.clear()

    def turn(self) -> None:
        """Let requests join, read one chunk of one prompt, and make one token of each text."""
        while self.waiting and len(self.running) < self.count:
            self.running.append(self.waiting.popleft())
        growing = [job for job in self.running if not job.reading]
        reading = next((job for job in self.running if job.reading), None)
        if reading is not None:
            # Behind the others, so that each prompt has its turn.
            self.running.remove(reading)
            self.running.append(reading)
            try:
                logits = self._read(reading, _CHUNK if growing else _ALONE)
                if logits is not None:
                    self._take(reading, logits)
            except Exception as error:
                self._fail(reading, error)
        if growing:
            self._step(growing)

    def _read(self, job: ScheduledText, most: int) -> Tensor | None:
        """Logits `[vocabulary]` after the whole prompt, if this chunk was its last."""
        if job.asks:
            likelihoods, logits = _likelihoods(self.model, job.request.ids, job.request.likelihoods or 0)
            job.tell(likelihoods)
            job.asks = False
            if job.room < 2:  # the next token, or none: this forward is enough for it
                return logits
        if job.sequence is None:
            job.sequence = self.sequences.begin(job.request.ids)
        read = self.sequences.read(job.sequence, most)
        job.cached = job.sequence.cached
        return read

    def _step(self, jobs: list[ScheduledText]) -> None:
        if not self.sequences.together:  # what goes wrong with one says nothing of the others
            for job in jobs:
                self._step_together([job])
        else:
            self._step_together(jobs)

    def _step_together(self, jobs: list[ScheduledText]) -> None:
        tokens = {job.sequence: job.last for job in jobs if job.sequence is not None and job.last is not None}
        try:
            logits = self.sequences.step(tokens)
        except Exception as error:
            for job in jobs:
                self._fail(job, error)
            return
        for job in jobs:
            assert job.sequence is not None
            try:
                self._take(job, logits[job.sequence])
            except Exception as error:
                self._fail(job, error)

    def _take(self, job: ScheduledText, logits: Tensor) -> None:
        """Choose the next token, and tell it, or how the text ended."""
        if job.room == 0:
            return self._end(job, job.finish)
        token, count = job.request.choose(logits), job.request.likelihoods
        chosen = None if count is None else likelihood(logits, token, count)
        if token in self.ends:
            if job.request.of_prompt:
                job.tell(Token(token, "", chosen))
            return self._end(job, "stop")
        job.last = token
        job.made += 1
        job.tell(Token(token, job.stops.add(job.text.add(token)), chosen))
        if job.stops.found or job.request.choose.over:
            self._end(job, "stop")
        elif job.made == job.room:
            self._end(job, job.finish)

    def _end(self, job: ScheduledText, finish: str) -> None:
        if not job.stops.found:
            rest = job.stops.add(job.text.rest())
            if rest := rest + job.stops.rest():
                job.tell(Token(None, rest))
        self._leave(job)
        job.tell(Usage("stop" if job.stops.found else finish, len(job.request.ids), job.cached, job.made))

    def _fail(self, job: ScheduledText, error: Exception) -> None:
        self._leave(job)
        job.tell(error)

    def _leave(self, job: ScheduledText) -> None:
        job.over = True
        if job in self.running:
            self.running.remove(job)
        if job.sequence is not None:
            self.sequences.end(job.sequence)
            job.sequence = None


def _likelihoods(model: Any, ids: Tensor, count: int) -> tuple[list[Likelihood | None], Tensor]:
    """Of each token of a prompt after those before it, and the logits `[vocabulary]` after the last."""
    logits = model(input_ids=ids[None].to(next(model.parameters()).device), use_cache=False).logits[0]
    rows = [likelihood(row, token, count) for row, token in zip(logits, ids[1:].tolist(), strict=False)]
    return [None, *rows], logits[-1]
