"""Merged checkpoints of every exact family: in shards, and with tied embeddings where the family can have them."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, build, entry
from tprl_hf.modeling import TPRLForConditionalGeneration

# Their output layer is never the input embedding, whatever their config says.
NEVER_TIED = {"cosmos3_edge", "inkling2", "inkling2_loop", "molmo2", "muse_spark", "nemotron_h_omni"}


def tied_base(family):
    config = copy.deepcopy(build(family).config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = True
    torch.manual_seed(0)
    return type(build(family))(config)


def is_tied(model):
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_merged_in_shards_and_tied(family, tmp_path):
    base = tied_base(family)
    assert is_tied(base) == (family not in NEVER_TIED)
    numbering = "contiguous" if entry(family).own_positions else "original"
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
    )
    model.save_pretrained(tmp_path, save_base_model=True, max_shard_size="60KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    loaded = TPRLForConditionalGeneration.from_pretrained(tmp_path)
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys() and is_tied(loaded) == is_tied(base)
    assert not [name for name, value in expected.items() if not torch.equal(value, found[name])]


@pytest.fixture
def saved(tmp_path):
    """The same model three times: a base model in a folder of others, a policy beside it, and both in one."""
    build("llava").save_pretrained(tmp_path / "models" / "base")
    model = TPRLForConditionalGeneration.from_base_model(
        tmp_path / "models", subfolder="base", keep_ratio=0.5, pruner="divprune"
    )
    model.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "merged", save_base_model=True)
    return {"base": tmp_path / "models" / "base", "policy": tmp_path / "policy", "merged": tmp_path / "merged"}


def test_a_policy_finds_a_base_model_in_a_folder_of_others(saved):
    assert not json.loads((saved["policy"] / "config.json").read_text())["includes_base_model"]
    for auto_class in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
        for name in ("policy", "merged"):
            loaded = auto_class.from_pretrained(saved[name])
            assert type(loaded) is TPRLForConditionalGeneration
            assert torch.equal(loaded.get_input_embeddings().weight, build("llava").get_input_embeddings().weight)


@pytest.mark.parametrize("asked", [{"text_config": "eager"}, {"vision_config": "eager"}, "eager", {"": "eager"}, None])
def test_attention_is_asked_for_as_of_the_base_model(saved, asked):
    found = []
    for load, name in (
        (AutoModelForImageTextToText, "base"), (AutoModelForImageTextToText, "policy"),
        (AutoModelForImageTextToText, "merged"), (TPRLForConditionalGeneration, "policy"),
        (TPRLForConditionalGeneration, "merged"),
    ):  # fmt: skip
        model = load.from_pretrained(saved[name], **({} if asked is None else {"attn_implementation": asked}))
        config = getattr(model, "lvlm", model).config
        parts = (config, config.text_config, config.vision_config)
        found.append([part._attn_implementation for part in parts])
    assert found == found[:1] * 5
