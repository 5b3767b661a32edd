"""Datasets that users bring, in the format of `samples.py`: they may have numbers for names, and fewer columns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List, Value
from datasets import Image as ImageFeature

from .samples import SAMPLE_FEATURES

# By which a column is taken for pictures or answers that has another name.
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ANSWERS = ("label", "labels", "reference", "references", "ground_truth", "target", "gt", "solution", "completion")
TEXTS = ("prompt", "answer", "question_type", "image_id")  # columns that are read as texts


def names_a_picture(value: Any) -> bool:
    """Whether a value of a row is the path of a picture, or a list with one."""
    names = value if isinstance(value, list) else [value]
    return any(isinstance(name, str) and name.lower().endswith(PICTURES) for name in names)


def is_answer_name(name: str) -> bool:
    """Whether a column may be called so that has the answers."""
    return name.lower() in ANSWERS


def check_other_names(dataset: Dataset, place: str) -> None:
    """Raises `ValueError` where no column has the pictures, or none the answers, and one of another name does."""
    features = dataset.features
    dataset = dataset.select(range(min(len(dataset), 1)))
    if not {"image", "images"} & features.keys():
        for name, feature in features.items():
            inner = feature.feature if isinstance(feature, (List, LargeList)) else feature
            first = None if isinstance(inner, ImageFeature) else column_of(dataset, name)
            if first is None or (first and names_a_picture(first[0])):
                raise ValueError(f"{place} has no column `image`, and one `{name}` with pictures: call it `image`.")
    others = [name for name in features if is_answer_name(name)]
    if "answer" not in features and others:
        raise ValueError(
            f"{place} has no column `answer`, and one `{others[0]}`: call it `answer`, or take it out if it is not "
            "the answer to `prompt`."
        )


def with_names(dataset: Dataset) -> Dataset:
    """
    The same rows. Where a column that is read as text is a `ClassLabel`, or lists of one, its names stand for its
    numbers, and `None` for -1, by which such columns say that a label is not known.
    """
    for name in TEXTS:
        feature = dataset.features.get(name)
        if has_names(feature) and dataset.format["type"] != "custom":  # a transform of the user's gives what it gives
            values = [named(feature, value) for value in column_of(dataset, name)]
            dataset = with_column(dataset, name, values, text_like(feature))
    return dataset


def with_all_columns(dataset: Dataset) -> Dataset:
    """
    The same rows with all columns that evaluation reads: `answer` as texts, where there are any; a `question_type`,
    "all" where none is known; `boxes`, empty where there are none; and `image_id`.

    Raises:
        `ValueError`: for an `answer` that is neither a text nor a number, nor a list of them; and where only some rows
            have one.
    """
    columns, num_rows = dataset.column_names, len(dataset)
    if "answer" in columns:
        before = column_of(dataset, "answer")
        answers = [answer_of(value, f"row {number}") for number, value in enumerate(before)]
        known = num_rows - answers.count(None)
        if 0 < known < num_rows:
            raise ValueError(
                f"`answer` is missing in {num_rows - known} of {num_rows} rows, first in row {answers.index(None)}: "
                "give one to each row, or to none."
            )
        if not known:
            dataset = dataset.remove_columns("answer")
        elif answers != before:
            several = any(isinstance(answer, list) for answer in answers)
            feature = List(Value("string")) if several else Value("string")
            dataset = with_column(dataset, "answer", answers, feature)
    kinds = column_of(dataset, "question_type") if "question_type" in columns else [None] * num_rows
    named_kinds = [kind_of(kind) for kind in kinds]
    if named_kinds != kinds:
        dataset = with_column(dataset, "question_type", named_kinds, Value("string"))
    boxes = column_of(dataset, "boxes") if "boxes" in columns else [None] * num_rows
    if None in boxes:
        dataset = with_column(dataset, "boxes", [one or [] for one in boxes], SAMPLE_FEATURES["boxes"])
    ids = column_of(dataset, "image_id") if "image_id" in columns else [None] * num_rows
    named_ids = [None if one is None else str(one) for one in ids]  # so that none is the number of a question
    if "image_id" not in columns or named_ids != ids:
        dataset = with_column(dataset, "image_id", named_ids, Value("string"))
    return dataset


def kind_of(question_type: Any) -> str:
    """The type of a question as a text, also where types are numbers; "all" where it has none."""
    return "all" if question_type is None or question_type == "" else str(question_type)


def is_answer(value: Any) -> bool:
    """Whether it is one answer: a text, or a number."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, str) or is_number


def as_text(value: Any) -> str:
    """An answer as a text, as in `answer_rules`: 2.0, which a column of whole numbers with a gap holds, is "2"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def answer_of(value: Any, place: str) -> str | list[str] | None:
    """What a column `answer` holds, as texts; `None` where it holds nothing."""
    answers = [one for one in (value if isinstance(value, (list, tuple)) else [value]) if one is not None]
    for one in answers:
        if not is_answer(one):
            raise ValueError(
                f"`answer` of {place} must be a text or a number, or a list of them; got {repr(value)[:80]}."
            )
    if not answers:
        return None
    return [as_text(one) for one in answers] if isinstance(value, (list, tuple)) else as_text(answers[0])


def has_names(feature: Any) -> bool:
    """Whether a column holds numbers of a `ClassLabel`."""
    return has_names(feature.feature) if isinstance(feature, (List, LargeList)) else isinstance(feature, ClassLabel)


def named(feature: Any, value: Any) -> Any:
    """The names for a value of such a column."""
    if value is None or value == -1:
        return None
    if isinstance(feature, ClassLabel):
        return feature.int2str(value)
    return [named(feature.feature, one) for one in value]


def text_like(feature: Any) -> Any:
    """The feature of these names."""
    return Value("string") if isinstance(feature, ClassLabel) else List(text_like(feature.feature))


def column_of(dataset: Dataset, name: str) -> list[Any]:
    """All values of a column, without reading the others."""
    return dataset.select_columns(name).with_format(None)[:][name]


def with_column(dataset: Dataset, name: str, values: Sequence[Any], feature: Any) -> Dataset:
    """The same rows with other values of one column."""
    others = dataset.with_format(None)
    others = others.remove_columns(name) if name in others.column_names else others
    return others.add_column(name, list(values), feature=feature)
