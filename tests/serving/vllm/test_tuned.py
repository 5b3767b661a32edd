"""A tuned checkpoint, a policy with a LoRA, inside vLLM: the answers of the tuned LLM, not of the one before."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.vllm.engine import Request, answers, ask, engine, generated, save_tiny
from tests.stand_ins.noise import noise
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.missing_packages import load_processor

QUESTIONS = ["what colour is the cat ?", "where is the dog", "red left green"]


def tuned(directory, family: str, is_merged: bool, scale: str):
    """A policy with a random LoRA as `tune` saves it, written without PEFT, which vLLM's environment lacks; and the
    same model with the LoRA added to its weights by hand."""
    save_tiny(family, directory / "base")
    model = TPRLForConditionalGeneration.from_base_model(
        str(directory / "base"), keep_ratio=0.4, policy_training={"stage": "tune"}
    ).eval()
    processor = load_processor(str(directory / "base"))
    model.read_chat_template(processor)
    model.save_pretrained(directory / "tuned", save_base_model=is_merged)
    processor.save_pretrained(directory / "tuned")
    torch.manual_seed(0)
    state = {}
    with torch.no_grad():
        for name, layer in model.named_modules():
            if "language_model" in name and name.endswith(("q_proj", "o_proj", "up_proj")):
                down, up = torch.randn(4, layer.in_features) / 8, torch.randn(layer.out_features, 4) / 8
                state |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
                layer.weight += (8 / 4 if scale == "lora" else 8 / 2) * up @ down
    folder = directory / "tuned" / "adapter"
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "bias": "none", "use_rslora": scale == "rslora"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    config = json.loads((directory / "tuned" / "config.json").read_text()) | {"includes_adapter": True}
    (directory / "tuned" / "config.json").write_text(json.dumps(config))
    return model, processor, directory / "tuned"


@pytest.mark.parametrize(
    ("family", "is_merged", "scale"),
    [("llava", True, "lora"), ("llava", False, "rslora"), ("qwen2_5_vl", False, "lora"), ("qwen3_vl", True, "lora")],
)
def test_the_tuned_llm_answers(family, is_merged, scale, tmp_path):
    model, processor, path = tuned(tmp_path, family, is_merged, scale)
    untuned = TPRLForConditionalGeneration.from_base_model(
        str(tmp_path / "base"), keep_ratio=0.4, policy_training={"stage": "tune"}
    ).eval()
    untuned.read_chat_template(processor)
    pictures = [noise((56 + 28 * index, 56), seed=index) for index in range(3)]
    requests = [
        Request(question, [picture], budget)
        for budget in ({}, {"prune": False})
        for picture in pictures
        for question in QUESTIONS
    ]
    wanted = generated(model, processor, requests)
    assert wanted != generated(untuned, processor, requests)
    with engine(path, max_model_len=128) as llm:
        assert answers(ask(llm, processor, requests)) == wanted


@pytest.mark.parametrize("fault", ["dora", "place"])
def test_a_lora_that_could_not_be_added_is_refused(fault, tmp_path):
    _, _, path = tuned(tmp_path, "llava", True, "lora")
    file = path / "adapter" / "adapter_model.safetensors"
    state = load_file(file)
    name = next(iter(state))
    if fault == "dora":
        state[name.replace("lora_A.weight", "lora_magnitude_vector")] = torch.ones(1)
    else:
        state = {name.replace(".layers.1.", ".layers.7."): value for name, value in state.items()}
    save_file(state, file)
    message = {"dora": "lora_magnitude_vector; inside vLLM it may have", "place": "have no place in the base model"}
    with pytest.raises((ValueError, RuntimeError), match=message[fault]), engine(path, max_model_len=128):
        pass
