"""What stands between the network and the application: who may ask, how large and how slow a body may be, the log.

A page of another site that a user looks at can send requests to this machine. It cannot choose the `Host` that its own
name has become after a trick with DNS, nor the `Origin` that the browser writes. So both must be this server's own.
Where there is a key, it decides instead: such a page does not know it, and a proxy may use any name.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tawny.errors import short
from tawny.serving.protocol import error_body

_MOST_BYTES, _MOST_SECONDS = 16 << 20, 30.0  # of a body
# Paths that need no key: the page is the same for everybody, and health is two numbers.
_OPEN = ("/", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """An ASGI application around another.

    Args:
        host: the address that the server listens at.
        key: what `Authorization: Bearer …` must say; None for nothing.
        log: told one line for each request.
    """

    def __init__(self, app: Any, *, host: str, key: str | None, log: Callable[[str], None]) -> None:
        self.app, self.key, self.log = app, key, log
        self.local = is_loopback(host)
        self.names = {"localhost", host.lower()} | (set() if self.local else {socket.gethostname().lower()})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        begin, status = time.monotonic(), 499
        scope["state"] = {"said": ""}

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            app = self.app if refusal is None else refusal
            await app(scope, _limited(receive), sending)
        finally:
            said = scope["state"]["said"]
            seconds = time.monotonic() - begin
            self.log(
                f"{scope['method']} {short(scope['path'])} {status} in {seconds:.2f} s{said and ': '}{said}"
            )

    def _refusal(self, scope: Any) -> JSONResponse | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.key is None:
            host, origin = headers.get("host", ""), headers.get("origin")
            if not self._is_ours(_name(f"//{host}")):
                return _refused(403, f"the host '{short(host)}' is not this server's")
            if origin is not None and origin.partition("://")[2].lower() != host.lower():
                return _refused(403, f"pages of '{short(origin)}' may not ask this server")
        elif scope["path"] not in _OPEN:
            given = headers.get("authorization", "").removeprefix("Bearer ")
            curl, browser = (
                given.encode("latin-1"),
                given.encode(),
            )  # the first sends UTF-8, the other latin-1
            key = self.key.encode()
            if not (hmac.compare_digest(curl, key) or hmac.compare_digest(browser, key)):
                return _refused(401, "the API key is missing or wrong; send 'Authorization: Bearer KEY'")
        if (
            headers.get("content-length", "0").isdecimal()
            and int(headers.get("content-length", "0")) > _MOST_BYTES
        ):
            return _refused(413, f"the body is larger than {_MOST_BYTES} bytes")
        return None

    def _is_ours(self, name: str) -> bool:
        if name in self.names or is_loopback(name):
            return True
        try:  # addresses cannot be made to point elsewhere
            return not self.local and bool(ipaddress.ip_address(name))
        except ValueError:
            return False


def _name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _refused(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(message, status), status)


def _limited(receive: Any) -> Any:
    """`receive`, as long as the body is neither too large nor too slow."""
    deadline, size, whole = time.monotonic() + _MOST_SECONDS, 0, False

    async def limited() -> Any:
        nonlocal size, whole
        if whole:
            return await receive()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                message = await receive()
        except TimeoutError:
            raise HTTPException(408, f"the body took more than {_MOST_SECONDS:.0f} s") from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > _MOST_BYTES:
            raise HTTPException(413, f"the body is larger than {_MOST_BYTES} bytes")
        return message

    return limited
