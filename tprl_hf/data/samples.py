"""The one format of a sample, for every stage: images, a question, its reference answer, and what is known of them."""

from __future__ import annotations

import io
from numbers import Integral
from typing import Any

from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

_BOX = List(Value("int32"), length=4)

SAMPLE_FEATURES = Features(
    {
        "images": List(ImageFeature()),
        "prompt": Value("string"),
        "answer": Value("string"),
        "question_type": Value("string"),
        "boxes": List(_BOX),  # (x0, y0, x1, y1) in pixels, of the objects the answer depends on
        "image_id": Value("string"),  # equal for questions about one image: a label, for messages and intervals
        "objects": List({"name": Value("string"), "box": _BOX}),  # all that lie on the image
    }
)


# What a line of a user's file may say.
FIELDS = ("image", "images", "prompt", "answer", "question_type", "image_id", "boxes")


def check_number(name: str, value: Any, least: int) -> int:
    """Raises `ValueError` unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    return int(value)


def png_bytes(image: Image.Image) -> bytes:
    """The image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
