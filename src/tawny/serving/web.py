"""uvicorn's server, which ends running texts before it ends itself, and closes connections that ask for nothing."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_IDLE = 30  # seconds that a connection may ask for nothing, or for less than a whole head
_GRACE, _LAST = 3, 2  # seconds in which running texts may end, and then in which their clients are told


_Protocol: Any = AutoHTTPProtocol


class Connection(_Protocol):  # type: ignore[misc]
    """One that is closed where it has no request in progress for long.

    uvicorn looks at the time only between an answer and the first byte that follows it. So a client that sends nothing at
    first, or half a head, would hold its connection for ever, and so would one that does not read the end of an answer.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._seen = (True, self.cycle)  # whether the last request was over, and which it was: none so far
        self._look = self.loop.call_later(_IDLE, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        seen = (self.cycle is None or self.cycle.response_complete, self.cycle)
        if self.transport.is_closing():
            self.transport.abort()  # the client does not read
        elif seen[0] and seen == self._seen:
            self.timeout_keep_alive_handler()
        self._seen = seen
        self._look = self.loop.call_later(_IDLE, self._close_if_idle)


class Web(uvicorn.Server):
    """An application behind uvicorn.

    end: called when running texts have had their time; it lets each of them fail.
    """

    def __init__(self, app: Any, end: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                timeout_keep_alive=_IDLE,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=_GRACE + _LAST,
            )
        )
        self.end = end
        logging.getLogger("uvicorn.error").addFilter(_is_fault)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(_GRACE, self.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def _is_fault(record: logging.LogRecord) -> bool:
    """A request that is cut at the end is none, nor one whose client reads nothing."""
    if "without completing response" in record.getMessage():
        return False
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
