"""How much a client may send and how long it may take, and who waits. Every refusal is JSON with a message."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

BODY_SECONDS = 30.0  # a request's body has come by then, or it is refused
FETCH_SECONDS = 10.0  # all remote images of a request have come by then
MAX_TEXT = 100_000  # characters of all messages of a request
MAX_MESSAGES = 1_000
# Lists, objects and what they hold. 20 MB of "[],[],..." would become a gigabyte of Python objects.
MAX_JSON_VALUES = 50_000
MAX_DETAIL = 1_000  # characters of a refusal, which may quote the request


@dataclass(frozen=True)
class Limits:
    """
    Args:
        max_bytes (`int`, defaults to 20 million): of a request's body, and of the images fetched for it.
        max_images (`int`, defaults to 16): of a request.
        max_tokens (`int`, defaults to 4096): of an answer.
        max_image_tokens (`int`, *optional*): visual tokens that a request keeps, for each of its images.
        max_batch (`int`, defaults to 8): requests that the model answers together.
        max_waiting (`int`, defaults to 64): requests that wait for their answer.
        allow_remote_images (`bool`): whether the server fetches images from the addresses that clients name.
    """

    max_bytes: int = 20_000_000
    max_images: int = 16
    max_tokens: int = 4096
    max_image_tokens: int | None = None
    max_batch: int = 8
    max_waiting: int = 64
    allow_remote_images: bool = False


def refuse(message: str, status: int = 400) -> HTTPException:
    return HTTPException(status, message)


def error_response(status: int, message: str) -> JSONResponse:
    """A refusal as clients of the protocol expect it. What the message quotes may be long, or not be text at all."""
    if len(message) > MAX_DETAIL:
        message = message[:MAX_DETAIL] + " ..."
    message = message.encode("utf-8", "backslashreplace").decode()
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {503: {"retry-after": "1"}, 408: {"connection": "close"}}.get(status)
    return JSONResponse({"error": {"message": message, "type": kind}}, status, headers)


def status_and_message(error: Exception) -> tuple[int, str]:
    """What a client is told about an error."""
    if isinstance(error, HTTPException):
        return error.status_code, error.detail
    if isinstance(error, (ValueError, OSError)):  # as on the command line: a user's mistake
        return 400, " ".join(str(error).split())
    return 500, failure(error)


def failure(error: Exception) -> str:
    """What a client is told of an error that is not the client's."""
    return f"The server failed ({type(error).__name__}); its log says where."


class WaitingRoom:
    """
    How many requests wait for their answers, and how many bytes all requests hold that have come or are coming.

    Args:
        limits ([`Limits`]): Of one request, and how many may wait.
    """

    def __init__(self, limits: Limits):
        self.limits = limits
        self.max_bytes = max(500_000_000, limits.max_bytes)
        self.num_waiting = 0
        self.num_bytes = 0

    async def read(self, chunks: AsyncIterator[bytes]) -> bytearray:
        """
        The body of a request. Whoever calls it gives its place back by [`WaitingRoom.leave`].

        Raises:
            `HTTPException`: 413 as soon as more than the largest request has come, 408 when it takes too long, 503
                when too many requests wait or hold too many bytes.
        """
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in chunks:
                    body += chunk
                    self.num_bytes += len(chunk)
                    if len(body) > self.limits.max_bytes:
                        size = f"{self.limits.max_bytes / 1e6:g} MB"
                        raise refuse(f"The request is larger than {size}: send smaller images.", 413)
                    self.refuse_more()
            if self.num_waiting >= self.limits.max_waiting:
                raise refuse(f"{self.num_waiting} requests wait already: ask again later.", 503)
        except TimeoutError:
            self.num_bytes -= len(body)
            raise refuse(f"The request has not come within {BODY_SECONDS:g} seconds.", 408) from None
        except ClientDisconnect:
            self.num_bytes -= len(body)
            raise refuse("The client has left.", 499) from None
        except BaseException:
            self.num_bytes -= len(body)
            raise
        self.num_waiting += 1
        return body

    def refuse_more(self) -> None:
        """Raises `HTTPException` 503 when all requests together hold too many bytes."""
        if self.num_bytes > self.max_bytes:
            raise refuse("The server holds as much as it can: ask again later.", 503)

    def leave(self, num_bytes: int) -> None:
        self.num_waiting -= 1
        self.num_bytes -= num_bytes


def parse_body(body: bytes | bytearray) -> dict[str, Any]:
    """
    The JSON object of a request.

    Raises:
        `HTTPException`: 400 for anything but a JSON object of a bearable number of values.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise refuse(f"The request has more than {MAX_JSON_VALUES:,} commas and brackets.")
    try:
        parsed = json.loads(bytes(body), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise refuse(f"The request is not JSON ({error}).") from None
    if not isinstance(parsed, dict):
        raise refuse(f"The request must be a JSON object; got {type(parsed).__name__}.")
    return parsed


def no_number(word: str) -> None:
    raise ValueError(f"{word} is not a number of JSON")
