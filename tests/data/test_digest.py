import json
import os
import shutil

import pytest
from datasets import Dataset, concatenate_datasets
from PIL import Image

from tprl_hf.data import easy_vqa, jsonl_samples, mosaic_vqa
from tprl_hf.data.digest import data_digest


def write_questions(folder, answer="red", color="red"):
    """Two questions about two pictures, as a user has them."""
    folder.mkdir(exist_ok=True)
    for name, fill in (("a.png", color), ("b.png", "blue")):
        Image.new("RGB", (8, 8), fill).save(folder / name)
    rows = [
        {"image": "a.png", "prompt": "What color?", "answer": answer},
        {"images": ["b.png", "a.png"], "prompt": "And this?", "answer": "blue"},
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return jsonl_samples(folder / "questions.jsonl")


def test_the_same_data_have_the_same_digest_wherever_they_lie(tmp_path):
    first = data_digest(write_questions(tmp_path / "here"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = jsonl_samples(tmp_path / "there" / "questions.jsonl")
    assert data_digest(moved) == first
    moved.save_to_disk(str(tmp_path / "saved"))  # with the bytes of the images
    assert data_digest(type(moved).load_from_disk(str(tmp_path / "saved"))) == first
    assert data_digest(mosaic_vqa("test", 7, 12)) == data_digest(mosaic_vqa("test", 7, 12))
    # in parts, and through indices
    whole = mosaic_vqa("test", 7, 12)
    parts = concatenate_datasets([whole.select([4, 3, 2, 1, 0][::-1]), whole.select(range(5, 12))])
    assert data_digest(parts) == data_digest(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.select(range(11)),
        lambda data: data.select([1, 0, *range(2, 12)]),
        lambda data: data.map(lambda row, i: {"answer": row["answer"] if i else "other"}, with_indices=True),
        lambda data: data.map(lambda row, i: {"prompt": row["prompt"] + "?"}, with_indices=True),
        lambda data: data.map(lambda row, i: {"images": data[(i + 6) % 12]["images"]}, with_indices=True),
        lambda data: data.map(lambda row, i: {"image_id": str(i)}, with_indices=True),
        lambda data: data.remove_columns("boxes"),
        lambda data: data.add_column("keep_masks", [[[True, False]]] * 12),
    ],
)
def test_other_rows_have_another(change):
    data = mosaic_vqa("test", 7, 12)
    assert data_digest(change(data)) != data_digest(data)


def test_another_picture_under_the_same_name_has_another(tmp_path):
    before = write_questions(tmp_path)
    digests = data_digest(before), data_digest(before, read_files=False)
    status = (tmp_path / "a.png").stat()
    after = write_questions(tmp_path, color="green")
    assert data_digest(after) != digests[0] and data_digest(after, read_files=False) != digests[1]
    # what the quick one takes for the same
    Image.new("RGB", (8, 8), "gray").save(tmp_path / "a.png")
    os.truncate(tmp_path / "a.png", status.st_size)
    for name in ("a.png", "b.png"):
        os.utime(tmp_path / name, ns=(0, 0))
    quick = data_digest(after, read_files=False)
    (tmp_path / "a.png").write_bytes(b"\0" * status.st_size)
    os.utime(tmp_path / "a.png", ns=(0, 0))
    assert data_digest(after, read_files=False) == quick


def test_paths_and_bytes_count_as_what_they_hold(tmp_path):
    write_questions(tmp_path)
    path = tmp_path / "a.png"
    content = path.read_bytes()
    made = [Dataset.from_dict({"image": one}) for one in ([str(path)], [content], [[str(path)]], [[content]])]
    of_path, of_bytes, *in_lists = map(data_digest, made)
    assert of_path == of_bytes and len(set(in_lists)) == 1
    path.write_bytes(b"of another")
    assert data_digest(made[0]) != of_path and data_digest(made[2]) != in_lists[0]


def test_a_file_is_read_once(monkeypatch):
    read = []
    monkeypatch.setattr("tprl_hf.data.digest._content", lambda path: read.append(path) or path)
    data_digest(easy_vqa("test", 30))
    assert len(read) == len(set(read)) < 30


def test_a_picture_that_is_gone_is_said(tmp_path):
    data = write_questions(tmp_path)
    (tmp_path / "b.png").unlink()
    for read_files in (True, False):
        with pytest.raises(FileNotFoundError, match=r"b\.png"):
            data_digest(data, read_files)
