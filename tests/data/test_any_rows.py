"""Whatever a line of a user's file or an argument of a reader is: the row that it says, or one clear exception."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.any_values import NUMBERS, OTHERS, TEXTS, assert_good, is_count, judge, several, some_of
from tprl_hf.data import easy_vqa, jsonl_samples, mosaic_vqa
from tprl_hf.data.sources import read_source

PLAIN = st.one_of(
    NUMBERS,
    TEXTS,
    st.sampled_from([None, True, False, [], {}, ["a", "b"], ["a", None], [None], [[]], [{"a": 1}], [True], [1.5]]),
)
BOXES = st.sampled_from(
    [
        [],
        [[0, 1, 2, 3]],
        [[0, 1, 2, 3.0]],
        [0, 1, 2, 3],
        [[0, 1, 2]],
        [[0, 1, 2, 2.5]],
        [["a"] * 4],
        [[2**40] * 4],
        {},
        "x",
        0,
    ]
)
IMAGES = st.sampled_from(
    ["a.png", ["a.png"], ["a.png", "a.png"], [], "missing.png", "", 3, [3], [None], {}, True, "folder"]
)
FIELDS = {
    "prompt": PLAIN,
    "answer": PLAIN,
    "question_type": PLAIN,
    "image_id": PLAIN,
    "boxes": BOXES,
    "image": IMAGES,
    "images": IMAGES,
    "imagse": IMAGES,
    "anwser": PLAIN,
    "source": PLAIN,
}


def is_text(value: Any) -> bool:
    return isinstance(value, str) or (type(value) in (int, float) and value == value and abs(value) != float("inf"))


def is_answer(value: Any) -> bool:
    if isinstance(value, list):
        given = [one for one in value if one is not None]
        return bool(given) and all(map(is_text, given))
    return is_text(value)


def is_images(value: Any) -> bool:
    names = value if isinstance(value, list) else [value]
    return all(name == "a.png" and isinstance(name, str) for name in names)


def is_boxes(value: Any) -> bool:
    def is_pixel(edge: Any) -> bool:
        return type(edge) in (int, float) and abs(edge) < 2**31 and edge == int(edge)

    return isinstance(value, list) and all(
        isinstance(box, list) and len(box) == 4 and all(map(is_pixel, box)) for box in value
    )


VALID = {
    "prompt": lambda value: isinstance(value, str),
    "answer": is_answer,
    "question_type": is_text,
    "image_id": is_text,
    "boxes": is_boxes,
    "image": is_images,
    "images": is_images,
    "imagse": lambda value: False,
    "anwser": lambda value: False,
    "source": lambda value: True,
}


def text_of(answer):
    return str(int(answer)) if type(answer) is float and answer.is_integer() else str(answer)


@several(400)
@given(values=some_of(FIELDS, most=3), without=st.sampled_from(["", "", "", "prompt", "answer"]))
def test_a_line(values, without):
    row = {"prompt": "what ?", "answer": "a", **values}
    if without:
        row.pop(without)
    there = {name: value for name, value in row.items() if value is not None}
    is_valid = all(VALID[name](value) for name, value in there.items()) and "prompt" in there
    is_valid = is_valid and not ({"image", "images"} <= there.keys())

    def differs(rows):
        found = rows[0]
        answer = there.get("answer")
        expected = [text_of(one) for one in answer if one is not None] if isinstance(answer, list) else text_of(answer)
        names = there.get("images", there.get("image", []))
        same = (
            len(rows) == 1
            and found["prompt"] == there["prompt"]
            and (found["answer"] == expected if "answer" in there else "answer" not in found)
            and len(found["images"]) == (len(names) if isinstance(names, list) else 1)
            and found["boxes"] == there.get("boxes", [])
            and found["question_type"] == str(there.get("question_type", "all"))
        )
        return None if same else f"{found}"

    with tempfile.TemporaryDirectory() as folder:
        Image.new("RGB", (4, 4)).save(Path(folder) / "a.png")
        (Path(folder) / "folder").mkdir()
        path = Path(folder) / "own.jsonl"
        path.write_text(json.dumps(row))
        # fields by their names; of a value, what JSON writes; a missing one is named
        named = {name: json.dumps(value)[:20] for name, value in row.items()} | {"line 1": "line 1"}
        assert_good(judge(lambda: jsonl_samples(path), named, is_valid, differs))


LINES = st.sampled_from(
    [
        b"",
        b"\n",
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b"{}",
        b"{",
        b'{"prompt": "q", "answer": "a"',
        b"\xff\xfe",
        b"[" * 5000,
        b"\x00",
        b"NaN",
    ]
)


@several(60)
@given(lines=st.lists(st.one_of(LINES, st.just(b'{"prompt": "q", "answer": "a"}')), min_size=1, max_size=3))
def test_a_file(lines):
    good = b'{"prompt": "q", "answer": "a"}'
    is_valid = good in lines and all(line in (good, b"", b"\n") for line in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        path.write_bytes(b"\n".join(lines))
        verdict = judge(
            lambda: jsonl_samples(path),
            {"own.jsonl": "own.jsonl"},
            is_valid,
            lambda rows: None if len(rows) == lines.count(good) else f"{len(rows)} rows",
        )
    # which line, and that it is not JSON or what it lacks, is all that can be said
    assert_good(verdict, "line ", "UTF-8", "no samples")


ANY_NUMBER = st.one_of(NUMBERS, TEXTS, OTHERS)
FEW = st.integers(1, 8)


@several(150)
@given(
    reader=st.sampled_from(["mosaic", "easy", "jsonl", "source"]),
    number=st.one_of(ANY_NUMBER, FEW),
)
def test_how_many_samples(reader, number):
    plain_count = is_count(number) and type(number) is not float
    if plain_count and number > 40:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "own.jsonl"
        path.write_text("\n".join([json.dumps({"prompt": "q", "answer": "a"})] * 3))
        calls = {
            "mosaic": lambda: mosaic_vqa(num_samples=number),
            "easy": lambda: easy_vqa(num_samples=number),
            "jsonl": lambda: jsonl_samples(path, number),
            "source": lambda: read_source(str(path), "train", num_samples=number),
        }
        if number is None and reader == "easy":
            return  # all of it, which takes seconds
        most = 3 if reader in ("jsonl", "source") else 10**9
        is_valid = plain_count or (number is None and reader != "mosaic")
        expected = most if number is None else min(number, most) if plain_count else 0
        verdict = judge(
            calls[reader],
            {"num_samples": number},
            is_valid,
            lambda rows: None if len(rows) == expected else f"{len(rows)} rows",
        )
    assert_good(verdict)


@several(60)
@given(seed=st.one_of(ANY_NUMBER, FEW), split=st.one_of(ANY_NUMBER, st.sampled_from(["train", "validation", "test"])))
def test_seed_and_split_of_mosaic(seed, split):
    is_valid = (
        is_count(seed, 0) and type(seed) is int and type(split) is str and split in ("train", "validation", "test")
    )
    verdict = judge(
        lambda: mosaic_vqa(split=split, seed=seed, num_samples=1),
        {"seed": seed, "split": split},
        is_valid,
        lambda rows: None if len(rows) == 1 and rows[0]["image_id"].startswith(f"mosaic-{split}-{seed}") else "other",
    )
    assert_good(verdict)


@several(60)
@given(name=st.one_of(ANY_NUMBER, TEXTS))
def test_a_source(name):
    assert_good(judge(lambda: read_source(name, "train", num_samples=1), {"data": name}, False))
