"""A base model that is no checkpoint of ours, pruned inside vLLM by one flag and without training."""

import json
import shutil
from dataclasses import replace

import pytest

from tests.serving.vllm.engine import Request, answers, ask, engine, generated, save_tiny
from tests.stand_ins.noise import noise
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.missing_packages import load_processor
from tprl_hf.serving.vllm_plugin import ARCHITECTURE, register
from tprl_hf.serving.vllm_plugin.requests import PRUNERS_HERE

import vllm  # isort: skip  (engine skips where there is none)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # isort: skip

QUESTIONS = ["what colour is the cat ?", "where is the dog", "red left green"]
CLASS = {"architectures": [ARCHITECTURE]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base"
    save_tiny("llava", path)
    return path


@pytest.mark.parametrize("pruner", PRUNERS_HERE)
def test_the_same_tokens_as_with_the_pruner_in_generate(base, pruner):
    processor = load_processor(str(base))
    model = TPRLForConditionalGeneration.from_base_model(str(base), pruner=pruner, keep_ratio=0.4).eval()
    model.read_chat_template(processor)
    pictures = [noise((30 + 8 * index, 30), seed=index) for index in range(4)]
    requests = [
        Request(question, [picture], budget)
        for budget in ({}, {"num_keep": 3}, {"prune": False})
        for picture in pictures
        for question in QUESTIONS
    ]
    flag = {**CLASS, "tprl": {"pruner": pruner, "keep_ratio": 0.4}}
    with engine(base, max_model_len=128, hf_overrides=flag) as llm:
        assert answers(ask(llm, processor, requests)) == generated(model, processor, requests)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner": "vispruner", "keep_ratio": 0.4}, "'vispruner' does not run inside vLLM"),
        ({"pruner": "divprune", "keep": 0.4}, "To prune a base model pass --hf-overrides"),
        ({"keep_ratio": 0.4}, "To prune a base model pass --hf-overrides"),
        ({"pruner": "divprune", "threshold": 0.4}, "threshold=0.4 cannot be used with vLLM"),
    ],
    ids=json.dumps,
)
def test_what_is_refused_before_the_model_is_loaded(base, settings, message):
    with pytest.raises(ValueError, match=message), engine(base, hf_overrides={**CLASS, "tprl": settings}):
        pass


def test_quantised_weights_are_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "quantised")
    file = tmp_path / "quantised" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    flag = {**CLASS, "tprl": {"pruner": "divprune", "keep_ratio": 0.4}}
    with pytest.raises(ValueError, match="weights are quantised"), engine(file.parent, hf_overrides=flag):
        pass


def test_an_untrained_policy_is_refused(base, tmp_path):
    model = TPRLForConditionalGeneration.from_base_model(str(base))
    processor = load_processor(str(base))
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, save_base_model=True)
    with engine(tmp_path, max_model_len=128) as llm:  # it keeps all, unless a request says otherwise
        request = Request(QUESTIONS[0], [noise((30, 30), seed=9)])
        assert answers(ask(llm, processor, [request])) == generated(model, processor, [request])
        with pytest.raises(ValueError, match="has not been trained"):
            ask(llm, processor, [replace(request, budget={"num_keep": 3})])
    model.config.keep_ratio = 0.5
    model.save_pretrained(tmp_path, save_base_model=True)
    with pytest.raises(ValueError, match="has not been trained"), engine(tmp_path):
        pass


def test_other_releases_of_vllm_are_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.delitem(MODELS_CONFIG_MAP, ARCHITECTURE)
    register()
    assert ARCHITECTURE not in MODELS_CONFIG_MAP and "not 0.99.0" in caplog.text
    monkeypatch.undo()
    register()
    register()
    assert ARCHITECTURE in MODELS_CONFIG_MAP
