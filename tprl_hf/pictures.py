"""Pictures from files, of any mode, as models read them: upright, in RGB. The one place that opens files of users."""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Readers that start no other program: Pillow hands EPS to Ghostscript, whatever the file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 50_000_000
# Processors scale the shorter side to a fixed length, so a thread of 1 x 4,000 pixels becomes hundreds of megabytes.
MAX_ASPECT_RATIO = 100


class PictureError(ValueError):
    """A picture that is not to be had, and why."""


def open_picture(source: str | Path | bytes, name: str | None = None) -> Image.Image:
    """
    Args:
        source (`str`, `Path` or `bytes`):
            An image file, or what is in one.
        name (`str`, *optional*):
            What messages call it; defaults to the path.

    Returns:
        `PIL.Image.Image`: In RGB, turned as the camera was held; of an animation the first frame. See [`to_rgb`].

    Raises:
        `FileNotFoundError`: If there is no such file.
        `PictureError`: For a file of another format, of more than `MAX_PIXELS` pixels, with a side more than
            `MAX_ASPECT_RATIO` times the other, or that is damaged.
    """
    name = name or ("The image" if isinstance(source, bytes) else str(source))
    with opened(source, name) as image:
        image.load()
        return to_rgb(image, name)


def picture_size(source: str | Path | bytes, name: str | None = None) -> tuple[int, int]:
    """Width and height in pixels as the file says them, before anything is decoded. Raises as [`open_picture`]."""
    with opened(source, name or ("The image" if isinstance(source, bytes) else str(source))) as image:
        return image.size


@contextmanager
def opened(source: str | Path | bytes, name: str) -> Iterator[Image.Image]:
    """A file whose header was read and found to be within the limits; what Pillow raises is told as ours."""
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise no_file(name)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise PictureError(too_large(name, f"{image.width} x {image.height}"))
            if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
                raise PictureError(
                    f"{name} has {image.width} x {image.height} pixels; a side is at most {MAX_ASPECT_RATIO} times "
                    "the other. Cut it to what matters."
                )
            yield image
    except UnidentifiedImageError:
        raise PictureError(
            f"{name} is not an image that Pillow can read: it is none of {', '.join(FORMATS)}. Save it as one."
        ) from None
    except Image.DecompressionBombError:
        raise PictureError(too_large(name, "more")) from None
    except PictureError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise whatever it stumbles over
        raise PictureError(f"{name} is damaged ({error}): copy it again, or leave it out.") from error


def no_file(name: str) -> FileNotFoundError:
    return FileNotFoundError(f"There is no image file {name}: pass the path of one.")


def too_large(name: str, size: str) -> str:
    return f"{name} has {size} pixels; at most {MAX_PIXELS:,} are read. Scale it down."


def to_rgb(image: Image.Image, name: str = "The image") -> Image.Image:
    """
    An image of any mode in RGB, turned as the camera was held. What is transparent shows white; 16 bits a pixel
    become 8.

    Raises:
        `PictureError`: For numbers whose black and white are not known: floats, and whole ones beyond 16 bits.
    """
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        wide = image.convert("F")
        low, high = np.asarray(wide).min(), np.asarray(wide).max()
        if image.mode == "F" or low < 0 or high > 65535:
            raise PictureError(f"{name} has pixels of mode {image.mode} from {low:g} to {high:g}: save it in 8 bits.")
        return wide.point(lambda value: value / 257 + 0.5).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def images_of(row: Mapping[str, Any]) -> Sequence[Any]:
    """
    The pictures of a row, as it has them: those of `images`, or that of `image`; see [`picture_of`] for their forms.

    Raises:
        `PictureError`: For a row in which both say something, and not the same.
    """
    several, one = (in_a_list(row.get(name)) for name in ("images", "image"))
    if several and one and several != one:
        raise PictureError("A row has `images` and another `image`, two names for one thing: leave one column out.")
    return several or one


def name_of_picture(row: Mapping[str, Any]) -> str:
    """What messages call a picture of a row that has no path: by its `image_id`, or else by the question."""
    if row.get("image_id") not in (None, ""):
        return str(row["image_id"])
    return f"The image of the question {repr(row.get('prompt'))[:80]}"


def in_a_list(found: Any) -> list[Any]:
    """What a column of pictures holds: a list of them, one, or `None`."""
    if isinstance(found, (list, tuple)):
        return [one for one in found if one is not None]
    return [] if found is None else [found]


def stored_picture(entry: Any) -> Image.Image | bytes | str:
    """
    A picture of a row: decoded, the bytes of its file, or its path.

    Raises:
        `PictureError`: For anything else.
    """
    found = entry
    if isinstance(entry, Mapping) and entry.keys() & {"bytes", "path"}:
        found = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
    if isinstance(found, Path):
        return str(found)
    if isinstance(found, (Image.Image, bytes, str)):
        return found
    raise PictureError(
        "A picture of a row must be a PIL image, the path of a file, its bytes, or a dict of `bytes` and `path` as "
        f"datasets.Image makes it; got {type(entry).__name__} {repr(entry)[:80]}."
    )


def image_digest(row: Mapping[str, Any]) -> str:
    """Equal for rows whose pictures have the same bytes or pixels, or are the same files, unchanged."""
    digest = hashlib.sha256()
    for image in map(stored_picture, images_of(row)):
        if isinstance(image, Image.Image):
            seen = to_rgb(image)  # the pixels of others may be numbers of a palette
            content = repr((seen.mode, seen.size)).encode() + seen.tobytes()
        elif isinstance(image, bytes):
            content = image
        elif os.path.isfile(image):
            about = os.stat(image)
            content = repr((os.path.abspath(image), about.st_size, about.st_mtime_ns)).encode()
        else:
            raise no_file(image)
        digest.update(len(content).to_bytes(8, "little") + content)  # where one ends counts too
    return digest.hexdigest()


def picture_of(entry: Any, name: str | None = None) -> Image.Image:
    """
    A picture as rows of a dataset have it: decoded, or still the bytes or the path of its file; see [`to_rgb`].
    Messages call it by its path, and one without a path `name`.
    """
    found = stored_picture(entry)
    if isinstance(found, Image.Image):
        return to_rgb(found)
    if isinstance(found, bytes) and isinstance(entry, Mapping):
        name = entry.get("path") or name
    return open_picture(found, found if isinstance(found, str) else name)
