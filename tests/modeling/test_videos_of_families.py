"""Videos of every family whose base model takes them, beside an image where it takes both; and audio beside both."""

from inspect import signature

import pytest
import torch
import transformers

from tests.families.more import OTHERS
from tests.families.table import registered
from tests.families.tiny_models import FAMILIES, MODEL_TYPES, QWEN_TOWER, build, entry
from tests.families.videos import ALONE, VIDEOS, prompt
from tests.reference import delete_by_hand, full_positions, run
from tprl_hf.modeling import TPRLForConditionalGeneration
from tprl_hf.modeling.escalation import Escalation
from tprl_hf.pruners import PoolPruner
from tprl_hf.training.stored_features import from_file, to_bytes

KNOWN = [family for family in VIDEOS if family in FAMILIES or family in OTHERS]


def wrap(family, **changes):
    base = build(family, **changes)
    numbering = "contiguous" if entry(family).own_positions else "original"
    return base, TPRLForConditionalGeneration.from_base_model(
        base, latent_dim=8, policy_training={"stage": "lfd"}, position_ids=numbering
    ).eval()


def exact(base, model, inputs):
    """Keeping all is the base model; pruning is deleting by hand."""
    assert (model(**inputs, keep_ratio=1.0).logits - base(**inputs).logits).abs().max() <= 2e-5
    made = model.generate(**inputs, keep_ratio=1.0, max_new_tokens=3)
    assert torch.equal(made, base.generate(**inputs, max_new_tokens=3))
    plan = model.prune(**inputs, keep_ratio=0.5)
    logits, tokens = delete_by_hand(base, inputs, plan.keep_mask, model.config.position_ids, 3)
    assert (model(**inputs, keep_mask=plan.keep_mask, compact=True).logits - logits).abs().max() <= 2e-5
    made = model.generate(**inputs, keep_mask=plan.keep_mask, max_new_tokens=3)
    assert made[0, -3:].tolist() == tokens


@pytest.mark.parametrize("family", KNOWN)
@torch.no_grad()
def test_a_video(family):
    base, model = wrap(family)
    exact(base, model, prompt(family, base, with_image=family not in ALONE))


@pytest.mark.parametrize("with_image", [False, True])
@torch.no_grad()
def test_features_of_a_video_keep_its_seconds(with_image):
    """Features are taken of samples with what tells their positions, also where a list of seconds was passed."""
    base, model = wrap("qwen2_5_vl", vision_config={**QWEN_TOWER, "window_size": 16, "tokens_per_second": 4})
    inputs = prompt("qwen2_5_vl", base, with_image)
    expected = model(**inputs, keep_ratio=0.5)
    inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"].tolist()
    features = model.encode_images(**inputs).take([0, 0])
    words = {name: inputs[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    for row in model(**words, visual_features=features, keep_ratio=0.5).logits:
        assert (row - expected.logits[0]).abs().max() <= 2e-5
    looks = {"num_keep": 2, "escalate": Escalation(0.5, below=1.0), "max_new_tokens": 3}
    made = model.generate(**inputs, **looks)
    assert torch.equal(made, model.generate(**inputs, keep_ratio=0.5, max_new_tokens=3))


def test_no_family_with_videos_is_left_out():
    classes = {name: getattr(transformers, registered()[MODEL_TYPES.get(name, name)]) for name in [*FAMILIES, *OTHERS]}
    takes = [name for name, one in classes.items() if "pixel_values_videos" in signature(one.forward).parameters]
    assert sorted(takes) == sorted(KNOWN)


@pytest.mark.parametrize("family", [family for family in KNOWN if family.endswith("thinker")])
@torch.no_grad()
def test_audio_beside_an_image_and_a_video(family):
    base, model = wrap(family, audio_token_id=96)
    inputs = prompt(family, base, with_image=True)
    frames = torch.randn(1, base.config.audio_config.num_mel_bins, 40, generator=torch.Generator().manual_seed(1))
    audio = {"input_features": frames, "feature_attention_mask": torch.ones(1, 40, dtype=torch.long)}
    count = len(base.base_model.get_audio_features(**audio, return_dict=True).pooler_output)
    ids = inputs["input_ids"]
    ids = torch.cat([ids[:, :-3], torch.tensor([[94, *[96] * count, 95]]), ids[:, -3:]], 1)
    exact(base, model, {**inputs, **audio, "input_ids": ids, "attention_mask": torch.ones_like(ids)})


@pytest.mark.parametrize("family", ["glm4v", "glm4v_moe"])
@torch.no_grad()
def test_an_image_and_a_video_where_the_base_model_does_not_tell_them_apart(family):
    base, model = wrap(family)
    inputs = prompt(family, base, with_image=True)
    embeds, kinds = base.get_input_embeddings()(inputs["input_ids"]), inputs["mm_token_type_ids"]
    image = base.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
    video = base.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"], return_dict=True)
    embeds[kinds == 1], embeds[kinds == 2] = torch.cat(image.pooler_output), torch.cat(video.pooler_output)
    positions = full_positions(base, inputs)
    for ratio in (1.0, 0.5):
        plan = model.prune(**inputs, keep_ratio=ratio)
        kept = (kinds == 0)[0]
        kept[kinds[0] > 0] = plan.keep_mask
        expected = run(base, {"inputs_embeds": embeds[:, kept], "position_ids": positions[..., kept]})
        made = model(**inputs, keep_ratio=ratio, compact=True)
        assert (made.logits - expected).abs().max() <= 2e-5
    assert plan.layout.image.tolist() == [0] * 16 + [1] * 64


@pytest.mark.parametrize("family", [family for family in ("molmo2", "nemotron_h_omni") if family in KNOWN])
@torch.no_grad()
def test_images_and_videos_on_the_same_tokens_are_refused_together(family):
    base, model = wrap(family)
    with pytest.raises(ValueError, match="take images or videos, not both in one call"):
        model.prune(**prompt(family, base, with_image=True))


@torch.no_grad()
def test_a_base_model_that_prunes_videos_itself_is_refused():
    base, model = wrap("nemotron_h_omni", video_pruning_rate=0.5)
    with pytest.raises(ValueError, match=r"video_pruning_rate=0\.5: the base model would prune videos once more"):
        model.prune(**prompt("nemotron_h_omni", base, with_image=False))


@torch.no_grad()
def test_tokens_that_a_processor_dropped_leave_the_others_in_their_places(tmp_path):
    base, model = wrap("video_llama_3")
    inputs = prompt("video_llama_3", base, with_image=False)
    mask = inputs["video_compression_mask"]
    layout = model.prune(**inputs).layout
    assert (layout.block * 16 + layout.row * 4 + layout.column).tolist() == mask.nonzero()[:, 0].tolist()
    with model.using(PoolPruner(keep_ratio=0.5)):
        assert model.prune(**inputs).num_kept.tolist() == [round(int(mask.sum()) / 2)]
    with pytest.raises(ValueError, match="video_compression_mask has 3 entries for 64 tokens of the videos"):
        model.prune(**{**inputs, "video_compression_mask": mask[:3]})
    features = model.encode_images(**inputs)
    (tmp_path / "features").write_bytes(to_bytes(features))
    assert from_file(tmp_path / "features").modalities["video"].blocks == features.modalities["video"].blocks


@pytest.mark.parametrize(
    "family, grids",
    [
        ("llava_next_video", [(2, 2)] * 4),
        ("minicpmv4_6", [(2, 3)] * 4),
        ("molmo2", [(2, 2)] * 4),
        ("kimi_k25", [(4, 4)]),  # the mean of the frames
        ("gemma4", [(2, 3)] * 4),
    ],
)
@torch.no_grad()
def test_grids_of_frames(family, grids):
    base, model = wrap(family)
    layout = model.prune(**prompt(family, base, with_image=False)).layout
    frames = torch.stack([layout.image, layout.block, layout.height, layout.width], 1).unique(dim=0)
    assert frames[:, 2:].tolist() == [list(size) for size in grids]
    assert not layout.protected.any()


@torch.no_grad()
def test_frames_of_videos_of_different_length():
    base, model = wrap("gemma4")
    inputs = prompt("gemma4", base, with_image=False)
    ids = inputs["input_ids"]
    words = ids[0, 1:2]
    ids = torch.cat([ids[:, :9], words[None], ids[:, 9:]], 1)  # 6 tokens of the first frame, then 3 frames
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_frames_per_video": torch.tensor([1, 3])}
    layout = model.prune(**inputs).layout
    assert layout.image.tolist() == [0] * 6 + [1] * 18
    assert layout.block.tolist() == [0] * 6 + [0] * 6 + [1] * 6 + [2] * 6
