"""Connections: time limits for what comes in, room for new ones, and which hosts and origins may ask."""

import asyncio
import ipaddress
import json
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from . import limits
from .limits import error_response

HEAD_SECONDS = 10.0  # the head of a request has come by then, or the connection is closed
MAX_CONNECTIONS = 256  # a further one takes the place of the oldest that has asked nothing
SHUTDOWN_SECONDS = 10.0  # answers that are not finished by then end with their next token
LAST_SECONDS = 5  # for that next token


class TimedConnection(H11Protocol):
    """A connection that has to say what it wants within a time limit. uvicorn itself waits for ever."""

    timer: asyncio.TimerHandle | None = None
    waits_for: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.opened_at = self.loop.time()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [one for one in self.connections if isinstance(one, TimedConnection) and not one.is_served()]
            min(idle, key=lambda one: one.opened_at).transport.abort()
        self.set_timer()

    def is_served(self) -> bool:
        """Whether a whole request has come, and its answer has not gone out."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.set_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self.set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.timer is not None:
            self.timer.cancel()

    def set_timer(self) -> None:
        """One time limit for a head, and one for a body: bytes that come slowly do not begin it anew."""
        if self.conn.their_state is self.waits_for:
            return
        self.waits_for = self.conn.their_state
        if self.timer is not None:
            self.timer.cancel()
        # the application refuses late bodies; it is given the time to do so
        seconds = {h11.IDLE: HEAD_SECONDS, h11.SEND_BODY: limits.BODY_SECONDS + 5}.get(self.waits_for)
        self.timer = None if seconds is None else self.loop.call_later(seconds, self.close_late, seconds)

    def close_late(self, seconds: float) -> None:
        if self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self.refuse(408, f"The head of the request has not come within {seconds:g} seconds.")
        else:
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        self.refuse(400, msg)

    def refuse(self, status: int, message: str) -> None:
        """An answer to what never became a request, then the end of the connection."""
        answer = error_response(status, message)
        headers = [*answer.raw_headers, *([] if "connection" in answer.headers else [(b"connection", b"close")])]
        head = h11.Response(status_code=status, headers=headers)
        events = [head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()


class Server(uvicorn.Server):
    """
    uvicorn's server, whose end does not take longer than is said.

    Args:
        config (`uvicorn.Config`): Of the server.
        end_answers (`Callable`): Lets all answers end with their next token.
    """

    def __init__(self, config: uvicorn.Config, end_answers: Callable[[], None]):
        super().__init__(config)
        self.end_answers = end_answers

    async def shutdown(self, sockets: Any = None) -> None:
        asyncio.get_running_loop().call_later(SHUTDOWN_SECONDS, self.end_answers)
        await super().shutdown(sockets)


def make_server(app: Any, end_answers: Callable[[], None]) -> Server:
    """The server of an application, with time limits."""
    config = uvicorn.Config(
        app,
        http=TimedConnection,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=round(SHUTDOWN_SECONDS) + LAST_SECONDS,
    )
    return Server(config, end_answers)


class KnownHosts:
    """
    Refuses what a page in a browser could send here without its user's knowledge: requests whose `Host` is a name that
    anyone may let point to this machine (DNS rebinding), and those whose `Origin` is another server.

    Args:
        app (`ASGIApp`): What is asked else.
        names (`Iterable[str]`): Host names that clients use for this server, besides addresses and `localhost`.
    """

    def __init__(self, app: ASGIApp, names: Iterable[str]):
        self.app = app
        self.names = {"localhost", *(name.lower() for name in names)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            problem = self.problem(Headers(scope=scope))
            if problem is not None:
                await error_response(403, problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def problem(self, headers: Headers) -> str | None:
        host, origin = headers.get("host"), headers.get("origin")
        if host is not None and not self.knows(host):
            return f"This server does not know itself as {json.dumps(host)[:80]}: start it with --allow-host NAME."
        if origin is not None and netloc_of(origin) != (host or "").lower():
            return f"Pages of {json.dumps(origin)[:80]} may not ask this server."
        return None

    def knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.names or is_address(name)


def netloc_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
