"""What generated questions have in common: a random stream for each scene, and scenes as rows of a dataset."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from PIL import Image
from tqdm import tqdm

from .drawn import in_file
from .samples import SAMPLE_FEATURES, png_bytes

ROWS_PER_PART = 2000  # of a dataset: 70 MB of mosaics; Arrow's offsets into bytes would end at 2 GiB
_DRAWN: dict[str, Dataset] = {}  # by series, the longest that is drawn and lies in files


def random_stream(splits: Sequence[str], split: str, seed: int, index: int) -> np.random.Generator:
    """
    The random stream of one scene; the streams of different splits, seeds or indices have nothing in common.

    Raises:
        `ValueError`: If `split` is none of `splits`, or `seed` or `index` is negative.
    """
    if split not in splits:
        raise ValueError(f"Unknown split {split!r}; one of {', '.join(splits)}.")
    if seed < 0 or index < 0:
        raise ValueError(f"seed and index must not be negative; got seed={seed}, index={index}.")
    return np.random.default_rng(np.random.SeedSequence([splits.index(split), seed, index]))


def rows_of_scenes(
    scenes: Iterable[tuple[int, Any, Sequence[Any]]], image_id: str, num_samples: int, title: str, source: str = ""
) -> Dataset:
    """
    The first questions of a series of scenes. Many are kept in files until the process ends, and not drawn again.

    Args:
        scenes (`Iterable`): `(index, scene, questions)`, without end. A scene has `pixels` and `objects`.
        image_id (`str`): With the scene's index behind it, what questions about one picture share.
        num_samples (`int`): Number of questions.
        title (`str`): Of the progress bar.
        source (`str`): What scenes of the same `image_id` depend on besides.

    Returns:
        `datasets.Dataset`: `num_samples` rows of `SAMPLE_FEATURES`.
    """
    series = f"{image_id} {source}"
    if series in _DRAWN and len(_DRAWN[series]) >= num_samples:
        return _DRAWN[series].select(range(num_samples))
    parts: list[Dataset] = []
    rows: list[dict] = []
    # with the time that is left, where it takes more than some seconds
    progress = tqdm(total=num_samples, desc=title, unit="question", delay=3)
    for row in itertools.islice(rows_in_turn(scenes, image_id), num_samples):
        rows.append(row)
        progress.update()
        if len(rows) == ROWS_PER_PART:
            parts.append(in_file(Dataset.from_list(rows, features=SAMPLE_FEATURES)))
            rows = []
    progress.close()
    if rows:
        last = Dataset.from_list(rows, features=SAMPLE_FEATURES)
        parts.append(in_file(last) if parts else last)
    drawn = concatenate_datasets(parts)
    if num_samples > ROWS_PER_PART and all(part.cache_files for part in parts):
        _DRAWN[series] = drawn
    return drawn.select(range(num_samples))  # a view: formats that are set on it are not those of the next one


def rows_in_turn(scenes: Iterable[tuple[int, Any, Sequence[Any]]], image_id: str) -> Iterator[dict[str, Any]]:
    """The questions of scenes as rows, without end."""
    for index, scene, questions in scenes:
        image = {"bytes": png_bytes(Image.fromarray(scene.pixels)), "path": None}
        objects = [{"name": item.name, "box": list(item.box)} for item in scene.objects]
        for question in questions:
            yield {
                "images": [image],
                "prompt": question.prompt,
                "answer": question.answer,
                "question_type": question.question_type,
                "boxes": [list(scene.objects[i].box) for i in question.objects],
                "image_id": f"{image_id}-{index}",
                "objects": objects,
            }
