"""uvicorn's server, which ends running texts before it ends itself."""

from __future__ import annotations

__all__ = ["Web"]

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

import uvicorn

_GRACE, _LAST = 3, 2  # seconds in which running texts may end, and then in which their clients are told


class Web(uvicorn.Server):
    """An application behind uvicorn.

    end: called when running texts have had their time; it lets each of them fail.
    """

    def __init__(self, app: Any, end: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
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
