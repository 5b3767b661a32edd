"""Cards and numbers together: each filled card is what its template makes of the committed results."""

import json
import sys
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from transformers import AutoTokenizer

import tprl_hf
from tprl_hf.model_cards import render_card
from tprl_hf.model_cards.__main__ import main
from tprl_hf.test_bed.photo_checkpoint import TRAINED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/mosaic_llava"


def test_card_of_the_embedded_checkpoint_is_made_of_its_results():
    values = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in RESULTS.glob("*.json")}
    card = render_card("mosaic_llava", **values)
    assert (Path(tprl_hf.embedded_checkpoint()) / "README.md").read_text(encoding="utf-8") == card
    assert (ROOT / "model_cards/mosaic-llava.md").read_text(encoding="utf-8") == card
    tokenizer = AutoTokenizer.from_pretrained(tprl_hf.embedded_checkpoint())
    assert f"{len(tokenizer)} entries" in card
    assert values["mosaic"]["num_samples"] >= 2000 and values["mosaic"]["split"] == "test"
    assert {"none", "random", "uniform"} <= {row["pruner"] for row in values["mosaic"]["rows"]}


def test_the_command_fills_a_card_from_files(tmp_path, monkeypatch):
    files = [str(path) for path in sorted(RESULTS.glob("*.json"))]
    monkeypatch.setattr(sys, "argv", ["model_cards", "mosaic_llava", str(tmp_path / "card.md"), *files])
    main()
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert card == (Path(tprl_hf.embedded_checkpoint()) / "README.md").read_text(encoding="utf-8")


def test_card_of_photo_llava_is_made_of_its_results():
    results = ROOT / "docs/results/photo_llava"
    values = {
        name: json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("test", "training", "policy", "policy_training", "rules")
    }
    card = render_card("photo_llava", **values)
    assert values["policy"]["questions"] == values["rules"]["questions"]
    unpruned = [next(row for row in values[name]["rows"] if row["pruner"] == "none") for name in ("policy", "rules")]
    assert abs(unpruned[0]["accuracy"]["value"] - unpruned[1]["accuracy"]["value"]) < 0.005  # of bfloat16
    assert (TRAINED.parent / "README.md").read_text(encoding="utf-8") == card
    assert (ROOT / "model_cards/photo-llava.md").read_text(encoding="utf-8") == card
    assert values["test"]["num_samples"] >= 2000 and values["test"]["split"] == "test"
    log = [json.loads(line) for line in (results / "training.jsonl").read_text(encoding="utf-8").splitlines()]
    assert log[-1]["validation"]["all"] == round(values["training"]["validation"]["all"], 3)


def test_a_missing_number_is_an_error():
    with pytest.raises(UndefinedError, match="mosaic"):
        render_card("mosaic_llava")
