"""A user's own questions, from a JSON Lines file."""

import difflib
import json
import math
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, List, Value

from .own_rows import as_text, is_answer_name, names_a_picture
from .samples import FIELDS, SAMPLE_FEATURES, check_number


def jsonl_samples(path: str | Path, num_samples: int | None = None) -> Dataset:
    """
    Reads samples from a file with one JSON object a line.

    Each has `image` or `images` (paths, relative to the file), `prompt`, and `answer`: one text or number, or a list
    of them where several are correct. A file may do without `answer`, in all its lines. `question_type` and `image_id`
    (a text or a number) and `boxes` (`[x0, y0, x1, y1]` each) may be there; without an `image_id` samples of the same
    files share it. A field that is `null` is as one that is not there.

    Args:
        path (`str` or `Path`):
            The file.
        num_samples (`int`, *optional*):
            Only the first so many.

    Returns:
        `datasets.Dataset`: Rows of `SAMPLE_FEATURES`; `answer` is a list of strings where any line has a list, and is
        not there where no line has one.

    Raises:
        `ValueError`: If the file is empty, or a line is not a JSON object, lacks a field or has a wrong one; it has
            its number. And if pictures or answers seem to have a field of another name, such as `image_path`.
        `OSError`: If the file or an image is missing.
    """
    path = Path(path)
    if num_samples is not None:
        num_samples = check_number("num_samples", num_samples, 1)
    rows: list[dict[str, Any]] = []
    others: dict[str, Any] = {}  # fields that are not ours, with a value
    unlabelled: list[int] = []  # lines
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8 ({error}).") from None
    # not `splitlines`: JSON may hold what other texts end lines by
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and (num_samples is None or len(rows) < num_samples):
            given = _fields(line, f"{path}, line {number}")
            others = {name: value for name, value in given.items() if name not in FIELDS} | others
            rows.append(_row(given, f"{path}, line {number}", path.parent))
            unlabelled += [number] if rows[-1]["answer"] is None else []
    if not rows:
        raise ValueError(f"{path} has no samples.")
    _check_other_names(path, others, rows)
    features = dict(SAMPLE_FEATURES)
    if len(unlabelled) == len(rows):
        del features["answer"]
        rows = [{name: value for name, value in row.items() if name != "answer"} for row in rows]
        return Dataset.from_list(rows, features=Features(features))
    if unlabelled:
        raise ValueError(
            f"{path}, line {unlabelled[0]}: `answer` is missing, but {len(rows) - len(unlabelled)} other lines have "
            "one: give one to each line, or to none."
        )
    if any(isinstance(row["answer"], list) for row in rows):
        features["answer"] = List(Value("string"))
        for row in rows:
            row["answer"] = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    return Dataset.from_list(rows, features=Features(features))


def _check_other_names(path: Path, others: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Raises `ValueError` where no line has a picture, or none an answer, and a field of another name is it."""
    pictures = [name for name, value in others.items() if names_a_picture(value)]
    if pictures and not any(row["images"] for row in rows):
        raise ValueError(
            f"{path}: no line has `image`, and there is a field `{pictures[0]}`, {str(others[pictures[0]])[:80]}: "
            "call it `image`."
        )
    answers = [name for name in others if is_answer_name(name)]
    if answers and not any(row["answer"] for row in rows):
        raise ValueError(
            f"{path}: no line has `answer`, and there is a field `{answers[0]}`: call it `answer`, or leave it out if "
            "it is not the answer to `prompt`."
        )


def _fields(line: str, place: str) -> dict[str, Any]:
    """What a line holds; `null` is as a field that is not there."""
    try:
        given = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error}).") from None
    if not isinstance(given, dict):
        raise ValueError(f"{place}: expected an object with `images`, `prompt` and `answer`, got {line[:80]}.")
    given = {name: value for name, value in given.items() if value is not None}
    if "prompt" not in given:
        raise ValueError(f"{place}: `prompt` is missing; there are: {', '.join(given) or 'no fields'}.")
    for name in given:
        close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.8)
        if name not in FIELDS and close:
            raise ValueError(f"{place}: there is a field `{name}`; did you mean `{close[0]}`?")
    return given


def _row(given: dict[str, Any], place: str, folder: Path) -> dict[str, Any]:
    if not isinstance(given["prompt"], str):
        raise ValueError(f"{place}: `prompt` must be the question as a text; got {json.dumps(given['prompt'])[:80]}.")
    paths = _images(given, place, folder)
    return {
        "images": [{"bytes": None, "path": str(image)} for image in paths],
        "prompt": given["prompt"],
        "answer": None if "answer" not in given else _answer(given["answer"], place),
        "question_type": _text("question_type", given.get("question_type", "all"), place),
        "boxes": _boxes(given.get("boxes", []), place),
        "image_id": _text("image_id", given.get("image_id", "\n".join(map(str, paths))), place),
        "objects": [],
    }


def _answer(answer: Any, place: str) -> str | list[str]:
    """The correct answer, or several."""
    if not isinstance(answer, list):
        return _text("answer", answer, place)
    answers = [_text("answer", one, place) for one in answer if one is not None]
    if not answers:
        raise ValueError(f"{place}: `answer` is an empty list: list the answers that are correct.")
    return answers


def _images(given: dict[str, Any], place: str, folder: Path) -> list[Path]:
    """The image files that a line names."""
    if "image" in given and "images" in given:
        raise ValueError(f"{place}: `image` and `images` are two names for one thing: leave one out.")
    names = given.get("images", given.get("image", []))
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"{place}: an image is named by its path; got {json.dumps(name)[:80]}. Write `image` as a text."
            )
    paths = [folder / name for name in names]
    for image in paths:
        if not image.is_file():
            raise FileNotFoundError(f"{place}: there is no image file {image}. Write paths as seen from the file.")
    return paths


def _text(name: str, value: Any, place: str) -> str:
    """A text, or a number as one."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not isinstance(value, str) and not is_number:
        raise ValueError(f"{place}: `{name}` must be a text or a number; got {json.dumps(value)[:80]}.")
    return as_text(value) if name == "answer" else str(value)


def _boxes(boxes: Any, place: str) -> list[list[int]]:
    """Boxes in whole pixels."""
    for box in boxes if isinstance(boxes, list) else [boxes]:
        if not isinstance(box, list) or len(box) != 4 or not all(_is_pixel(edge) for edge in box):
            raise ValueError(
                f"{place}: `boxes` must be a list of [x0, y0, x1, y1] in whole pixels; got {json.dumps(boxes)[:80]}."
            )
    return [[int(edge) for edge in box] for box in boxes]


def _is_pixel(edge: Any) -> bool:
    is_number = isinstance(edge, (int, float)) and not isinstance(edge, bool) and abs(edge) < 2**31
    return is_number and edge == int(edge)
