import json

import pytest
from datasets import DatasetDict
from PIL import Image

from tprl_hf.data import jsonl_samples, mosaic_vqa
from tprl_hf.data.sources import is_source, read_source


def test_mosaic_by_its_name():
    samples = read_source("mosaic", "validation", seed=3, num_samples=6)
    assert samples["prompt"] == mosaic_vqa("validation", seed=3, num_samples=6)["prompt"]


def test_a_saved_dataset(tmp_path):
    made = mosaic_vqa(num_samples=6)
    made.save_to_disk(tmp_path / "saved")
    assert read_source(str(tmp_path / "saved"), "train")["prompt"] == made["prompt"]
    assert read_source(str(tmp_path / "saved"), "train", num_samples=2)["prompt"] == made["prompt"][:2]
    assert len(read_source(str(tmp_path / "saved"), "train", num_samples=9)) == 6


def test_json_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "black.png")
    lines = [json.dumps({"image": "black.png", "prompt": f"what {n}?", "answer": "black"}) for n in range(3)]
    (tmp_path / "own.jsonl").write_text("\n".join(lines))
    assert read_source(str(tmp_path / "own.jsonl"), "train", num_samples=2)["prompt"] == ["what 0?", "what 1?"]


def test_what_is_not_a_source(tmp_path):
    for name in ("gqa", str(tmp_path)):  # a task of lmms-eval; a directory without a dataset
        assert not is_source(name)
        with pytest.raises(ValueError, match=f"There are no data '{name}': a source is mosaic, easy-vqa"):
            read_source(name, "train")


def test_a_directory_of_several_splits(tmp_path):
    made = mosaic_vqa(num_samples=2)
    DatasetDict(train=made, test=made).save_to_disk(tmp_path / "saved")
    for read in (is_source, lambda name: read_source(name, "train")):
        with pytest.raises(ValueError, match=r"saved has several splits, train, test: name one of .*saved/train\."):
            read(str(tmp_path / "saved"))
    assert read_source(str(tmp_path / "saved" / "test"), "train")["prompt"] == made["prompt"]


@pytest.mark.parametrize("mark", [" ", "\u2028", "\u2029", "\u0085", "\x1c", "\x0b", "\x0c"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_json_lines_end_where_json_says(tmp_path, mark, end):
    row = {"prompt": f"is there{mark}a star ?", "answer": f"yes{mark}"}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + (line + end + end + line + end + "x").encode())
    with pytest.raises(ValueError, match="line 4: not JSON"):
        read_source(str(tmp_path / "own.jsonl"), "train")
    (tmp_path / "own.jsonl").write_bytes((line + end + line).encode())
    rows = read_source(str(tmp_path / "own.jsonl"), "train")
    assert rows["prompt"] == [row["prompt"]] * 2 and rows["answer"] == [row["answer"]] * 2


@pytest.mark.parametrize("name", ["image", "images", "question_type", "boxes", "image_id", "unknown"])
def test_null_is_as_if_it_were_not_there(tmp_path, name):
    row = {"prompt": "what ?", "answer": ["a", None]}
    rows = []
    for given in (row, {**row, name: None}):
        (tmp_path / "own.jsonl").write_text(json.dumps(given))
        rows.append(read_source(str(tmp_path / "own.jsonl"), "train")[0])
    assert rows[0] == rows[1] and rows[0]["answer"] == ["a"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("null", "line 2: expected an object"),
        ('{"prompt": null, "answer": "a"}', "line 2: `prompt` is missing"),
        ('{"prompt": "q", "answer": null}', "line 2: `answer` is missing"),
        ('{"prompt": "q", "answer": "a", "images": [null]}', "line 2: an image is named by its path; got null"),
        ('{"prompt": "q", "answer": "a", "image": 3}', "line 2: an image is named by its path; got 3"),
        ("[" * 100_000, "line 2: not JSON"),
    ],
)
def test_an_odd_line_is_named(tmp_path, line, message):
    (tmp_path / "own.jsonl").write_text('{"prompt": "q", "answer": "a"}\n' + line)
    with pytest.raises(ValueError, match=message):
        read_source(str(tmp_path / "own.jsonl"), "train")


def test_another_encoding_is_said(tmp_path):
    (tmp_path / "own.jsonl").write_bytes('{"prompt": "grün", "answer": "a"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"own\.jsonl is not a text in UTF-8"):
        read_source(str(tmp_path / "own.jsonl"), "train")


@pytest.mark.parametrize("name", ["image_path", "img", "picture", "file_name", "pictures"])
def test_a_picture_under_another_name_is_not_left_out(name, tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"prompt": "what ?", name: ["a.png"] if name == "pictures" else "a.png"}, {"prompt": "and ?", "id": 3}]
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=rf"no line has `image`, and there is a field `{name}`, .*: call it `image`"):
        jsonl_samples(path)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    path.write_text("\n".join(map(json.dumps, [*lines, {"prompt": "so ?", "image": "b.png"}])))
    assert [len(row["images"]) for row in jsonl_samples(path)] == [0, 0, 1]  # of a thumbnail, say


@pytest.mark.parametrize("name", ["label", "ground_truth", "Reference"])
def test_an_answer_under_another_name_is_not_left_out(name, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"prompt": "what ?", name: "red"}))
    with pytest.raises(ValueError, match=f"no line has `answer`, and there is a field `{name}`"):
        jsonl_samples(path)
    path.write_text(json.dumps({"prompt": "what ?", "answer": "red", name: "7"}))
    assert jsonl_samples(path)["answer"] == ["red"]
