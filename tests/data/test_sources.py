import json

import pytest
from PIL import Image

from tprl_hf.data import mosaic_vqa
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


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085"])
def test_only_a_newline_ends_a_line(tmp_path, separator):
    """JSON may hold other separators as they are."""
    sample = {"images": [], "prompt": f"What{separator}now?", "answer": f"a{separator}b"}
    line = json.dumps(sample, ensure_ascii=False)
    (tmp_path / "own.jsonl").write_text(f"{line}\r\n{line}\n", encoding="utf-8", newline="")
    rows = read_source(str(tmp_path / "own.jsonl"), "train")
    assert rows["answer"] == [sample["answer"]] * 2 and rows["prompt"] == [sample["prompt"]] * 2
