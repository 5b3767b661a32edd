"""The examples run on the embedded model, and each notebook is what its script makes."""

import base64
import io
import json
import re
import runpy
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import tprl_hf
from examples import make_notebooks

FOLDER = make_notebooks.FOLDER
NAMES = sorted(path.stem for path in FOLDER.glob("[0-9]*.py"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs an example as `python examples/NAME.py ARGUMENTS` does, in an empty directory; gives what it prints."""

    def run(name: str, *arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def shape(outputs: list[dict]) -> list:
    """What of a cell's outputs is the same wherever it runs: words, and sizes of pictures; not numbers."""
    found: list = []
    for output in outputs:
        data = output.get("data", {})
        lines = output["text"] if "text" in output else data["text/plain"]
        found.append([re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", line) for line in lines])
        if "image/png" in data:
            found.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).size)
    return found


@pytest.mark.parametrize("name", make_notebooks.NOTEBOOKS)
def test_a_notebook_is_what_its_script_makes(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = make_notebooks.make(name)
    saved = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    assert any("image/png" in output.get("data", {}) for cell in made["cells"] for output in cell.get("outputs", ()))
    for old, new in zip(saved["cells"], made["cells"], strict=True):
        assert {**old, "outputs": []} == {**new, "outputs": []}
        if not name.startswith("04"):  # training has times, and numbers that rounding changes
            assert [one.get("text") for one in old.get("outputs", ())] == [
                one.get("text") for one in new.get("outputs", ())
            ]
        assert shape(old.get("outputs", [])) == shape(new.get("outputs", []))
    assert {**saved, "cells": []} == {**made, "cells": []}
    if name.startswith("04"):
        model = AutoModelForImageTextToText.from_pretrained("counterfactual")
        assert model.config.policy_training["stage"] == "counterfactual" and model.config.keep_ratio == 1 / 9


def test_the_policy_of_the_notebook_learned():
    """What the page shows must be worth showing."""
    text = (FOLDER / "04_train_small.ipynb").read_text(encoding="utf-8")
    start, *_, end = map(float, re.findall(r"'eval_accuracy': '([\d.]+)'", text))
    assert end > start + 20


def test_a_script_is_cut_into_cells_and_run_in_order():
    source = '# %% [markdown]\n# # Title\n# Words.\n# %%\nx = 1\nprint("a")\n# %%\nx + 1\n'
    (kind, text), first, second = make_notebooks.cells_of(source)
    assert (kind, text) == ("markdown", "# Title\nWords.") and first == ("code", 'x = 1\nprint("a")')
    names: dict = {}
    assert make_notebooks.run_cell(first[1], names) == [{"output_type": "stream", "name": "stdout", "text": ["a\n"]}]
    (output,) = make_notebooks.run_cell(second[1], names)
    assert output["data"] == {"text/plain": ["2"]}


def test_a_tiny_qwen_is_wrapped(run):
    assert run("03_wrap_qwen_vl").splitlines() == [
        "Qwen2_5_VLForConditionalGeneration: 21 of 64 visual tokens are kept",
        "The prompt has 70 tokens; the cache of prompt and answer has 42",
        "Unpruned it answers as the base model does",
    ]


def test_a_lora_is_tuned(run, tmp_path):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    out = run("05_tune_lora", "2")
    assert re.findall(r"'loss': '([\d.]+)'", out) and "Saved" in out
    before, after = (
        AutoModelForImageTextToText.from_pretrained(path).state_dict()
        for path in (tprl_hf.embedded_checkpoint(), "tuned/merged")
    )
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert changed and all("language_model" in name and "_proj" in name for name in changed)
    assert not set(load_file(tmp_path / "tuned/adapter/adapter_model.safetensors")) & set(after)
    both = AutoModelForImageTextToText.from_pretrained(tmp_path / "tuned/both")
    assert any("lora" in name for name, _ in both.named_parameters())


def test_what_a_push_would_hold_is_printed(run, tmp_path):
    out = run("06_publish")
    sizes = dict(re.findall(r"^(\S+) +([\d,]+) bytes$", out, re.M))
    assert {"README.md", "config.json", "model.safetensors", "modeling_tprl.py", "tokenizer.json"} <= sizes.keys()
    assert "0.1111 of the visual tokens is kept" in out
    size = (tmp_path / "published/model.safetensors").stat().st_size
    assert sizes["model.safetensors"] == f"{size:,}"


def test_a_server_answers_as_the_model_does(run):
    line, *answers = run("07_serve").splitlines()
    assert line.startswith("Serving mosaic-llava at http://127.0.0.1:")
    notebook = (FOLDER / "01_generate.ipynb").read_text(encoding="utf-8")
    assert answers[:3] == re.findall(r'"(\d+ of \d+ tokens: \w+)\\n"', notebook)
    assert answers[3] == answers[1].split(": ")[1]  # streamed, at the checkpoint's own budget, a third


def test_each_example_is_on_the_page_and_short():
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name[:2] for name in NAMES] == [f"{number:02}" for number in range(1, len(NAMES) + 1)]
    for name in NAMES:
        assert f"({name}.py)" in page
        assert (f"({name}.ipynb)" in page) == (name in make_notebooks.NOTEBOOKS)
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 110, name
