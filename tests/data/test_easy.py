"""easy-VQA, read from its package."""

import pytest

from tprl_hf.data import SAMPLE_FEATURES, easy_vqa


def test_both_splits_are_the_packages_own():
    easy_package = pytest.importorskip("easy_vqa")
    for split, read in (("train", easy_package.get_train_questions), ("test", easy_package.get_test_questions)):
        prompts, answers, _ = read()
        dataset = easy_vqa(split)
        assert sorted(zip(dataset["prompt"], dataset["answer"], strict=True)) == sorted(
            zip(prompts, answers, strict=True)
        )
    assert not set(easy_vqa("train")["image_id"]) & set(easy_vqa("test")["image_id"])


def test_rows_have_the_one_format():
    pytest.importorskip("easy_vqa")
    dataset = easy_vqa("test", num_samples=5)
    assert dataset.features == SAMPLE_FEATURES
    row = dataset[0]
    assert row["images"][0].size == (64, 64)
    assert row["boxes"] == [] and row["question_type"] in ("existence", "color", "shape")


def test_bad_settings():
    with pytest.raises(ValueError, match="Unknown split 'validation'"):
        easy_vqa("validation")
    pytest.importorskip("easy_vqa")
    with pytest.raises(ValueError, match="got 0"):
        easy_vqa("test", num_samples=0)
