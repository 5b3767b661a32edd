"""A user's own questions, from a JSON Lines file."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from .samples import SAMPLE_FEATURES


def jsonl_samples(path: str | Path, num_samples: int | None = None) -> Dataset:
    """
    Reads samples from a file with one JSON object a line.

    Each has `image` or `images` (paths, relative to the file), `prompt`, and `answer`: one string, or a list of them
    where several are correct. `question_type`, `image_id` and `boxes` may be there; without an `image_id` samples of
    the same files share it. A field that is `null` is as one that is not there.

    Args:
        path (`str` or `Path`):
            The file.
        num_samples (`int`, *optional*):
            Only the first so many.

    Returns:
        `datasets.Dataset`: Rows of `SAMPLE_FEATURES`; `answer` is a list of strings where any line has a list.

    Raises:
        `ValueError`: If the file is empty, or a line is not a JSON object or lacks a field; it has its number.
        `OSError`: If the file or an image is missing.
    """
    path = Path(path)
    rows: list[dict[str, Any]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from None
    # not `splitlines`: JSON may hold what other texts end lines by
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and (num_samples is None or len(rows) < num_samples):
            rows.append(_row(line, f"{path}, line {number}", path.parent))
    if not rows:
        raise ValueError(f"{path} has no samples.")
    features = dict(SAMPLE_FEATURES)
    if any(isinstance(row["answer"], list) for row in rows):
        features["answer"] = List(Value("string"))
        for row in rows:
            row["answer"] = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return Dataset.from_list(rows, features=Features(features))


def _row(line: str, place: str, folder: Path) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise ValueError(f"{place}: expected an object with `images`, `prompt` and `answer`, got {line[:80]}.")
    given = {name: value for name, value in given.items() if value is not None}
    for name in ("prompt", "answer"):
        if name not in given:
            raise ValueError(f"{place}: `{name}` is missing; there are: {', '.join(given) or 'no fields'}.")
    if not isinstance(given["prompt"], str):
        raise ValueError(f"{place}: `prompt` is the question as a string; got {type(given['prompt']).__name__}.")
    names = given.get("images", given.get("image", []))
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"{place}: an image is named by its path; got {json.dumps(name)[:80]}.")
    paths = [folder / name for name in names]
    for image in paths:
        if not image.is_file():
            raise FileNotFoundError(f"{place}: there is no image file {image}.")
    answer = given["answer"]
    return {
        "images": [{"bytes": None, "path": str(image)} for image in paths],
        "prompt": given["prompt"],
        "answer": [str(one) for one in answer if one is not None] if isinstance(answer, list) else str(answer),
        "question_type": str(given.get("question_type", "all")),
        "boxes": given.get("boxes", []),
        "image_id": str(given.get("image_id", "\n".join(map(str, paths)))),
        "objects": [],
    }
