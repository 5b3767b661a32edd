"""Datasets of users: names for numbers of a ClassLabel, columns that they lack, answers of other forms."""

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from tprl_hf.cli.train import load_source
from tprl_hf.data.own_rows import with_all_columns, with_names
from tprl_hf.data.samples import SAMPLE_FEATURES
from tprl_hf.data.sources import read_source

NAMES = ClassLabel(names=["red", "blue"])
NUMBERED = Features(
    {"prompt": Value("string"), "answer": NAMES, "question_type": NAMES, "label": NAMES, "image_id": Value("int64")}
)


def numbered(answers=(0, 1, None, -1), kinds=(1, 1, 0, None)) -> Dataset:
    rows = [
        {"prompt": f"what {n}?", "answer": answer, "question_type": kind, "label": 1, "image_id": n}
        for n, (answer, kind) in enumerate(zip(answers, kinds, strict=True))
    ]
    return Dataset.from_list(rows, features=NUMBERED)


@pytest.mark.parametrize("form", [None, "numpy", "torch", "arrow"])
def test_names_stand_for_their_numbers(form):
    found = with_names(numbered().with_format(form))
    assert found.features["answer"] == found.features["question_type"] == Value("string")
    assert found["answer"][:] == ["red", "blue", None, None]
    assert found["question_type"][:] == ["blue", "blue", "red", None]
    assert found["prompt"][:] == numbered()["prompt"][:] and found["image_id"][:] == [0, 1, 2, 3]
    assert found["label"][:] == [1] * 4  # a column of the user's, which nobody here reads


def test_names_in_lists_and_in_rows_that_were_chosen():
    lists = Features({"prompt": Value("string"), "answer": List(NAMES)})
    rows = [{"prompt": "q", "answer": answer} for answer in ([0, 1, 1], [], None, [1])]
    dataset = Dataset.from_list(rows, features=lists)
    assert with_names(dataset)["answer"][:] == [["red", "blue", "blue"], [], None, ["blue"]]
    assert with_names(dataset.select([3, 0]))["answer"][:] == [["blue"], ["red", "blue", "blue"]]


def test_rows_with_names_already_are_left_as_they_are():
    dataset = Dataset.from_dict({"prompt": ["q"], "answer": ["red"], "label": [3]})
    assert with_names(dataset) is dataset
    transformed = numbered().with_transform(lambda rows: rows)
    assert with_names(transformed) is transformed


def test_a_saved_dataset_is_read_with_names(tmp_path):
    numbered().save_to_disk(str(tmp_path / "saved"))
    assert read_source(str(tmp_path / "saved"), "train", num_samples=2)["answer"][:] == ["red", "blue"]


def test_question_types_of_a_recipe_are_names_or_numbers(tmp_path):
    numbered().save_to_disk(str(tmp_path / "names"))
    source = {"source": str(tmp_path / "names")}
    assert load_source({**source, "question_types": ["blue"]}, "train")["image_id"][:] == [0, 1]
    assert load_source({**source, "question_types": ["all", "red"]}, "train")["image_id"][:] == [2, 3]
    Dataset.from_dict({"prompt": ["a", "b"], "question_type": [0, 7]}).save_to_disk(str(tmp_path / "numbers"))
    assert load_source({"source": str(tmp_path / "numbers"), "question_types": [7]}, "train")["prompt"][:] == ["b"]
    for folder, known in (("names", "all, blue, red"), ("numbers", "0, 7")):
        with pytest.raises(ValueError, match=rf"has no questions of types \['green'\], but of {known}: list some"):
            load_source({"source": str(tmp_path / folder), "question_types": ["green"]}, "train")
    Dataset.from_dict({"prompt": ["a"]}).save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"has no questions of types \['green'\], but of all: list some of them"):
        load_source({"source": str(tmp_path / "none"), "question_types": ["green"]}, "train")


def test_columns_that_are_missing_are_filled():
    dataset = Dataset.from_dict({"prompt": ["a", "b"], "answer": ["red", "blue"]})
    found = with_all_columns(dataset)
    assert found["question_type"][:] == ["all"] * 2 and found["boxes"][:] == [[], []]
    assert found["image_id"][:] == [None] * 2 and found["answer"][:] == ["red", "blue"]
    some = {"question_type": ["count", None], "boxes": [[[0, 0, 8, 8]], None], "image_id": [3, 4]}
    found = with_all_columns(Dataset.from_dict({"prompt": ["a", "b"], **some}))
    assert found["question_type"][:] == ["count", "all"] and found["boxes"][:] == [[[0, 0, 8, 8]], []]
    assert found["image_id"][:] == ["3", "4"] and "answer" not in found.column_names


def test_rows_of_the_format_are_left_as_they_are():
    row = {"images": [], "prompt": "a", "answer": "b", "question_type": "c", "boxes": [], "image_id": "d"}
    dataset = Dataset.from_list([{**row, "objects": []}], features=SAMPLE_FEATURES)
    assert with_all_columns(dataset) is dataset


@pytest.mark.parametrize(
    ("answers", "texts"),
    [
        ([3, 0], ["3", "0"]),
        ([0.5, 2.0], ["0.5", "2"]),  # and [2, None] of pandas is [2.0, None]
        ([[1, 2], [3]], [["1", "2"], ["3"]]),
        ([["yes", None], ["no"]], [["yes"], ["no"]]),
        ([None, None], None),
        ([[], None], None),
    ],
)
def test_answers_are_texts(answers, texts):
    found = with_all_columns(Dataset.from_dict({"prompt": ["a", "b"], "answer": answers}))
    assert ("answer" in found.column_names) == (texts is not None)
    assert texts is None or found["answer"][:] == texts


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (["yes", None], r"`answer` is missing in 1 of 2 rows, first in row 1: give one to each row, or to none"),
        ([True, False], r"`answer` of row 0 must be a text or a number, or a list of them; got True"),
        ([[["a"]], [["b"]]], r"`answer` of row 0 must be a text .*; got \[\['a'\]\]"),
        ([{"answer": "a"}, {"answer": "b"}], r"`answer` of row 0 must be a text .*; got \{'answer': 'a'\}"),
        ([1.0, float("nan")], r"`answer` of row 1 must be a text .*; got nan"),
    ],
)
def test_answers_that_cannot_be_compared_are_shown(answers, message):
    with pytest.raises(ValueError, match=message):
        with_all_columns(Dataset.from_dict({"prompt": ["a", "b"], "answer": answers}))


@pytest.mark.parametrize(
    ("columns", "feature", "message"),
    [
        ({"prompt": ["a"], "photo": ["a.jpg"]}, None, "`photo` with pictures: call it `image`"),
        ({"prompt": ["a"], "image_paths": [["a.txt", "b.PNG"]]}, None, "`image_paths` with pictures"),
        ({"prompt": ["a"], "picture": [Image.new("RGB", (8, 8))]}, ImageFeature(), "`picture` with pictures"),
        (
            {"prompt": ["a"], "pictures": [[Image.new("RGB", (8, 8))]]},
            List(ImageFeature()),
            "`pictures` with pictures",
        ),
        ({"prompt": ["a"], "Label": ["b"]}, None, "`Label`: call it `answer`, or take it out"),
    ],
)
def test_pictures_and_answers_under_another_name_are_refused(tmp_path, columns, feature, message):
    """They would be evaluated without pictures, and without answers."""
    rows = Dataset.from_dict(columns)
    if feature is not None:
        rows = rows.cast_column(next(name for name in columns if name != "prompt"), feature)
    rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=message):
        read_source(str(tmp_path / "saved"), "train")
    other = next(name for name in columns if name != "prompt")
    rows.rename_column(other, "answer" if other == "Label" else "image").save_to_disk(str(tmp_path / "named"))
    assert read_source(str(tmp_path / "named"), "train")["prompt"] == ["a"]
