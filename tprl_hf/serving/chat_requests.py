"""What a client may send: how much of it, which budget, and images from where. Every refusal is one line."""

import base64
import binascii
import json
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.exceptions import HTTPException

from tprl_hf.modeling.budget import Budget, refuse_several
from tprl_hf.pictures import PictureError, open_picture

DOWNLOAD_SECONDS = 10
# Fields of the protocol that would change an answer and are not served, but for these values, which ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "presence_penalty": (0,),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "top_logprobs": (0,),
    "web_search_options": (),
}
NUMBERS = ("frequency_penalty", "max_completion_tokens", "max_tokens", "temperature", "top_p")
BUDGET_TYPES: dict[str, tuple[type, ...]] = {
    "keep_ratio": (float, int),
    "num_keep": (int,),
    "threshold": (float, int),
    "prune": (bool,),
}


@dataclass(frozen=True)
class Limits:
    """
    Args:
        max_bytes (`int`): of a request's body, and of an image fetched for it.
        allow_remote_images (`bool`): whether the server fetches images from the addresses that clients name.
    """

    max_bytes: int
    allow_remote_images: bool = False


def refuse(message: str, status: int = 400) -> HTTPException:
    return HTTPException(status, message)


def refuse_unserved(body: dict[str, Any]) -> None:
    """
    Raises:
        `HTTPException`: 400 for a field that would be ignored, or that is of another type than the protocol's.
    """
    if "chat_template_kwargs" in body:  # they could name another template, or replace what is passed here
        raise refuse("chat_template_kwargs are not served.")
    for name, harmless in UNSERVED.items():
        if body.get(name) is not None and body[name] not in harmless:
            raise refuse(f"{name}={json.dumps(body[name])[:80]} is not served: leave it out.")
    for name in NUMBERS:
        if body.get(name) is not None and type(body[name]) not in (int, float):
            raise refuse(f"{name} must be a number; got {json.dumps(body[name])[:80]}.")
    if not isinstance(body.get("generation_config", ""), str | None):
        raise refuse("generation_config must be a text that holds a JSON object.")


def take_stops(body: dict[str, Any]) -> list[str]:
    """
    Takes `stop` out of a request: the texts that end an answer, none where there is no such field.

    Raises:
        `HTTPException`: 400 for anything but a text, or a list of texts, of at least one character.
    """
    given = body.pop("stop", None)
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse(f"stop is a text, or a list of texts, none of them empty; got {json.dumps(given)[:80]}.")
    return stops


def take_seed(body: dict[str, Any]) -> int | None:
    """Takes `seed` out of a request. Raises `HTTPException` 400 for anything but a whole number of 64 bits."""
    seed = body.pop("seed", None)
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise refuse(f"seed is a whole number of 64 bits; got {json.dumps(seed)[:80]}.")
    return seed


async def read_body(chunks: AsyncIterator[bytes], max_bytes: int) -> dict[str, Any]:
    """
    The JSON object of a request.

    Raises:
        `HTTPException`: 413 as soon as more than `max_bytes` have come, 400 for anything but a JSON object.
    """
    received = bytearray()
    async for chunk in chunks:
        received += chunk
        if len(received) > max_bytes:
            raise refuse(f"The request is larger than {max_bytes / 1e6:g} MB: send smaller images.", 413)
    try:
        body = json.loads(bytes(received))
    except (ValueError, RecursionError) as error:
        raise refuse(f"The request is not JSON ({error}).") from None
    if not isinstance(body, dict):
        raise refuse(f"The request must be a JSON object; got {type(body).__name__}.")
    return body


def take_budget(body: dict[str, Any]) -> dict[str, Any]:
    """
    Takes `keep_ratio`, `num_keep`, `threshold` or `prune` out of a request.

    Returns:
        `dict`: Keyword arguments of `generate`, empty where the request names no budget.

    Raises:
        `HTTPException`: 400 when it names several, or one that is none.
    """
    budget = {name: body.pop(name) for name in BUDGET_TYPES if name in body}
    budget = {name: value for name, value in budget.items() if value is not None}
    for name, value in budget.items():
        if not isinstance(value, BUDGET_TYPES[name]) or (isinstance(value, bool) and name != "prune"):
            kinds = " or ".join(kind.__name__ for kind in BUDGET_TYPES[name])
            raise refuse(f"{name} must be {kinds}; got {value!r}.")
    try:
        refuse_several(budget)
        if budget and "prune" not in budget:
            Budget(**budget)
    except ValueError as error:
        raise refuse(str(error)) from None
    return budget


def read_messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """
    Chat messages whose images are opened.

    Args:
        messages (`list[dict]`): As a client sent them: each with a `role`, and a text or parts as `content`.
        limits ([`Limits`]): Whether images may come from afar.

    Returns:
        `list[dict]`: The same, with a `PIL.Image.Image` as the url of each image.

    Raises:
        `HTTPException`: 400 for messages of another form, other parts than texts and images, and images that are not
        to be had.
    """
    if not isinstance(messages, list) or not messages:
        raise refuse("`messages` must be a list with at least one message.")
    return [read_message(message, limits) for message in messages]


def texts_of(messages: list[dict[str, Any]]) -> str:
    """All texts of messages that were read, one behind the other."""
    texts: list[str] = []
    for message in messages:
        content = message.get("content") or ""
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part.get("type") == "text"]
    return "\n".join(texts)


def read_message(message: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refuse("A message must be an object with a `role`.")
    content = message.get("content")
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, list):
        raise refuse(f"The `content` of a message is a text or a list of parts; got {type(content).__name__}.")
    return {**message, "content": [read_part(part, limits) for part in content]}


def read_part(part: Any, limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part
    if kind == "image_url":
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        if isinstance(url, str):
            return {"type": "image_url", "image_url": open_image(url, limits)}
    raise refuse(
        'A part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}; got one of '
        f"type {kind!r}."
    )


def open_image(url: str, limits: Limits) -> Image.Image:
    """
    The image of a `data:` URL, or of an address where that is allowed, upright and in RGB.

    Raises:
        `HTTPException`: 400 for files of this machine, addresses that are not allowed, and what is not an image.
    """
    scheme = url.partition(":")[0].lower()
    if scheme == "data":
        header, _, data = url.partition(",")
        try:
            content = base64.b64decode(data, validate=True) if header.endswith(";base64") else b""
        except binascii.Error as error:
            raise refuse(f"The image is not base64 ({error}).") from None
    elif scheme in ("http", "https"):
        if not limits.allow_remote_images:
            raise refuse(
                "This server fetches no images: send them as data:image/png;base64,... (or start it with "
                "--allow-remote-images)."
            )
        content = download(url, limits.max_bytes)
    else:
        raise refuse(f"An image is sent as data:image/png;base64,...; got {url[:40]!r}. No files are read.")
    try:
        return open_picture(content)
    except PictureError as error:
        raise refuse(str(error)) from None


def download(url: str, max_bytes: int) -> bytes:
    """The content of an http address. Raises `HTTPException` 400 where it cannot be had or is too large."""
    try:
        # follows to http and https only
        with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as answer:  # nosec B310
            content = answer.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        raise refuse(f"The image at {url} cannot be fetched ({error}).") from None
    if len(content) > max_bytes:
        raise refuse(f"The image at {url} is larger than {max_bytes / 1e6:g} MB.")
    return content
