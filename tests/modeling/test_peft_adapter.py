"""Policy and LoRA in one checkpoint: saved, loaded, switched off, merged."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.families.tiny_models import build, collate, sample
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.hub.publishing import files_to_publish

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.short

FAMILIES = ["llava", "gemma3", "qwen2_5_vl"]
LORA = {"r": 2, "target_modules": r".*language_model.*(q_proj|v_proj)", "init_lora_weights": False}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folders(family, tmp_path_factory):
    """Of a base model, of a policy around it, and of a LoRA that was trained around both."""
    folder = tmp_path_factory.mktemp(family)
    build(family).save_pretrained(folder / "base")
    torch.manual_seed(0)
    model = TPRLForConditionalGeneration.from_base_model(
        folder / "base", latent_dim=8, keep_ratio=0.5, policy_training={"stage": "lfd"}
    )
    model.save_pretrained(folder / "policy")
    torch.manual_seed(1)
    peft.get_peft_model(model, peft.LoraConfig(**LORA)).save_pretrained(folder / "lora")
    return folder


@pytest.fixture
def tuned(folders):
    model = TPRLForConditionalGeneration.from_pretrained(folders / "policy").eval()
    model.load_adapter(str(folders / "lora"))
    return model


def logits_of(model, family, **how):
    with torch.no_grad():
        return model(**collate(family, [sample(family, 1, seed) for seed in (3, 4)]), **how).logits


@pytest.mark.parametrize("save_base_model", [None, True])
def test_what_is_saved_comes_back(tuned, folders, family, tmp_path, save_base_model):
    expected = logits_of(tuned, family)
    plain = TPRLForConditionalGeneration.from_pretrained(folders / "policy").eval()
    assert not expected.equal(logits_of(plain, family))  # the LoRA does something
    around = peft.PeftModel.from_pretrained(plain, folders / "lora").eval()
    torch.testing.assert_close(logits_of(around, family), expected)

    tuned.save_pretrained(tmp_path / "tuned", save_base_model=save_base_model)
    names = load_file(tmp_path / "tuned" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in names)
    assert all(name.startswith(("policy.", "autoencoder.")) for name in names) == (save_base_model is None)
    for loader in (TPRLForConditionalGeneration, AutoModelForImageTextToText):
        again = loader.from_pretrained(tmp_path / "tuned").eval()
        assert logits_of(again, family).equal(expected)
    again.save_pretrained(tmp_path / "again", save_base_model=save_base_model)
    third = TPRLForConditionalGeneration.from_pretrained(tmp_path / "again").eval()
    assert logits_of(third, family).equal(expected)
    assert logits_of(tuned, family).equal(expected)  # saving changed nothing


def test_pruning_and_lora_switched_off_give_the_base_bit_for_bit(tuned, folders, family, tmp_path):
    tuned.save_pretrained(tmp_path)
    again = TPRLForConditionalGeneration.from_pretrained(tmp_path).eval()
    again.disable_adapters()
    base = AutoModelForImageTextToText.from_pretrained(folders / "base").eval()
    assert logits_of(again, family, prune=False).equal(logits_of(base, family))
    again.enable_adapters()
    assert logits_of(again, family).equal(logits_of(tuned, family))
    again.delete_adapter("default")
    assert logits_of(again, family, prune=False).equal(logits_of(base, family))
    for call in (again.disable_adapters, again.enable_adapters, lambda: again.delete_adapter("default")):
        with pytest.raises(ValueError, match="The model has no adapter"):
            call()


KINDS = {
    "DoRA": {"use_dora": True},
    "a module as a whole": {"modules_to_save": ["lm_head"]},
    "embeddings as a whole": {"modules_to_save": ["embed_tokens"]},
    "some tokens": {"trainable_token_indices": [3, 4]},
    "biases": {"bias": "lora_only"},
    "rank-stabilised": {"use_rslora": True},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_peft_trains_beside_a_lora_comes_back(kind, family, folders, tmp_path):
    policy = TPRLForConditionalGeneration.from_pretrained(folders / "policy").eval()
    base = logits_of(policy, family)
    around = peft.get_peft_model(policy, peft.LoraConfig(**(LORA | KINDS[kind]))).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in around.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn_like(weight)
    expected = logits_of(around, family)
    around.save_pretrained(tmp_path / "lora")

    model = TPRLForConditionalGeneration.from_pretrained(folders / "policy").eval()
    model.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(logits_of(model, family), expected)
    model.save_pretrained(tmp_path / "tuned")
    again = TPRLForConditionalGeneration.from_pretrained(tmp_path / "tuned").eval()
    torch.testing.assert_close(logits_of(again, family), expected)
    if kind != "biases":  # PEFT trains those of the base model, so they stay
        again.disable_adapters()
        assert logits_of(again, family).equal(base)
        again.enable_adapters()
        again.delete_adapter("default")
        assert logits_of(again, family).equal(base)


def test_it_is_merged_by_peft(tuned, folders, family, tmp_path):
    tuned.save_pretrained(tmp_path / "tuned")
    policy = TPRLForConditionalGeneration.from_pretrained(folders / "policy")
    merged = peft.PeftModel.from_pretrained(policy, tmp_path / "tuned" / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = TPRLForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert again.config.includes_base_model and not again.config.includes_adapter
    torch.testing.assert_close(logits_of(again, family), logits_of(tuned, family), atol=1e-5, rtol=1e-4)


def test_a_policy_that_is_saved_over_it_has_no_lora(tuned, folders, family, tmp_path):
    tuned.save_pretrained(tmp_path)
    plain = TPRLForConditionalGeneration.from_pretrained(folders / "policy").eval()
    plain.save_pretrained(tmp_path)
    assert logits_of(TPRLForConditionalGeneration.from_pretrained(tmp_path), family).equal(logits_of(plain, family))


def test_a_lora_that_is_not_whole_is_refused(tuned, tmp_path):
    tuned.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    first = sorted(weights)[0]
    save_file(
        {name: value for name, value in weights.items() if name != first},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"1 weights of the LoRA in .*adapter are missing"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path)
    (tmp_path / "adapter" / "adapter_config.json").unlink()
    with pytest.raises((OSError, ValueError), match="adapter"):
        TPRLForConditionalGeneration.from_pretrained(tmp_path)


def test_what_would_be_lost_is_refused(tuned, folders, tmp_path):
    with pytest.raises(ValueError, match=r"is_trainable=True\) would train weights.*PeftModel"):
        tuned.load_adapter(str(folders / "lora"), is_trainable=True)
    tuned.load_adapter(str(folders / "lora"), adapter_name="second")
    with pytest.raises(ValueError, match=r"one LoRA beside the policy; the model has .*second.*delete_adapter"):
        tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no adapter third; it has default, second"):
        tuned.delete_adapter("third")
    tuned.delete_adapter("second")
    tuned.save_pretrained(tmp_path)
    with torch.no_grad():
        next(p for name, p in tuned.named_parameters() if "base_layer" in name).mul_(2)
    with pytest.raises(ValueError, match="save_base_model=False would lose 1 weights"):
        tuned.save_pretrained(tmp_path, save_base_model=False)


def test_it_is_published_with_its_lora(tuned, tmp_path):
    class Api:
        token = None

    tuned.save_pretrained(tmp_path, save_base_model=True)
    files = files_to_publish(tmp_path, "me/tuned", Api(), licence="mit")
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "model.safetensors"} <= files.keys()
    assert json.loads(files["config.json"])["includes_adapter"]
