"""Merged checkpoints of every exact family: in shards, and with tied embeddings where the family can have them."""

import copy
import json

import pytest
import torch

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
