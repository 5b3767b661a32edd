"""Photo-VQA: what a scene shows is what its boxes and questions say, and splits share nothing they must not."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from tests.stand_ins.photographs import write_photographs
from tprl_hf.data import photo
from tprl_hf.data.photo import QUESTION_TYPES, SPLITS, photo_scenes, photo_vqa, pictures_root
from tprl_hf.data.photo_things import KINDS, NEW_THINGS, PICTURE_FILES, THINGS
from tprl_hf.data.sources import read_source


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("photo")
    write_photographs(directory / "pictures")
    return directory


@pytest.fixture(autouse=True)
def here(directory, monkeypatch):
    monkeypatch.setenv("TPRL_PHOTO", str(directory))


@pytest.fixture(scope="module")
def scenes(directory):
    return [(scene, asked) for _, scene, asked in islice(photo_scenes("train", 0, directory / "pictures"), 120)]


def answer_from_boxes(question, scene):
    """The answer as a person would find it from names, kinds and boxes, by other means than the generator's."""
    words, objects = question.prompt.rstrip("?").replace(",", "").split(), scene.objects
    present = {item.name: item for item in objects}
    if question.question_type in ("existence", "pair"):
        asked = [word for word in words if word in THINGS]
        return "yes" if set(asked) <= set(present) else "no"
    if question.question_type == "category":
        (name,) = [item.name for item in objects if item.kind == words[1]]
        return name
    if question.question_type == "counting":
        return photo.COUNTS[sum(item.kind == words[2].removesuffix("s") for item in objects)]
    if question.question_type == "relation":
        first, second = (present[word].center for word in words if word in present)
        holds = {
            "left": first[0] < second[0],
            "right": first[0] > second[0],
            "above": first[1] < second[1],
            "below": first[1] > second[1],
        }
        return "yes" if next(value for word, value in holds.items() if word in words) else "no"
    side = words[-1] if question.question_type == "place" else words[3 if words[2] == "farther" else 2]
    axis, sign = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "higher": (1, 1)}.get(side, (1, -1))
    if question.question_type == "comparison":
        candidates = [present[word] for word in words if word in present]
    elif words[2:4] == ["in", "the"]:
        candidates = [
            item
            for item in objects
            if (item.center[0] < 112) == (words[-1] == "left") and (item.center[1] < 112) == (words[-2] == "top")
        ]
        assert len(candidates) == 1
    else:
        candidates = objects
    return min(candidates, key=lambda item: sign * item.center[axis]).name


def test_answers_follow_from_names_and_boxes(scenes):
    seen = Counter()
    for scene, questions in scenes:
        assert sorted(question.question_type for question in questions) == sorted(QUESTION_TYPES)
        for question in questions:
            assert question.answer == answer_from_boxes(question, scene), (question, scene.objects)
            seen[question.question_type, question.answer] += 1
    for question_type in ("existence", "relation", "pair"):
        assert 0.35 < seen[question_type, "yes"] / len(scenes) < 0.65
    assert len({answer for question_type, answer in seen if question_type == "counting"}) >= 5


def test_things_lie_in_their_boxes_and_apart(scenes):
    for scene, _ in scenes:
        assert 3 <= len(scene.objects) <= 7
        assert len({item.name for item in scene.objects}) == len(scene.objects)
        for i, item in enumerate(scene.objects):
            rows, columns = np.nonzero(scene.instances == i)
            x0, y0, x1, y1 = item.box
            assert 0 <= x0 <= columns.min() and columns.max() < x1 <= 224
            assert 0 <= y0 <= rows.min() and rows.max() < y1 <= 224
            # an ellipse fills pi / 4 of its box; a neighbour may cover two rows of it
            assert len(rows) > 0.6 * (x1 - x0) * (y1 - y0)
            assert item.kind == THINGS[item.name].kind


def test_a_scene_depends_on_split_seed_and_index_only(directory):
    def first(split, seed):
        return [scene.pixels for _, scene, _ in islice(photo_scenes(split, seed, directory / "pictures"), 2)]

    again = first("test", 3)
    assert all(np.array_equal(a, b) for a, b in zip(first("test", 3), again, strict=True))
    for other in (first("test", 4), first("validation", 3), again[1:]):
        assert not np.array_equal(again[0], other[0])


def test_new_things_and_new_pictures_are_not_in_training():
    assert len(NEW_THINGS) == 15 and NEW_THINGS < set(THINGS)
    assert {thing.kind for thing in THINGS.values() if thing.name in NEW_THINGS} >= set(KINDS)
    unseen = {path for thing in THINGS.values() for path in thing.unseen}
    assert len(unseen) == 9
    shown: dict[str, set[str]] = {split: set() for split in SPLITS}
    names: dict[str, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for seed in range(600):
            for thing, path in photo._choose(np.random.default_rng(seed), split):
                shown[split].add(path)
                names[split].add(thing.name)
                assert path in thing.seen + thing.unseen
    for split in ("train", "validation", "test"):
        assert not shown[split] & unseen and not names[split] & NEW_THINGS
        assert names[split] == set(THINGS) - NEW_THINGS
    assert unseen < shown["new_pictures"] and not names["new_pictures"] & NEW_THINGS
    assert NEW_THINGS < names["new_things"]


def test_what_is_asked_for_in_vain_is_no_new_thing(scenes):
    for _, questions in scenes:
        for question in questions:
            assert not NEW_THINGS & set(question.prompt.replace("?", "").replace(",", "").split())


def test_rows_and_source(directory):
    rows = read_source("photo", "validation", seed=5, num_samples=9)
    assert len(rows) == 9 and rows[0]["images"][0].size == (224, 224)
    assert len(set(rows["image_id"])) == 2 and rows[0]["image_id"].startswith("photo-validation-5-")
    boxes = {tuple(item["box"]) for item in rows[0]["objects"]}
    for row in rows.select(range(7)):
        assert {tuple(box) for box in row["boxes"]} <= boxes
        assert bool(row["boxes"]) != (row["answer"] in ("no", "zero")) or row["question_type"] in ("relation", "pair")


def test_mistakes_name_the_value_and_the_cure(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="split 'dev'; one of train, validation, test, new_pictures, new_things"):
        photo_vqa(split="dev")
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1; got 0"):
        photo_vqa(num_samples=0)
    monkeypatch.setenv("TPRL_PHOTO", str(tmp_path))
    if not any((photo.Path("/") / path).is_file() for path in PICTURE_FILES):
        with pytest.raises(FileNotFoundError, match=r"tuxpaint-stamps-default.*test_bed\.photo_parts"):
            pictures_root()
