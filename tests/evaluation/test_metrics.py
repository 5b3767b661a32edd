"""Each metric against published examples, and through `evaluate.load` without a network.

The examples and their numbers are those of the implementations' own tests and pages, named at each test.
`test_lmms_eval.py` compares more of them on random texts with lmms-eval's copies of the official scripts.
"""

from pathlib import Path

import evaluate
import pytest

from tprl_hf.answer_rules import (
    anls_score,
    box_iou,
    chosen_option,
    edit_distance,
    is_correct,
    normalize_vqa,
    relaxed_score,
    says_yes,
    vqa_score,
    yes_no_score,
)
from tprl_hf.evaluation import metrics


@pytest.mark.parametrize(
    ("answer", "reference", "correct"),
    [(" Yes.", "yes", True), ("red", "Red", True), ("yes it is", "yes", False), ("", "no", False), ("12", "1", False)],
)
def test_is_correct(answer, reference, correct):
    assert is_correct(answer, reference) is correct


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


@pytest.mark.parametrize("references", [["left"], ["on the left", "left"], ["left"] * 2, ["left"] * 3])
def test_up_to_three_references_are_answers_that_are_correct(references):
    """No answer could have three others that agree: an answer that all gave would score 2/3, or 1/3."""
    assert (vqa_score("Left.", references), vqa_score("right", references)) == (1.0, 0.0)
    assert vqa_score("left", ["left"] * 4) == 1.0 and vqa_score("left", ["left", "a", "b", "c"]) == 0.25


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


@pytest.mark.parametrize(
    ("reference", "expected"), [("Yes.", True), (" NO ", False), (["no", "yes", "yes"], True), (["No."], False)]
)
def test_references_of_yes_and_no_are_read_as_answers_are(reference, expected):
    assert yes_no_score("yes", reference) == float(expected) and yes_no_score("no", reference) == float(not expected)
    if isinstance(reference, str):
        found = metrics.POPE().compute(predictions=["Yes"], references=[reference])
        assert found["accuracy"] == found["precision"] == float(expected)


@pytest.mark.parametrize("reference", ["true", "red", "0", []])
def test_other_references_of_yes_and_no_are_refused(reference):
    with pytest.raises(ValueError, match="is neither yes nor no"):
        yes_no_score("yes", reference)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("The answer is: B", "B"),
        ("The correct answer is: (C).", "C"),
        ("So the answer is **D**.", "D"),
        ("answer: b", "B"),
        ("The answer is (b) a dog", "B"),
        ("The answer is option c.", "C"),
        ("The answer is a cat.", None),  # an article
        ("the answer is a red ball", None),
        ("The answer is an apple", None),
    ],
)
def test_the_letter_of_an_option_in_a_sentence(answer, letter):
    assert chosen_option(answer) == letter


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


# pix2struct/metrics_test.py of google-research/pix2struct: these lists give 62.5 % relaxed accuracy and 47.5 % ANLS
PIX2STRUCT = {
    "predictions": ["abc", "abc", "Abc", "100%", "100%", "100%", "100%", "Don't"],
    "references": ["abc", "Abc", "abc", "96%", "94%", "0.96", "0.94", "Won't"],
}


def test_pix2structs_published_numbers():
    assert metrics.RelaxedAccuracy().compute(**PIX2STRUCT)["relaxed_accuracy"] == 0.625
    assert metrics.ANLS().compute(**PIX2STRUCT)["anls"] == pytest.approx(0.475)


@pytest.mark.parametrize(
    ("answer", "score"), [("The Coca", 0.0), ("CocaCola", 0.89), ("Coca cola", 1.0), ("Cola", 0.0), ("Cat", 0.0)]
)
def test_anls_of_the_infographics_challenge(answer, score):
    """The example of the Robust Reading Competition's InfographicVQA task, as in the tests of shunk031/ANLS."""
    assert anls_score(answer, ["Coca Cola", "Coca Cola Company"]) == pytest.approx(score, abs=0.005)


def test_anls_of_its_metric_card():
    """The example of huggingface/evaluate's card, metrics/anls. Its page prints 1.0, the formula gives 0.958."""
    references = [["Denver Broncos", "Denver R. Broncos"], ["12/15/88"], ["Dear Dr. Lobo", "Dr. Lobo"]]
    found = metrics.ANLS().compute(predictions=["Denver Broncos", "12/15/89", "Dear dr. Lobo"], references=references)
    assert found["anls"] == pytest.approx((1 + 7 / 8 + 1) / 3)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [("dont", "don't"), ("girl's", "girl's"), ("2:50 pm", "2:50 pm"), ("100,978", "100978"), ("The three.", "3")],
)
def test_vqa_normalisation_of_its_page(text, normalized):
    """The cases that visualqa.org/evaluation.html names."""
    assert normalize_vqa(text) == normalized


@pytest.mark.parametrize(
    ("first", "others"),
    [
        ((0, 0, 100, 100), {(0, 0, 50, 50): 0.25, (200, 200, 300, 300): 0.0}),
        (
            (285.3538, 185.5758, 1193.5110, 851.4551),
            {(285.1472, 188.7374, 1192.4984, 851.0669): 0.9933, (279.2440, 197.9812, 1189.4746, 849.2019): 0.9673},
        ),
        ((100, 100, 200, 200), {(150, 150, 250, 250): 0.1429}),
    ],
)
def test_boxes_of_torchvisions_tests(first, others):
    """The boxes of `TestBoxIou` in torchvision's test_ops.py, and of the docs of pl_bolts' `iou`."""
    for second, expected in others.items():
        assert box_iou(first, second) == box_iou(second, first) == pytest.approx(expected, abs=5e-4)


def test_pope_counts_as_the_authors_script():
    """POPE's evaluate.py, by hand on the README's kind of answers: TP 2, FP 1, TN 3, FN 1."""
    predictions = [
        "yes",  # TP
        "Yes, there is a bird, and no tree. It flies.",  # the comma goes, "no" is a word of the first sentence: FN
        "There is a bird. No tree though.",  # TP
        "It is not visible",  # TN
        "No",  # TN
        "no, sorry.",  # TN
        "A tree, I think",  # FP
    ]
    found = metrics.POPE().compute(predictions=predictions, references=["yes"] * 3 + ["no"] * 4)
    precision, recall = 2 / 3, 2 / 3
    f1 = 2 * precision * recall / (precision + recall)
    assert found == pytest.approx(
        {"accuracy": 5 / 7, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": 3 / 7}
    )


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
        ("multiple_choice", {"predictions": ["B. dog", "dog"], "references": ["B", "B"]}, {"multiple_choice": 0.5}),
        ("pope", {"predictions": ["no"], "references": ["no"]}, {"accuracy": 1.0}),
        ("iou_at_50", {"predictions": [[0, 0, 1, 1]], "references": [[0, 0, 1, 1]]}, {"iou_at_50": 1.0}),
    ],
)
def test_evaluate_loads_them_from_their_path(name, inputs, found, tmp_path, modules_cache):
    path = Path(metrics.__file__).parent / name / f"{name}.py"
    metric = evaluate.load(str(path), cache_dir=str(tmp_path), module_type="metric")
    results = metric.compute(**inputs)
    assert {key: results[key] for key in found} == found
