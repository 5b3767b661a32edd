"""The attention of the vision tower lies over the tokens its patches become, whatever the batch."""

import importlib.util

import pytest
import torch

from tests.families.more import OTHERS
from tests.families.tiny_models import FAMILIES, build, collate, sample
from tprl_hf.modeling import adapter_for, vision_attention
from tprl_hf.modeling.vision_attention import (
    OBSERVED,
    ObservedLayer,
    choose_layer,
    mean_over_queries,
    observed_attention,
    observed_tower,
)

# What cannot be read, and what the error says of it.
WITHOUT = {
    "aria": "do not become",
    "deepseek_ocr2": "do not become",
    "idefics2": "do not become",
    "nemotron_h_omni": "do not become",
    "apertus1p5": "in a way of its own",
    "got_ocr2": "in a way of its own",
    "lfm3_vl": "in a way of its own",
    "pp_chart2table": "in a way of its own",
    "chameleon": "no vision tower",
    "emu3": "no vision tower",
    "fuyu": "no vision tower",
    "gemma4_unified": "no vision tower",
}
WITH = [family for family in [*FAMILIES, *OTHERS] if family not in WITHOUT]
PROBES = 6


@pytest.mark.parametrize("family", WITH)
@torch.no_grad()
def test_attention_lies_over_the_tokens_its_patches_become(family):
    """A vector is put into the tower at one patch, while attention mixes nothing: which tokens change?"""
    base = build(family)
    adapter = adapter_for(base)
    batch = collate(family, [sample(family, 1, 1), sample(family, 2, 2)])
    with observed_tower(base) as (twin, layers):
        adapter.core = twin
        adapter.encode(batch["input_ids"], batch)
    adapter.core = base.base_model
    names = {module: name for name, module in twin.named_modules()}
    for one in layers:  # the tower's own, not those of the twin
        one.module = base.base_model.get_submodule(names[one.module])
    layer = choose_layer(layers, adapter.feature_layer, family)
    shapes = [mean.shape for mean in layer.mean]
    total, place = sum(shape.numel() for shape in shapes), -1

    def put_in(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        changed = torch.zeros_like(first)
        if module is layer.module and place >= 0:
            changed.view(-1, changed.shape[-1])[place] = torch.linspace(-5, 5, changed.shape[-1])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    for one in layers:
        one.module.register_forward_hook(put_in)
    still = adapter.encode(batch["input_ids"], batch).modalities["image"]
    for place in range(0, total, max(total // PROBES, 1)):
        rows = adapter.encode(batch["input_ids"], batch).modalities["image"].rows
        has_changed = (rows - still.rows).abs().amax(-1) > 1e-6
        received = torch.zeros(total)
        received[place] = 1.0
        parts = received.split([shape.numel() for shape in shapes])
        calls = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        noted = ObservedLayer(layer.module, calls, calls, calls)
        is_laid = adapter.received_attention("image", noted, still, batch) > 0
        assert not (is_laid & ~has_changed).any()
        assert is_laid.any() == has_changed.any()  # neither for [CLS] nor for padding


@pytest.mark.parametrize("family", WITH)
@torch.no_grad()
def test_attention_knows_no_batch_mate(family):
    base = build(family)
    adapter = adapter_for(base)
    before = base.config.vision_config._attn_implementation
    samples = [sample(family, 2, 2), sample(family, 1, 1), sample(family, 0, 3)]

    def attention(batch):
        encoded = adapter.encode(batch["input_ids"], batch, with_attention=True).modalities["image"]
        assert len(encoded.attention) == len(encoded.rows)
        return encoded.attention

    together = attention(collate(family, samples))
    alone = torch.cat([attention(collate(family, [one])) for one in samples[:2]])
    assert (together - alone).abs().max() <= 1e-6
    assert (alone > 0).sum() > 0
    assert base.config.vision_config._attn_implementation == before


@pytest.mark.parametrize("family", WITHOUT)
@torch.no_grad()
def test_what_cannot_be_read_is_said(family):
    base = build(family)
    adapter = adapter_for(base)
    batch = collate(family, [sample(family, 1, 1)])
    with pytest.raises(ValueError, match=rf"{WITHOUT[family]}.*without `needs_attention`"):
        adapter.encode(batch["input_ids"], batch, with_attention=True)
    adapter.encode(batch["input_ids"], batch)  # and all is as before


@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_observed_attention_is_attention(mask):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 7, 8, generator=generator)
    key, value = torch.randn(2, 2, 2, 7, 8, generator=generator)
    allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    allowed[1, :, :, 5:] = False
    given = {None: None, "bool": allowed, "float": torch.zeros(2, 1, 7, 7).masked_fill(~allowed, -1e30)}[mask]
    made, _ = observed_attention(torch.nn.Identity(), query, key, value, given)
    repeated = [part.repeat_interleave(2, 1) for part in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, *repeated, attn_mask=None if mask is None else allowed
    )
    assert torch.allclose(made, expected.transpose(1, 2), atol=1e-6)


def test_queries_that_are_padding_do_not_count():
    weights = torch.tensor([[[0.5, 0.5, 0.0], [0.25, 0.75, 0.0], [0.9, 0.1, 0.0]]])
    assert torch.allclose(mean_over_queries(weights), torch.tensor([[0.375, 0.625, 0.0]]))


def test_the_tower_itself_is_not_touched():
    base = build("llava")
    with observed_tower(base) as (twin, _):
        assert twin.vision_tower.config._attn_implementation == OBSERVED
        assert base.model.vision_tower.config._attn_implementation == "sdpa"
        assert twin.language_model.config is base.model.language_model.config
    assert [id(weight) for weight in twin.parameters()] == [id(weight) for weight in base.model.parameters()]


@torch.no_grad()
def test_a_tower_that_runs_twice_is_refused():
    base = build("llava")
    adapter = adapter_for(base)
    batch = collate("llava", [sample("llava", 1, 1)])
    with observed_tower(base) as (adapter.core, layers):
        for _ in range(2):
            adapter.encode(batch["input_ids"], batch)
    with pytest.raises(ValueError, match="ran several times"):
        choose_layer(layers, -1, "llava")


@torch.no_grad()
def test_a_copy_of_the_module_takes_its_own_notes():
    """As a second checkpoint brings one that is loaded with `trust_remote_code`."""
    spec = importlib.util.spec_from_file_location(f"{vision_attention.__name__}_copy", vision_attention.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    base, batch = build("llava").eval(), collate("llava", [sample("llava", 1, 1)])
    for module in (vision_attention, copy):
        with module.observed_tower(base) as (twin, layers):
            twin.get_image_features(pixel_values=batch["pixel_values"])
        assert layers
