"""All supported types hold the invariants, and docs/families.md says what is true."""

import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests.families.more import EVERY, OTHERS
from tests.families.shrunk_configs import shrunk
from tests.families.table import measure, registered
from tests.families.tiny_models import FAMILIES, MODEL_TYPES, build, collate, entry, sample
from tprl_hf.modeling import TokenLayout, TPRLForConditionalGeneration, adapter_for
from tprl_hf.modeling.family_adapters import REFUSED, SUPPORTED
from tprl_hf.pruners import ToMePruner
from tprl_hf.visualization import Panel, draw_kept_tokens, figures_by_block

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


@pytest.mark.parametrize("family", OTHERS)
def test_invariants(family):
    for name, deviation in measure(family).items():
        assert deviation <= 2e-5, name


WITH_SEPARATORS = (
    *("llava_next", "llava_onevision", "llava_next_video", "granite4_vision", "emu3"),
    *("hunyuan_vl", "hy_v4_vl", "unlimited_ocr", "deepseek_ocr2"),
)
# Whose projector makes tokens that stand for no place, or, in so small an image, only one.
WITHOUT_PLACES = ("aria", "deepseek_ocr2", "got_ocr2", "idefics2", "pp_chart2table", "step3p7")


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_layout_serves_grid_pruners_and_pictures(family):
    """Each token has a place of its own in a grid that it fills; row ends are kept, whatever the budget."""
    adapter = adapter_for(build(family))
    samples = [sample(family, 1, 1), sample(family, 2, 2)]
    batch = collate(family, samples)
    features = adapter.encode(batch["input_ids"], batch).modalities["image"]
    layout = TokenLayout.from_blocks(features.blocks)
    assert len(layout.row) == len(features.rows)
    panel = Panel("kept", keep_mask=torch.arange(len(layout.row)) % 2 == 0)
    pictures = [Image.new("RGB", (24, 24))] * len(layout.image.unique())
    figures = figures_by_block(pictures, layout, [panel])
    for figure in figures:
        height, width = int(figure.rows.max()) + 1, int(figure.columns.max()) + 1
        places = list(zip(figure.rows.tolist(), figure.columns.tolist(), strict=True))
        whole = list(itertools.product(range(height), range(width)))
        assert places == (whole[: len(places)] if family in WITHOUT_PLACES else whole)
        assert (height > 1 and width > 1) or family in WITHOUT_PLACES
    assert draw_kept_tokens(pictures[0], figures[0].panels[0].keep_mask, figures[0].rows, figures[0].columns)
    # newline, end-of-row and view separators are all that is protected
    assert bool(layout.protected.any()) == (family in WITH_SEPARATORS)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@torch.no_grad()
def test_pruning_and_pixels_matter(family):
    """Without this, a model that looks at no image would pass everything else."""
    base = build(family)
    numbering = "contiguous" if entry(family).own_positions else "original"
    model = TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
    ).eval()
    batch = collate(family, [sample(family, 2, 2)])
    full = base(**batch).logits[:, -1]
    assert (model(**batch, keep_ratio=0.3).logits[:, -1] - full).abs().max() > 1e-4
    none = torch.zeros(int(model.prune(**batch).num_visual), dtype=torch.bool)
    nothing = model(**batch, keep_mask=none).logits[:, -1]
    noise = torch.randn(batch["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    batch["pixel_values"] = batch["pixel_values"] + noise
    assert (base(**batch).logits[:, -1] - full).abs().max() > 1e-4
    assert torch.equal(model(**batch, keep_mask=none).logits[:, -1], nothing)


def test_supported_types_are_those_with_an_entry():
    assert sorted(SUPPORTED) == sorted({MODEL_TYPES.get(family, family) for family in [*FAMILIES, *EVERY]})


def test_the_page_lists_every_registered_type():
    page = PAGE.read_text()
    listed = set(re.findall(r"^\| ([\w\-.]+) \|", page, re.M)) - {"family", "type"}
    assert listed == set(registered()) | {*FAMILIES, *OTHERS}
    assert f"**{len({*FAMILIES, *OTHERS} - MODEL_TYPES.keys())} are exact**" in page


def test_types_without_the_road_are_refused_on_the_page():
    page = PAGE.read_text()
    for model_type, class_name in registered().items():
        takes = "mm_encoder_outputs" in inspect.signature(getattr(transformers, class_name).forward).parameters
        assert (f"| {model_type} | refused" in page) == (not takes or model_type in REFUSED)


@pytest.mark.parametrize("model_type", ["blip-2", "instructblip", "instructblipvideo"])
def test_types_that_take_features_and_cannot_be_pruned(model_type):
    """Without the refusal the features would be passed on to `generate`, which encodes the image once more."""
    base = AutoModelForImageTextToText.from_config(CONFIG_MAPPING[model_type](**shrunk(model_type)))
    with pytest.raises(ValueError, match=re.escape(f"'{model_type}' cannot be pruned: {REFUSED[model_type]}")):
        TPRLForConditionalGeneration.from_base_model(base)


@torch.no_grad()
def test_merged_tokens_cannot_go_to_a_base_that_projects_itself():
    model = TPRLForConditionalGeneration.from_base_model(
        build("llama4"), latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()
    batch = collate("llama4", [sample("llama4", 1, 1)])
    with model.using(ToMePruner(keep_ratio=0.5)), pytest.raises(ValueError, match="'llama4' project visual features"):
        model(**batch)


@pytest.mark.parametrize("family", [f for f in [*FAMILIES, *OTHERS] if entry(f).own_positions])
def test_gaps_are_refused_where_they_are_not_respected(family):
    with pytest.raises(ValueError, match="pass position_ids='contiguous'"):
        TPRLForConditionalGeneration.from_base_model(build(family), latent_dim=8, policy_training={"stage": "lfd"})
