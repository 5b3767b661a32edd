"""A checkpoint whose generation config has stop strings: transformers' `generate` wants the tokenizer for these."""

import json
import shutil

import pytest
from transformers import GenerationConfig

import tprl_hf
from tprl_hf.app.asking import Asker
from tprl_hf.cli.main import main
from tprl_hf.data import mosaic_vqa
from tprl_hf.evaluation.answers import generate_answers
from tprl_hf.evaluation.look_again import answer_all
from tprl_hf.loading import load_model
from tprl_hf.training import calibrate_escalation
from tprl_hf.training.answer_batches import SampleEncoder
from tprl_hf.training.rewards import generate_completions
from tprl_hf.training.unpruned_answers import UnprunedAnswers


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The embedded model, whose answers would end at a text that none has."""
    path = tmp_path_factory.mktemp("stops") / "model"
    shutil.copytree(tprl_hf.embedded_checkpoint(), path)
    config = GenerationConfig.from_pretrained(path)
    config.stop_strings = ["yes yes"]
    config.save_pretrained(path)
    # transformers finds out how a tokenizer joins words with this one, which ours has to know
    file = path / "tokenizer.json"
    words = json.loads(file.read_text())
    words["model"]["vocab"]["abcdef"] = words["model"]["vocab"].pop("teal")
    file.write_text(json.dumps(words))
    return path


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "--image", "IMAGE", "--question", "Is there a cat?"],
        ["compare", "IMAGE", "Is there a cat?", "--keep-ratio", "1/9", "--model"],
        ["trajectory", "--steps", "2", "IMAGE", "Is there a cat?"],
        ["evaluate", "--num-samples", "6", "--pruners", "learned,fastv", "--keep-ratios", "1/9", "--time-rounds", "2"],
        ["benchmark", "--rounds", "2", "--keep-ratio", "1/9", "--load", "1"],
    ],
    ids=lambda words: words[0],
)
def test_commands_answer_as_without_them(words, checkpoint, image_file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [str(image_file) if word == "IMAGE" else word for word in words]
    assert main([*words, str(checkpoint)]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out


def test_python_functions_answer_as_without_them(checkpoint):
    rows = mosaic_vqa("test", seed=3, num_samples=4)
    samples = [rows[i] for i in range(len(rows))]
    question = (samples[0]["images"][0], samples[0]["prompt"])
    found = []
    for path in (tprl_hf.embedded_checkpoint(), checkpoint):
        model, processor = load_model(path)
        batch = SampleEncoder(model, processor)(samples)
        found.append(
            (
                generate_answers(model, processor, samples, max_new_tokens=8),
                generate_completions(model, processor, batch, batch.inputs.valid, [0, 1, 2, 3], 8),
                [one.text for one in UnprunedAnswers(model, processor, max_answer_length=8).answers(batch)],
                answer_all(model, processor, rows, {"fixed": {"keep_ratio": 1 / 9}})["fixed"].scores,
                [reply.answer for reply in Asker(model, processor, "model").ask(*question, ["fastv"], 16).replies],
                calibrate_escalation(model, processor, rows, 1 / 9, 1 / 3, 0.3),
            )
        )
    assert found[0] == found[1]
