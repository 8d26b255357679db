"""The application: paths of the OpenAI protocol, and what every request goes through.

A request is prepared beside the loop, given to the worker, and its events are awaited. It may end in six ways: whole,
streamed, refused, failed, timed out, or left by its client. In each of them the worker is told to forget what still runs.
"""

from __future__ import annotations

__all__ = ["make_app"]

import asyncio
import contextlib
import functools
import importlib.resources
import json
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.sse import EventSourceResponse, format_sse_event
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from tawny.decoding import scheduler
from tawny.decoding.scheduler import Event, Token, Usage
from tawny.decoding.worker import Full, Worker
from tawny.errors import Interrupted, TawnyError, UserError
from tawny.serving.answers import Answer, Service
from tawny.serving.metrics import Metrics
from tawny.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    Refused,
    SamplingFields,
    error_body,
    explain,
)

_MOST_WAIT = 60  # seconds that a client may be told to come back after
# Proxies such as nginx would keep tokens until a buffer is full.
_STREAMED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
_LAST_WORDS = 5  # seconds in which a stream that took too long may say so
# The page is one file: nothing is fetched from elsewhere, and no other site may frame it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"


Prepared = tuple[list[scheduler.Request], Answer]
Prepare = Callable[[], Prepared]


class Running:
    """The texts of one request while the worker makes them, and what they took.

    begin: when the request came, by `time.monotonic`: preparing it is a part of what its client waits for.
    deadline: when the whole request must be over, in the loop's time.
    """

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        requests: list[scheduler.Request],
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
                raise _late() from None
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
        made, seconds = sum(usage.made for usage in self.usages), time.monotonic() - self.begin
        first = f", first after {min(self.firsts.values()) - self.begin:.2f} s" if self.firsts else ""
        return (
            f"{sum(usage.prompt for usage in self.usages)} tokens read ({sum(u.cached for u in self.usages)} cached), "
            f"{made} made{first}, {made / seconds:.1f} tokens/s, {'+'.join(sorted({u.finish for u in self.usages}))}"
        )


class _Streamed(EventSourceResponse):
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
        refused = _as_refused(error)
        yield event(error_body(refused.message, refused.status, refused.param, refused.code))
    yield format_sse_event(data_str="[DONE]")


async def _whole(running: Running, answer: Answer) -> dict[str, Any]:
    for _ in answer.opening():
        pass
    async for index, told in running.events():
        for _ in answer.add(index, told):
            pass
    return answer.whole()


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _late() -> Refused:
    refused = Refused("the request took longer than it may", 504, code="timeout")
    # openai's clients would ask twice more, and wait as long each time.
    refused.headers["X-Should-Retry"] = "false"
    return refused


def _as_refused(error: BaseException) -> Refused:
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


def _refusal(refused: Refused) -> JSONResponse:
    body = error_body(refused.message, refused.status, refused.param, refused.code)
    return JSONResponse(body, refused.status, refused.headers)


def make_app(service: Service, worker: Worker, timeout: float) -> FastAPI:
    """The application for one model.

    timeout: seconds a request may take, waiting included.
    """
    app = FastAPI(title="tawny", docs_url=None, redoc_url=None, openapi_url=None)
    preparing, unprepared = asyncio.Lock(), 0  # one at a time: tokenizers are no good in two threads

    def waiting() -> int:
        return worker.waiting + unprepared

    metrics = Metrics(worker, waiting)
    page = importlib.resources.files("tawny.serving").joinpath("page.html").read_text(encoding="utf-8")
    entry = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "tawny"}

    @contextlib.contextmanager
    def room() -> Iterator[None]:
        try:
            yield
        except Full as error:
            metrics.failed("full")
            refused = Refused(str(error), 429, code="queue_full")
            # A place comes free about every (seconds of a text) / places.
            wait = math.ceil(metrics.mean_seconds() / worker.places)
            refused.headers["Retry-After"] = str(max(1, min(_MOST_WAIT, wait)))
            raise refused from None

    async def prepared(prepare: Prepare, request: Request, deadline: float) -> Prepared | None:
        """What to ask the worker for; None when the client has gone. What waits here waits for the worker, too."""
        nonlocal unprepared
        with room():
            worker.check_room(1, ahead=unprepared)
        unprepared += 1
        try:
            async with asyncio.timeout_at(deadline):
                await preparing.acquire()
            try:
                return None if await request.is_disconnected() else await asyncio.to_thread(prepare)
            finally:
                preparing.release()
        except TimeoutError:
            metrics.failed("timeout")
            raise _late() from None
        finally:
            unprepared -= 1

    async def reply(prepare: Prepare, asked: SamplingFields, request: Request) -> Response:
        begin, deadline = time.monotonic(), asyncio.get_running_loop().time() + timeout
        made = await prepared(prepare, request, deadline)
        if made is None:
            return Response(status_code=499)
        requests, answer = made
        with room():
            running = Running(worker, metrics, requests, begin, deadline)

        def done() -> None:
            running.stop()
            request.state.said = running.said()

        if asked.stream:
            return _Streamed(running, answer, done)
        whole, gone = asyncio.create_task(_whole(running, answer)), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(whole.result()) if whole.done() else Response(status_code=499)
        finally:
            whole.cancel()
            gone.cancel()
            done()

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatRequest, request: Request) -> Response:
        return await reply(functools.partial(service.chat, asked), asked, request)

    @app.post("/v1/completions")
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        return await reply(functools.partial(service.complete, asked), asked, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return entry

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "ok" if worker.alive else "ended"
        told = {"status": status, "running": worker.running, "waiting": waiting()}
        return JSONResponse(told, 200 if worker.alive else 503)

    @app.get("/metrics")
    async def told() -> Response:
        return Response(metrics.page(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _POLICY})

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _refusal(explain(error.errors()))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        return _refusal(Refused(str(error.detail), error.status_code))

    @app.exception_handler(Refused)
    @app.exception_handler(TawnyError)
    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return _refusal(_as_refused(error))

    return app
