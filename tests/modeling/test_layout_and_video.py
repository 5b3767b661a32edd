"""Where tokens lie, in every family; and videos, alone and beside images."""

import pytest
import torch

from tests.families.tiny_models import FAMILIES, IMAGE, VIDEO, Sample, build, collate, num_placeholders, sample
from tests.reference import delete_by_hand
from tprl_hf.modeling import Block, TokenLayout, TPRLForConditionalGeneration
from tprl_hf.modeling.token_layout import grid_blocks, join_tiles, sized_block, square_block
from tprl_hf.pruners import VisPruner

# (height, width) of each block of the first image of `sample(family, 1, 1)`
GRIDS = {
    "llava": [(4, 4)],
    "llava_next": [(4, 4), (4, 8)],
    "llava_onevision": [(4, 4), (2, 5)],
    "qwen2_vl": [(4, 6)],
    "qwen2_5_vl": [(4, 6)],
    "qwen3_vl": [(4, 6)],
    "internvl": [(3, 3), (3, 3)],
    "idefics3": [(3, 3)],
    "smolvlm": [(3, 3)],
    "paligemma": [(4, 4)],
    "paligemma2": [(4, 4)],
    "gemma3": [(4, 4)],
    "mistral3": [(2, 3)],
    "aya_vision": [(3, 3), (3, 3)],
}


def wrap(family):
    base = build(family)
    return base, TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}
    ).eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_layout(family):
    _, model = wrap(family)
    batch = collate(family, [sample(family, 1, 1), sample(family, 0, 3), sample(family, 2, 2)])
    layout = model.prune(**batch).layout
    first = layout[layout.image == 0]
    blocks = [first[first.block == index] for index in range(int(first.block.max()) + 1)]
    assert [(int(b.height[0]), int(b.width[0])) for b in blocks] == GRIDS[family]
    for block in blocks:
        content = block[~block.protected]
        places = list(zip(content.row.tolist(), content.column.tolist(), strict=True))
        assert places == [(r, c) for r in range(int(block.height[0])) for c in range(int(block.width[0]))]
        assert block.positions().min() > 0
        assert block.positions().max() <= 1
    owners = {"idefics3": 2, "smolvlm": 2}.get(family, 3)  # these give one entry for each sample
    assert layout.image.unique().tolist() == list(range(owners))
    assert layout.protected.any() == (family in ("llava_next", "llava_onevision"))


@pytest.mark.parametrize("size", [(1, 1000), (1000, 1)], ids=["flat", "tall"])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "llava_next_video", "granite4_vision"])
@torch.no_grad()
def test_of_a_picture_that_is_too_flat_no_crop_is_left(family, size):
    """The base model cuts padding away until no row is left, or rows without a token, which end in a separator."""
    base, model = wrap(family)
    pixels = {**sample(family, 1, 1).images[0], "image_sizes": torch.tensor([size])}
    inputs = collate(family, [Sample([1, 5, *[IMAGE] * num_placeholders(family, pixels), 7, 8], [pixels])])
    assert (model(**inputs, keep_ratio=1.0).logits - base(**inputs).logits).abs().max() <= 2e-5
    with model.using(VisPruner(keep_ratio=0.3)):
        plan = model.prune(**inputs)
        made = model.generate(**inputs, max_new_tokens=2)
    layout, height = plan.layout, int(plan.layout.height[0])
    content = layout[~layout.protected]
    assert len(content.row) == height**2 and content.block.unique().tolist() == [0]
    assert plan.keep_mask[layout.protected].all() and made.shape[1] == inputs["input_ids"].shape[1] + 2


def test_separators_are_the_newline_embedding():
    _, model = wrap("llava_next")
    batch = collate("llava_next", [sample("llava_next", 2, 1)])
    features = model.encode_images(**batch)
    layout = TokenLayout.from_blocks(features.modalities["image"].blocks)
    is_newline = (features.modalities["image"].rows == model.lvlm.model.image_newline).all(-1)
    assert torch.equal(layout.protected, is_newline)


def test_blocks_from_sizes():
    assert square_block(9) == Block(3, 3)
    assert square_block(10) == Block(1, 10)
    assert grid_blocks([3, 8, 12], 72) == [Block(4, 6)] * 3
    assert grid_blocks([1, 8, 12], 7) == [Block(1, 7)]
    assert sized_block([48, 72], 24) == Block(4, 6)
    assert join_tiles([[Block(2, 2)], [Block(2, 2)], [Block(2, 2)]], [8, 4]) == [[Block(2, 2)] * 2, [Block(2, 2)]]
    assert join_tiles([[Block(2, 2)], [Block(2, 2)]], [5, 3]) == [[Block(2, 2)], [Block(2, 2)]]
    assert join_tiles([[Block(2, 2)]], [8]) == [[Block(2, 2)]]
    assert Block(3, 4, row_newline=True).num_tokens == 15


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_video_beside_an_image(family):
    base, model = wrap(family)
    generator = torch.Generator().manual_seed(0)
    frame = [VIDEO] * 16
    # Qwen3-VL puts a timestamp before each frame
    video = [token for k in range(4) for token in ([7 + k] if family == "qwen3_vl" else []) + frame]
    ids = torch.tensor([[1, 5, *[IMAGE] * 16, 9, 9, *video, 6, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 96, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "pixel_values_videos": torch.randn(256, 96, generator=generator),
        "video_grid_thw": torch.tensor([[4, 8, 8]]),
        "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long(),
    }
    plan = exact(base, model, inputs)
    is_video = plan.layout.image == 1
    assert plan.layout.block[is_video].unique().tolist() == [0, 1, 2, 3]
    assert is_video.sum() == 64
    features = model.adapter.encode(ids, inputs, with_attention=True)
    for encoded in features.modalities.values():
        assert (encoded.attention > 0).all()
        assert len(encoded.attention) == len(encoded.rows)


@torch.no_grad()
def test_video_with_a_newline_beside_an_image():
    base, model = wrap("llava_onevision")
    batch = collate("llava_onevision", [sample("llava_onevision", 1, 1)])
    ids = batch["input_ids"]
    ids = torch.cat([ids[:, :-5], torch.full((1, 13), VIDEO), ids[:, -5:]], 1)
    frames = torch.randn(1, 3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    inputs = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": frames}
    plan = exact(base, model, inputs)
    video = plan.layout[plan.layout.image == 1]
    assert video.block.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3]
    assert video.protected.tolist() == [False] * 12 + [True]


def exact(base, model, inputs):
    assert (model(**inputs, keep_ratio=1.0).logits - base(**inputs).logits).abs().max() <= 2e-5
    plan = model.prune(**inputs, keep_ratio=0.5)
    logits, tokens = delete_by_hand(base, inputs, plan.keep_mask, "original", 4)
    assert (model(**inputs, keep_mask=plan.keep_mask, compact=True).logits - logits).abs().max() <= 2e-5
    for more in ({}, {"num_beams": 1, "prefill_chunk_size": 7}):
        made = model.generate(**inputs, keep_mask=plan.keep_mask, max_new_tokens=4, **more)
        assert made[0, -4:].tolist() == tokens
    assert torch.equal(made[:, :-4], inputs["input_ids"])
    return plan
