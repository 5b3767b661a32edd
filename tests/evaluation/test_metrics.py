"""Each metric against examples of the official implementations, and through `evaluate.load` without a network."""

from pathlib import Path

import evaluate
import pytest

from tprl_hf.evaluation import metrics
from tprl_hf.evaluation.scores import (
    anls_score,
    box_iou,
    edit_distance,
    normalize_vqa,
    relaxed_score,
    says_yes,
    vqa_score,
    yes_no_score,
)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("Yes.", "yes"),
        ("two", "2"),
        ("None", "0"),
        ("a red  ball", "red ball"),
        ("The dog", "dog"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("ow's'at", "'ow's'at"),
        ("its lets im", "its lets im"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("t-shirt", "t shirt"),
        ("t- shirt", "t shirt"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("black/white", "black white"),
        ("yes\n", "yes"),
        ("", ""),
    ],
)
def test_vqa_normalisation(text, normalized):
    assert normalize_vqa(text) == normalized


@pytest.mark.parametrize(("count", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_averages_over_nine_of_ten_people(count, score):
    references = ["red"] * count + ["blue"] * (10 - count)
    assert vqa_score("Red.", references) == pytest.approx(score)


def test_vqa_accuracy_with_one_reference_is_exact():
    assert (vqa_score("two", "2"), vqa_score("two", ["3"]), vqa_score("Yes", ["yes"] * 10)) == (1.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("105", "100", 1.0),
        ("95", "100", 1.0),
        ("105.1", "100", 0.0),
        ("5%", "0.05", 1.0),
        ("5", "5%", 0.0),
        ("-9.6", "-10", 1.0),
        ("0", "0", 1.0),
        ("0.01", "0", 0.0),
        ("YES", "yes", 1.0),
        ("ten", "10", 0.0),
        ("2021", "2020", 1.0),
    ],
)
def test_relaxed_accuracy(answer, reference, score):
    assert relaxed_score(answer, reference) == score


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Denver Broncos", ["Denver Broncos", "Denver R. Broncos"], 1.0),
        ("hello world", "Hello  World", 1.0),
        ("Hello Wrld", "Hello World", 10 / 11),
        ("abcd", "abxy", 0.5),
        ("abcd", "axyz", 0.0),
        ("", "word", 0.0),
    ],
)
def test_anls(answer, references, score):
    assert anls_score(answer, references) == pytest.approx(score)


def test_edit_distance():
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", "abc"))] == [3, 3, 0]


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("no", False),
        ("No, there is no dog.", False),
        ("There is not a dog", False),
        ("Yes. There is no cat.", True),  # the first sentence alone
        ("nothing", True),
        ("There isn't", True),
    ],
)
def test_pope_reads_answers_as_the_authors_do(answer, yes):
    assert says_yes(answer) is yes
    assert yes_no_score(answer, "yes") == float(yes) and yes_no_score(answer, "no") == float(not yes)


def test_pope_counts_yes_as_positive():
    found = metrics.POPE().compute(
        predictions=["yes", "Yes", "no", "yes", "not really"], references=["yes", "yes", "yes", "no", "no"]
    )
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_ratio": 3 / 5}
    )
    never = metrics.POPE().compute(predictions=["no"], references=["yes"])
    assert never == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}


def test_boxes():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 2, 2), (0, 0, 2, 1)) == 0.5
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == box_iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    found = metrics.IoUAt50().compute(
        predictions=[[0, 0, 2, 2], [0, 0, 2, 2]], references=[[0, 0, 2, 1], [1, 1, 3, 3]]
    )
    assert found == pytest.approx({"iou_at_50": 0.5, "mean_iou": (0.5 + 1 / 7) / 2})


@pytest.fixture(scope="module")
def modules_cache(tmp_path_factory):
    """A place for the copies that `evaluate.load` imports, besides the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


TEXTS = {"predictions": ["yes", "4 dogs"], "references": [["yes", "yes", "yes", "yes"], ["four dogs"]]}


@pytest.mark.parametrize(
    ("name", "inputs", "found"),
    [
        ("vqa_accuracy", TEXTS, {"vqa_accuracy": 1.0}),
        ("exact_match_answer", TEXTS, {"exact_match": 0.5}),
        ("relaxed_accuracy", {"predictions": ["41", "b"], "references": ["40", "a"]}, {"relaxed_accuracy": 0.5}),
        ("anls", {"predictions": ["abcd"], "references": ["abcx"]}, {"anls": 0.75}),
        ("pope", {"predictions": ["no"], "references": ["no"]}, {"accuracy": 1.0}),
        ("iou_at_50", {"predictions": [[0, 0, 1, 1]], "references": [[0, 0, 1, 1]]}, {"iou_at_50": 1.0}),
    ],
)
def test_evaluate_loads_them_from_their_path(name, inputs, found, tmp_path, modules_cache):
    path = Path(metrics.__file__).parent / name / f"{name}.py"
    metric = evaluate.load(str(path), cache_dir=str(tmp_path), module_type="metric")
    results = metric.compute(**inputs)
    assert {key: results[key] for key in found} == found
