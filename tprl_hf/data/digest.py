"""Whether data are the same: a digest of what a dataset holds, wherever its files lie and whatever they are called."""

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset

ROWS_AT_ONCE = 1000


def data_digest(dataset: Dataset, read_files: bool = True) -> str:
    """
    A digest of all rows of a dataset in their order, with the bytes of their images. Of `image_id`, which may hold a
    path, it counts only which samples share it.

    60,000 questions of Mosaic-VQA take about 5 seconds, and image files what it takes to read each of them once.

    Args:
        dataset (`datasets.Dataset`):
            Rows with `images`, as `SAMPLE_FEATURES` has them or as paths or bytes, and any other columns.
        read_files (`bool`, *optional*, defaults to `True`):
            `False` takes path, size and time of change of an image file for its bytes: that is quick, and holds on
            one machine only.

    Returns:
        `str`: 16 hexadecimal digits.

    Raises:
        `OSError`: If an image file is missing.
    """
    of_file: Callable[[str], str] = _content if read_files else _status
    digest = hashlib.sha256()
    files: dict[str, str] = {}
    numbers: dict[Any, int] = {}
    names = sorted(dataset.column_names)
    digest.update(repr(names).encode())

    def of_image(image: Any) -> Any:
        found = image
        if isinstance(image, Mapping) and image.keys() <= {"bytes", "path"}:
            found = image["path"] if image["bytes"] is None else image["bytes"]
        if isinstance(found, bytes):
            return hashlib.sha256(found).hexdigest()
        if not isinstance(found, str):
            return image
        if found not in files:
            files[found] = of_file(found)
        return files[found]

    def of_images(images: Any) -> Any:
        return [of_image(image) for image in images] if isinstance(images, list) else of_image(images)

    # the format of Arrow leaves images as bytes or paths
    for table in dataset.with_format("arrow").iter(ROWS_AT_ONCE):
        columns = {name: table[name].to_pylist() for name in names}
        if "image_id" in columns:
            ids = columns["image_id"]
            columns["image_id"] = [one if one is None else numbers.setdefault(one, len(numbers)) for one in ids]
        if "images" in columns:
            columns["images"] = [of_images(images or []) for images in columns["images"]]
        if "image" in columns:  # TRL's rows of one image
            columns["image"] = [of_images(image) for image in columns["image"]]
        digest.update(repr([columns[name] for name in names]).encode())
    return digest.hexdigest()[:16]


def _content(path: str) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _status(path: str) -> str:
    found = Path(path).stat()
    return f"{path} {found.st_size} {found.st_mtime_ns}"
