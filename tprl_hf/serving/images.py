"""The images of a request: where they come from, how large they may be together, and how they are opened."""

import asyncio
import base64
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
from PIL import Image

from tprl_hf.pictures import MAX_PIXELS, PictureError, open_picture, picture_size

from . import limits as times
from .limits import Limits, refuse


@dataclass
class SentImage:
    """
    An image of a request.

    Args:
        content (`bytes`, *optional*): Of its file; there once it was fetched.
        url (`str`, *optional*): Where it is fetched from.
        detail (`str`): How much of it is kept, as OpenAI names it.
    """

    content: bytes | None = None
    url: str | None = None
    detail: str = "auto"

    def open(self) -> Image.Image:
        """Upright and in RGB. Raises `HTTPException` 400 for what is not an image."""
        assert self.content is not None
        try:
            return open_picture(self.content)
        except PictureError as error:
            raise refuse(str(error)) from None


def read_url(url: str, limits: Limits) -> SentImage:
    """
    The image of a `data:` URL, or one to be fetched, where that is allowed.

    Raises:
        `HTTPException`: 400 for files of this machine, and for addresses that are not allowed.
    """
    scheme = url.partition(":")[0].lower()
    header, _, data = url.partition(",")
    if scheme == "data" and header.endswith(";base64"):
        try:
            # many encoders break the lines
            return SentImage(base64.b64decode("".join(data.split()), validate=True))
        except ValueError as error:  # binascii.Error among them
            raise refuse(f"The image is not base64 ({error}).") from None
    if scheme in ("http", "https"):
        if not limits.allow_remote_images:
            raise refuse(
                "This server fetches no images: send them as data:image/png;base64,... (or start it with "
                "--allow-remote-images)."
            )
        return SentImage(url=url)
    raise refuse(f"An image is sent as data:image/png;base64,...; got {url[:40]!r}. No files are read.")


async def fetch(images: Sequence[SentImage], max_bytes: int, hold: Callable[[int], None]) -> None:
    """
    Fetches the images that lie elsewhere, one after the other; `hold` is told of all bytes as they come.

    Raises:
        `HTTPException`: 400 where one cannot be had, where all together are larger than `max_bytes` or take longer
            than `FETCH_SECONDS`, and for redirects to anything but http and https.
    """
    awaited = [image for image in images if image.url is not None]
    if not awaited:
        return
    # identity: a small answer may unpack to any size. trust_env: for proxies, and it would send passwords of ~/.netrc
    session = aiohttp.ClientSession(
        headers={"Accept-Encoding": "identity"}, auto_decompress=False, trust_env=True, middlewares=[without_password]
    )
    try:
        async with asyncio.timeout(times.FETCH_SECONDS), session:
            for image in awaited:
                image.content = await download(session, str(image.url), max_bytes, hold)
                max_bytes -= len(image.content)
    except TimeoutError:
        seconds = f"{times.FETCH_SECONDS:g} seconds"
        raise refuse(f"The images of the request cannot be fetched within {seconds}.") from None


async def without_password(request: aiohttp.ClientRequest, handler: Any) -> aiohttp.ClientResponse:
    """Takes the password out that belongs to whoever runs the server, and not to whoever names the address."""
    request.headers.popall("Authorization", None)
    return await handler(request)


async def download(session: aiohttp.ClientSession, url: str, max_bytes: int, hold: Callable[[int], None]) -> bytes:
    content = bytearray()
    try:
        async with session.get(url, max_redirects=3) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_chunked(65536):
                content += chunk
                hold(len(chunk))
                if len(content) > max_bytes:
                    raise refuse(f"The image at {url} is larger than {max_bytes / 1e6:g} MB.")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        if isinstance(error, TimeoutError):
            raise
        why = str(error) or type(error).__name__
        raise refuse(f"The image at {url} cannot be fetched ({why}).") from None
    return bytes(content)


def count_pixels(images: Sequence[SentImage], image_processor: Any) -> int:
    """
    Looks at the headers of all images before the first one is decoded.

    Returns:
        `int`: Their pixels, as they come or as the processor scales them, whichever is more.

    Raises:
        `HTTPException`: 400 for what is not an image, and where all of them together have more than `MAX_PIXELS`
            pixels, as they come or as the processor scales them.
    """
    sent = scaled = 0
    for image in images:
        assert image.content is not None
        try:
            width, height = picture_size(image.content)
        except PictureError as error:
            raise refuse(str(error)) from None
        sent += width * height
        scaled += scaled_pixels(image_processor, width, height)
    if max(sent, scaled) > MAX_PIXELS:
        raise refuse(
            f"The images of the request have {sent:,} pixels together, and {scaled:,} as the model's processor scales "
            f"them; at most {MAX_PIXELS:,} are read. Scale or cut them, or send fewer."
        )
    return max(sent, scaled)


def scaled_pixels(image_processor: Any, width: int, height: int) -> int:
    """Pixels of an image where its shorter side is scaled to a fixed length. Other kinds of scaling have bounds."""
    size = image_processor.size
    if size is None or size.longest_edge or not size.shortest_edge:
        return width * height
    return round(size.shortest_edge**2 * max(width, height) / min(width, height))
