"""A request while the worker makes its texts, and the two ways in which they are handed on: streamed or whole.

It may end in six ways: whole, streamed, refused, failed, timed out, or left by its client. In each of them the worker is told
to forget what still runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi.sse import EventSourceResponse, format_sse_event

from tawny.decoding import scheduler
from tawny.decoding.scheduler import Event, Token, Usage
from tawny.decoding.worker import Worker
from tawny.errors import Interrupted, TawnyError, UserError
from tawny.serving.answers import Answer
from tawny.serving.metrics import Metrics
from tawny.serving.protocol import Refused, error_body

# Proxies such as nginx would keep tokens until a buffer is full.
_STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LAST_WORDS = 5  # seconds in which a stream that took too long may say so


class Running:
    """The texts of one request while the worker makes them, and what they took.

    begin: when the request came, by `time.monotonic`: preparing it is a part of what its client waits for.
    deadline: when the whole request must be over, in the loop's time.
    """

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        requests: list[scheduler.TextRequest],
        begin: float,
        deadline: float,
    ) -> None:
        self.worker, self.metrics = worker, metrics
        self.loop, self.queue = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
        self.begin = begin
        self.deadline = deadline
        self.prompts = [len(request.ids) for request in requests]
        self.unfinished = set(range(len(requests)))
        self.failed = False
        self.firsts: dict[int, float] = {}  # when the first token of each came
        self.made = [0] * len(requests)  # tokens of each so far
        self.usages: list[Usage] = []
        listeners = [functools.partial(self._tell, index) for index in range(len(requests))]
        self.orders = worker.submit(requests, listeners)

    def _tell(self, index: int, event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, (index, event))

    def stop(self) -> None:
        """Whatever still runs ends, and what was made of it counts."""
        self.worker.cancel(self.orders)
        begun = [index for index in self.unfinished if self.made[index]]
        self.metrics.work(sum(self.prompts[i] for i in begun), sum(self.made[i] for i in begun))
        for _ in () if self.failed else self.unfinished:
            self.metrics.failed("cancelled")

    def late(self) -> None:
        """The request took too long, which counts once."""
        if not self.failed:
            self.metrics.failed("timeout")
        self.failed = True

    async def events(self) -> AsyncIterator[tuple[int, list[Any] | Token | Usage]]:
        """
        Raises:
            Refused: the request took too long.
            TawnyError: what went wrong in making a text.
        """
        while self.unfinished:
            try:
                async with asyncio.timeout_at(self.deadline):
                    index, event = await self.queue.get()
            except TimeoutError:
                self.late()
                raise late() from None
            if isinstance(event, Exception):
                self.failed = True
                self.metrics.failed("error")
                raise event
            if isinstance(event, Token):
                self.firsts.setdefault(index, time.monotonic())
                self.made[index] += event.id is not None
            if isinstance(event, Usage):
                self.unfinished.discard(index)
                self._count(index, event)
            yield index, event

    def _count(self, index: int, usage: Usage) -> None:
        self.usages.append(usage)
        first = self.firsts.get(index)
        seconds = 0.0 if first is None else time.monotonic() - first
        speed = (usage.made - 1) / seconds if usage.made > 1 and seconds else None
        whole = time.monotonic() - self.begin
        self.metrics.text(usage, whole, None if first is None else first - self.begin, speed)

    def said(self) -> str:
        """For the log: never a text."""
        if not self.usages:
            return f"{len(self.orders)} left unfinished"
        tokens, seconds = sum(usage.made for usage in self.usages), time.monotonic() - self.begin
        first = f", first after {min(self.firsts.values()) - self.begin:.2f} s" if self.firsts else ""
        return (
            f"{sum(usage.prompt for usage in self.usages)} tokens read ({sum(u.cached for u in self.usages)} cached), "
            f"{tokens} made{first}, {tokens / seconds:.1f} tokens/s, {'+'.join(sorted({u.finish for u in self.usages}))}"
        )


class Streamed(EventSourceResponse):
    """A stream that ends its request however it ends, even before its first chunk.

    A client that reads nothing holds `send` up, and with it whatever looks at the time. Its request ends; its connection
    stays until it goes.
    """

    def __init__(self, running: Running, answer: Answer, done: Callable[[], None]) -> None:
        super().__init__(_chunks(running, answer), headers=_STREAMED)
        self.running, self.done = running, done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout_at(self.running.deadline + _LAST_WORDS):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            self.running.late()
        finally:
            self.done()


async def _chunks(running: Running, answer: Answer) -> AsyncIterator[bytes]:
    # In ASCII: some clients take U+2028 for the end of a line, and so for the end of an event.
    def event(data: dict[str, Any]) -> bytes:
        return format_sse_event(data_str=json.dumps(data, separators=(",", ":")))

    for chunk in answer.opening():
        yield event(chunk)
    try:
        async for index, told in running.events():
            for chunk in answer.add(index, told):
                yield event(chunk)
        if answer.tells_usage:
            yield event(answer.usage_chunk())
    except Exception as error:  # the status is sent already
        refused = as_refused(error)
        yield event(error_body(refused.message, refused.status, refused.param, refused.code))
    yield format_sse_event(data_str="[DONE]")


async def whole(running: Running, answer: Answer) -> dict[str, Any]:
    for _ in answer.opening():
        pass
    async for index, event in running.events():
        for _ in answer.add(index, event):
            pass
    return answer.whole()


def late() -> Refused:
    refused = Refused("the request took longer than it may", 504, code="timeout")
    # openai's clients would ask twice more, and wait as long each time.
    refused.headers["X-Should-Retry"] = "false"
    return refused


def as_refused(error: BaseException) -> Refused:
    match error:
        case Refused():
            return error
        case Interrupted():
            return Refused(str(error), 503, code="ending")
        case UserError():
            return Refused(str(error))
        case TawnyError():
            return Refused(str(error), 500)
    return Refused(f"unexpected {type(error).__name__}", 500)
