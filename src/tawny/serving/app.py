"""The application: every HTTP route of the server, and what every request goes through.

Bodies of requests are in protocol.py, and the paths that need no key in guard.py.

A request is prepared beside the loop, given to the worker, and its events are awaited (running.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.resources
import math
import time
from collections.abc import Callable, Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import HTMLResponse, JSONResponse, Response

from tawny.decoding import scheduler
from tawny.decoding.worker import Full, Worker
from tawny.errors import TawnyError
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
from tawny.serving.running import Running, Streamed, as_refused, late, whole

_MOST_WAIT = 60  # seconds that a client may be told to come back after
_LEFT = 499  # what the log says of a request whose client did not wait; nobody receives it
# The page is one file: nothing is fetched from elsewhere, and no other site may frame it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; frame-ancestors 'none'"

Prepared = tuple[list[scheduler.TextRequest], Answer]
Prepare = Callable[[], Prepared]


def make_app(service: Service, worker: Worker, timeout: float) -> FastAPI:
    """The application for one model.

    timeout: seconds a request may take, waiting included.
    """
    app = FastAPI(title="tawny", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk = Desk(service, worker, timeout)
    app.include_router(_ROUTES)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    for kind in (Refused, TawnyError, Exception):
        app.add_exception_handler(kind, _failed)
    return app


class Desk:
    """Where requests come in: one is prepared at a time, and given to the worker while there is room.

    timeout: seconds a request may take, waiting included.
    """

    def __init__(self, service: Service, worker: Worker, timeout: float) -> None:
        self.service, self.worker, self.timeout = service, worker, timeout
        self.metrics = Metrics(worker, lambda: self.waiting)
        self.entry = {
            "id": service.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tawny",
        }
        page = importlib.resources.files("tawny.serving").joinpath("page.html")
        self.page = page.read_text(encoding="utf-8")
        self._preparing = asyncio.Lock()  # tokenizers are not thread-safe
        self._unprepared = 0

    @property
    def waiting(self) -> int:
        """Requests without a place."""
        return self.worker.waiting + self._unprepared

    async def reply(self, prepare: Prepare, asked: SamplingFields, request: Request) -> Response:
        """What a request for texts is answered with.

        Raises:
            Refused: there is no room, the request took too long, or it cannot be done.
            TawnyError: what went wrong in making a text.
        """
        begin, deadline = time.monotonic(), asyncio.get_running_loop().time() + self.timeout
        prepared = await self._prepared(prepare, request, deadline)
        if prepared is None:
            return self.left()
        requests, answer = prepared
        with self._room():
            running = Running(self.worker, self.metrics, requests, begin, deadline)

        def done() -> None:
            running.stop()
            request.state.said = running.said()

        if asked.stream:
            return Streamed(running, answer, done)
        answering, gone = asyncio.create_task(whole(running, answer)), asyncio.create_task(_gone(request))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(answering.result()) if answering.done() else Response(status_code=_LEFT)
        finally:
            answering.cancel()
            gone.cancel()
            done()

    def left(self) -> Response:
        """Of a request whose client has gone before anything was made for it, which counts here."""
        self.metrics.failed("cancelled")
        return Response(status_code=_LEFT)

    async def _prepared(self, prepare: Prepare, request: Request, deadline: float) -> Prepared | None:
        """What to ask the worker for; None when the client has gone. What waits here waits for the worker, too."""
        with self._room():
            self.worker.check_room(1, ahead=self._unprepared)
        self._unprepared += 1
        try:
            async with asyncio.timeout_at(deadline):
                await self._preparing.acquire()
            try:
                return None if await request.is_disconnected() else await asyncio.to_thread(prepare)
            finally:
                self._preparing.release()
        except TimeoutError:
            self.metrics.failed("timeout")
            raise late() from None
        finally:
            self._unprepared -= 1

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except Full as error:
            self.metrics.failed("full")
            refused = Refused(str(error), 429, code="queue_full")
            # A place comes free about every (seconds of a text) / places.
            wait = math.ceil(self.metrics.mean_seconds() / self.worker.places)
            refused.headers["Retry-After"] = str(max(1, min(_MOST_WAIT, wait)))
            raise refused from None


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- routes ------------------------------------------------------------------------------------------------------


def _desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


_ROUTES = APIRouter()
_AtDesk = Annotated[Desk, Depends(_desk)]


@_ROUTES.post("/v1/chat/completions")
async def _chat(asked: ChatRequest, request: Request, desk: _AtDesk) -> Response:
    return await desk.reply(functools.partial(desk.service.chat, asked), asked, request)


@_ROUTES.post("/v1/completions")
async def _complete(asked: CompletionRequest, request: Request, desk: _AtDesk) -> Response:
    return await desk.reply(functools.partial(desk.service.complete, asked), asked, request)


@_ROUTES.get("/v1/models")
async def _models(desk: _AtDesk) -> dict[str, Any]:
    return {"object": "list", "data": [desk.entry]}


@_ROUTES.get("/v1/models/{name:path}")
async def _model(name: str, desk: _AtDesk) -> dict[str, Any]:
    desk.service.check_name(name)
    return desk.entry


@_ROUTES.get("/health")
async def _health(desk: _AtDesk) -> JSONResponse:
    worker = desk.worker
    health = {
        "status": "ok" if worker.alive else "ended",
        "running": worker.running,
        "waiting": desk.waiting,
    }
    return JSONResponse(health, 200 if worker.alive else 503)


@_ROUTES.get("/metrics")
async def _metrics(desk: _AtDesk) -> Response:
    return Response(desk.metrics.page(), media_type="text/plain; version=0.0.4")


@_ROUTES.get("/")
async def _page(desk: _AtDesk) -> HTMLResponse:
    return HTMLResponse(desk.page, headers={"Content-Security-Policy": _POLICY})


# --- errors ------------------------------------------------------------------------------------------------------


def _refusal(refused: Refused) -> JSONResponse:
    body = error_body(refused.message, refused.status, refused.param, refused.code)
    return JSONResponse(body, refused.status, refused.headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _refusal(explain(error.errors()))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):  # in the middle of its body
        return _desk(request).left()
    return _refusal(Refused(str(error.detail), error.status_code))


async def _failed(_: Request, error: Exception) -> Response:
    return _refusal(as_refused(error))
