"""`tprl train` resumes with the data that it began with, and with no others."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from tprl_hf.cli.main import main
from tprl_hf.cli.same_data import claim_data
from tprl_hf.data import jsonl_samples, mosaic_vqa

STAGES = {
    "autoencoder": {"max_steps": 2, "save_steps": 1, "disable_tqdm": True, "use_cpu": True},
    "demonstrations": {"teacher": "uniform"},
}


def write_questions(folder, color="red", answer="word7"):
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (24, 24), color).save(folder / "a.png")
    row = {"image": "a.png", "prompt": "word8", "answer": answer}
    (folder / "questions.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    return str(folder / "questions.jsonl")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("change", [{"color": "green"}, {"answer": "word9"}, {}])
def test_a_stage_does_not_resume_with_other_data(base, tmp_path, capsys, stage, change):
    source = write_questions(tmp_path / "data")
    sections = {
        "base_model": base,
        "output_dir": str(tmp_path / "run"),
        "policy": {"latent_dim": 16, "policy_num_heads": 4, "policy_dim": 16},
        "data": {"train": {"source": source}},
        stage: STAGES[stage],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    command = ["train", stage, "--config", str(tmp_path / "recipe.yaml")]
    assert main(command) == 0
    (tmp_path / "run" / stage / "training.json").unlink()  # as if it had been cut off before its end
    write_questions(tmp_path / "data", **change)
    capsys.readouterr()
    if not change:
        assert main(command) == 0
        return
    assert main(command) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # behind progress bars
    assert "was begun with other data: those of train have changed" in error and "delete" in error


def test_files_that_have_not_changed_are_not_read_again(tmp_path, monkeypatch):
    data = jsonl_samples(write_questions(tmp_path / "data"))
    read = []
    monkeypatch.setattr("tprl_hf.data.digest._content", lambda path: read.append(path) or "content")
    for _ in range(2):
        claim_data(tmp_path, {"train": data, "validation": None})
    assert len(read) == 1
    shutil.copytree(tmp_path / "data", tmp_path / "moved")
    claim_data(tmp_path, {"train": jsonl_samples(tmp_path / "moved" / "questions.jsonl")})
    assert len(read) == 2  # and found to be the same


@pytest.mark.parametrize("text", ["", "{", "[]", '{"train": 1}', '{"train": {"quick": "0"}}'])
def test_a_damaged_note_is_said(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=r"data\.json is damaged .*delete"):
        claim_data(tmp_path, {"train": mosaic_vqa("test", 7, 2)})
