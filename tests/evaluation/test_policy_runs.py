import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import tprl_hf
from tests.pruners.test_formulas import make_inputs
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.answers import generate_answers
from tprl_hf.evaluation.policy_runs import Questions, main
from tprl_hf.pruners.oracle import covered

NUM_QUESTIONS = 36  # 18 of each seed
AVERAGES = ("1/3 on average", "1/9 on average")


def test_tokens_on_boxes():
    inputs = make_inputs(num_samples=1, height=2, width=2)

    def on_boxes(boxes):
        return covered(inputs, 0, boxes, (20, 20)) > 0

    # 4 tokens of 10 pixels: the first box touches two columns of the upper row, the second only ends at an edge
    assert on_boxes([(5, 0, 12, 9)]).tolist() == [True, True, False, False]
    assert on_boxes([(0, 10, 10, 20)]).tolist() == [False, False, True, False]
    assert not on_boxes([]).any()


@pytest.mark.parametrize("way", ["ppo", "ppo=", "ppo=nowhere", "=nowhere"])
def test_ways_without_checkpoints_are_refused(way, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "runs.json"), way])
    assert "with a checkpoint in each DIR" in capsys.readouterr().err


def test_a_run_that_was_cut_off_asks_only_what_it_had_not(tmp_path, monkeypatch):
    path = tprl_hf.embedded_checkpoint()
    arguments = [str(tmp_path / "runs.json"), "--keep-ratios", "1/9", "--num-samples", "6", "--num-validation", "6"]
    settings = []
    monkeypatch.setattr(Questions, "answer", spy(settings, Questions.answer))
    main([*arguments, f"one={path}"])
    alone = json.loads((tmp_path / "runs.json").read_text())
    assert len(settings) == 2 and "divprune 1/9" in settings[0] and set(settings[1]) == {"1/9", *AVERAGES}
    main([*arguments, f"one={path}", f"two={path}"])
    both = json.loads((tmp_path / "runs.json").read_text())
    assert len(settings) == 2  # nothing new
    assert next(row for row in both["rows"] if row["way"] == "two")["accuracy"] == alone["rows"][0]["accuracy"]
    main([*arguments, f"one={path}", "--seeds", "8"])
    assert len(settings) == 4  # other questions


def spy(seen, function):
    def spied(self, model, processor, settings):
        seen.append(list(settings))
        return function(self, model, processor, settings)

    return spied


@torch.no_grad()
def test_what_it_counts_as_correct_is_what_greedy_decoding_answers(tmp_path, capsys):
    path = tprl_hf.embedded_checkpoint()
    arguments = [str(tmp_path / "runs.json"), f"one={path},{path}", f"two={path}", "--keep-ratios", "1/9"]
    main([*arguments, "--adaptive", "1/9", "--num-samples", "18", "--seeds", "7,8", "--num-validation", "24"])
    found = json.loads((tmp_path / "runs.json").read_text())
    rows = {(row["way"], row["budget"]): row for row in found["rows"]}

    samples = [*mosaic_vqa("test", 7, 18), *mosaic_vqa("test", 8, 18)]
    model, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    for budget, row in (
        ({"prune": False}, found["unpruned"]),
        ({"keep_ratio": 1 / 9}, rows["one", "1/9"]["accuracy"]),
    ):
        answers = generate_answers(model, processor, samples, max_new_tokens=8, **budget)
        correct = [answer == sample["answer"] for answer, sample in zip(answers, samples, strict=True)]
        assert row["value"] == pytest.approx(sum(correct) / NUM_QUESTIONS, abs=1e-4)

    fixed = rows["one", "1/9"]
    assert fixed["mean_kept"] == 16 and fixed["spread"] == 0 and len(fixed["accuracy_by_run"]) == 2
    assert fixed["less two"] == {"value": 0, "low": 0, "high": 0}  # the same policy
    assert rows["two", "1/9"]["spread"] is None
    assert (
        set(fixed["kept_by_type"]) == set(found["unpruned_by_type"]) == {sample["question_type"] for sample in samples}
    )
    assert fixed["on_boxes"] > rows["divprune", "1/9"]["on_boxes"] > rows["random", "1/9"]["on_boxes"]
    assert abs(rows["one", "1/9 on average"]["mean_kept"] - 16) < 6
