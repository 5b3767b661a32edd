import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from tprl_hf.intervals import bootstrap_mean, units_of


def test_the_interval_of_independent_scores_is_that_of_the_normal_approximation():
    scores = (np.random.default_rng(0).random(1000) < 0.7).astype(float)
    found = bootstrap_mean(scores)
    error = 1.96 * scores.std() / np.sqrt(len(scores))
    assert found.value == scores.mean() and found.count == 1000
    assert found.low == pytest.approx(found.value - error, abs=0.004)
    assert found.high == pytest.approx(found.value + error, abs=0.004)


def test_scores_of_one_unit_are_drawn_together():
    scores = (np.random.default_rng(1).random(200) < 0.5).astype(float)
    single = bootstrap_mean(scores)
    copied = bootstrap_mean(np.repeat(scores, 5), units=np.repeat(np.arange(200), 5).tolist())
    alone = bootstrap_mean(np.repeat(scores, 5))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high))
    assert alone.high - alone.low < 0.6 * (single.high - single.low)


def test_the_units_of_questions_are_their_images():
    """By their label; without one by what they show, as a saved dataset or a task of lmms-eval has them."""
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    pictures = [[red], [blue], [red.copy()], [red, blue], [], []]
    rows = {"images": pictures, "image_id": ["", None, None, "", None, ""]}
    features = Features({"images": List(ImageFeature()), "image_id": Value("string")})
    assert units_of(Dataset.from_dict(rows, features=features)) == [0, 1, 0, 3, 4, 5]
    assert units_of(Dataset.from_dict({**rows, "image_id": ["a", "a", None, "", "b", "0"]}, features=features)) == [
        *("a", "a", 2, 3, "b", "0"),
    ]
    assert units_of(Dataset.from_dict({"image_id": [0, 0, 1]})) == [0, 0, 1]  # 0 is an image too
    numbered = units_of(Dataset.from_dict({**rows, "image_id": ["4", "2", None, "", None, ""]}, features=features))
    assert len(set(map(str, numbered))) == 6  # a question without a label is not of the image "2" or "4"


def test_equal_scores_have_no_width_and_the_same_seed_gives_the_same_interval():
    assert bootstrap_mean([1.0, 1.0, 1.0]).low == 1.0
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert bootstrap_mean(scores) == bootstrap_mean(scores)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no scores"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="2 scores and 1 units"):
        bootstrap_mean([0.0, 1.0], units=["a"])
