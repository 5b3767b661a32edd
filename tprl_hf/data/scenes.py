"""What generated questions have in common: a random stream for each scene, and scenes as rows of a dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from PIL import Image
from tqdm import tqdm

from .samples import SAMPLE_FEATURES, png_bytes

ROWS_PER_PART = 10_000  # of a dataset


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
    scenes: Iterable[tuple[int, Any, Sequence[Any]]], image_id: str, num_samples: int, title: str
) -> Dataset:
    """
    The first questions of a series of scenes.

    Args:
        scenes (`Iterable`): `(index, scene, questions)`, without end. A scene has `pixels` and `objects`.
        image_id (`str`): With the scene's index behind it, what questions about one picture share.
        num_samples (`int`): Number of questions.
        title (`str`): Of the progress bar.

    Returns:
        `datasets.Dataset`: `num_samples` rows of `SAMPLE_FEATURES`.
    """
    rows: list[dict] = []
    # with the time that is left, where it takes more than some seconds
    progress = tqdm(total=num_samples, desc=title, unit="question", delay=3)
    for index, scene, questions in scenes:
        image = {"bytes": png_bytes(Image.fromarray(scene.pixels)), "path": None}
        objects = [{"name": item.name, "box": list(item.box)} for item in scene.objects]
        for question in questions[: num_samples - len(rows)]:
            rows.append(
                {
                    "images": [image],
                    "prompt": question.prompt,
                    "answer": question.answer,
                    "question_type": question.question_type,
                    "boxes": [list(scene.objects[i].box) for i in question.objects],
                    "image_id": f"{image_id}-{index}",
                    "objects": objects,
                }
            )
        progress.update(min(len(questions), num_samples - progress.n))
        if len(rows) == num_samples:
            break
    progress.close()
    # Arrow's offsets into bytes end at 2 GiB for each part.
    parts = [rows[start : start + ROWS_PER_PART] for start in range(0, num_samples, ROWS_PER_PART)]
    return concatenate_datasets([Dataset.from_list(part, features=SAMPLE_FEATURES) for part in parts])
