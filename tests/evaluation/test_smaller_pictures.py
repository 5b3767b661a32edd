"""Rows `resize` and `pool`, family by family: the budget, or the nearest number that the processor can make."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.families.stock_processors import STOCK, save
from tests.families.tiny_models import build
from tests.families.tiny_processor import make_processor
from tests.test_processors import absent
from tprl_hf import TPRLForConditionalGeneration
from tprl_hf.evaluation.answers import chat_inputs
from tprl_hf.evaluation.compare_pruners import Setting, compare_pruners, encode_once
from tprl_hf.evaluation.smaller_pictures import PictureShrinker, enlarged, nearest_grid
from tprl_hf.missing_packages import load_processor
from tprl_hf.pruners import DivPrune, PoolPruner, VisPruner

RATIOS = (1 / 2, 1 / 4)
# Tokens of a picture of 96 by 72 pixels, and under `resize` at 1/2 and at 1/4 of them; None where it is refused.
TOKENS: dict[str, tuple[int, int | None, int | None]] = {
    "llava": (16, 9, 4),  # a square of 4 by 4 patches: 3 by 3, 2 by 2
    "paligemma": (16, 9, 4),
    "llava_next": (70, 36, 36),  # an overview, and tiles with their newlines
    "llava_onevision": (31, None, None),  # its only tiles do not become fewer
    "qwen2_vl": (12, 6, 4),  # 4 by 3: 3 by 2, 2 by 2
    "qwen2_5_vl": (12, 6, 4),
    "qwen3_vl": (12, 6, 4),
    "mistral3": (12, 6, 4),
    "internvl": (63, 45, 9),  # six tiles and an overview; four and one; one
    "aya_vision": (63, 45, 9),
    "idefics3": (45, 9, 9),  # four tiles and an overview; one
    "smolvlm": (45, 9, 9),
    "lfm2_vl": (10, 2, 2),  # two tiles and an overview; an overview of 2 by 1
    "gemma3": (16, None, None),  # always as many
}
# Tiny processors with more than one tile.
MORE_TILES = {
    "internvl": {"crop_to_patches": True, "max_patches": 6},
    "aya_vision": {"crop_to_patches": True, "max_patches": 6},
    "idefics3": {"do_image_splitting": True, "size": {"longest_edge": 48}},
    "smolvlm": {"do_image_splitting": True, "size": {"longest_edge": 48}},
    "llava_next": {"image_grid_pinpoints": [[24, 48], [48, 24], [48, 48]]},
}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def sample(*pictures: Image.Image, prompt: str = "what colour is the cat ?") -> dict:
    return {"images": list(pictures), "prompt": prompt, "answer": "red", "boxes": []}


def answers(model, processor, samples, *settings):
    found = compare_pruners(model, processor, samples, settings, max_new_tokens=3)
    return [record for records in found for record in records]


def tiny(family: str, directory):
    save(family, directory)
    processor, base = load_processor(directory), build(family)
    for name, value in MORE_TILES.get(family, {}).items():
        setattr(processor.image_processor, name, value)
    if family == "llava_next":
        base.config.image_grid_pinpoints = MORE_TILES[family]["image_grid_pinpoints"]
    return TPRLForConditionalGeneration.from_base_model(base, latent_dim=8).eval(), processor


def resize(ratio: float) -> Setting:
    return Setting("resize", str(ratio), None, {"prune": False}, picture_ratio=ratio)


UNPRUNED = Setting("none", "1", None, {"prune": False})


@pytest.mark.parametrize("family", STOCK)
def test_the_llm_sees_the_nearest_number_of_tokens_that_the_processor_can_make(family, tmp_path):
    if names := absent(family):
        pytest.skip(f"its processor needs {', '.join(names)}: pip install 'tprl_hf[processors]'")
    model, processor = tiny(family, tmp_path)
    full, *smaller = TOKENS[family]
    samples = [sample(noise(96, 72))]
    unpruned, whole = answers(model, processor, samples, UNPRUNED, resize(1.0))
    assert (unpruned.num_kept, unpruned.num_visual) == (full, full)
    # a budget of all tokens is the unpruned model, to the last bit
    assert (whole.answer, whole.probability, whole.num_kept) == (unpruned.answer, unpruned.probability, full)
    for ratio, num_tokens in zip(RATIOS, smaller, strict=True):
        if num_tokens is None:
            with pytest.raises(ValueError, match=f"makes {full} visual tokens of a picture of 96 by 72, however"):
                answers(model, processor, samples, resize(ratio))
        else:
            (record,) = answers(model, processor, samples, resize(ratio))
            assert (record.num_kept, record.num_visual) == (num_tokens, full)

        # behind the tower any number is possible
        pools = [Setting(str(p), "x", p, {"keep_ratio": ratio}) for p in (PoolPruner(), DivPrune())]
        pooled, pruned = answers(model, processor, samples, *pools)
        assert round(ratio * full) <= pooled.num_kept == pruned.num_kept  # separators are kept in any case


class TestShrinking:
    """A tiny LLaVA: 24 pixels, 4 by 4 patches."""

    @pytest.fixture(scope="class")
    def llava(self):
        return TPRLForConditionalGeneration.from_base_model(build("llava"), latent_dim=8).eval(), make_processor()

    def test_a_smaller_picture_is_what_the_tower_sees(self, llava):
        """The tower's own interpolation of a picture of 12 by 12 pixels, and nothing else."""
        model, processor = llava
        picture = noise(24, 24)
        small, shrunk = PictureShrinker(model, processor)(sample(picture, prompt="word7"), 1 / 4)
        inputs = chat_inputs(small, [shrunk])
        assert inputs["pixel_values"].shape == (1, 3, 12, 12)
        with torch.no_grad():
            features = model.encode_images(**inputs, interpolate_pos_encoding=True)
            base = model.lvlm.model.get_image_features(inputs["pixel_values"], interpolate_pos_encoding=True)
        assert torch.equal(features.modalities["image"].rows, base.pooler_output[0])
        assert processor.image_processor.crop_size["height"] == 24  # the user's processor is as it was

    def test_a_tower_that_takes_any_size_by_itself(self):
        """DINOv2, as in a LLaVA of photographs: it is not asked to interpolate, and does."""
        vision = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        base = build("llava", vision_config={**vision, "image_size": 24, "patch_size": 6})
        model = TPRLForConditionalGeneration.from_base_model(base, latent_dim=8).eval()
        assert model.adapter.smaller_picture_options == {}
        (record,) = answers(model, make_processor(), [sample(noise(24, 24), prompt="word7")], resize(1 / 4))
        assert (record.num_kept, record.num_visual) == (4, 16)

    def test_resize_and_prune(self, llava):
        """The budget counts the tokens of the full size, whatever the picture was shrunk to."""
        model, processor = llava
        samples = [sample(noise(24, 24, seed), prompt=f"word{seed}") for seed in range(3)] + [sample(prompt="word7")]
        settings = [
            Setting(f"resize+{name}", "1/8", method, {"keep_ratio": 1 / 8}, picture_ratio=1 / 2)
            for name, method in {"divprune": DivPrune(), "vispruner": VisPruner()}.items()
        ]
        records = answers(model, processor, samples, *settings)
        assert [(r.num_kept, r.num_visual) for r in records] == 2 * ([(2, 16)] * 3 + [(0, 0)])
        # each alone gives the same
        for number, one in enumerate(samples):
            (alone,) = answers(model, processor, [one], settings[0])
            assert (alone.answer, alone.num_kept) == (records[number].answer, records[number].num_kept)

    def test_several_pictures_share_a_processor(self, llava):
        model, processor = llava
        (record,) = answers(model, processor, [sample(noise(24, 24), noise(30, 40))], resize(1 / 4))
        assert (record.num_kept, record.num_visual) == (8, 32)

    def test_enlarged_again_has_all_tokens_and_less_detail(self, llava):
        model, processor = llava
        picture = noise(24, 36)
        again = enlarged(sample(picture), 1 / 9)["images"][0]
        assert again.size == picture.size and np.asarray(again).std() < np.asarray(picture).std() / 2
        setting = Setting("enlarged", "1/9", None, {"prune": False}, picture_ratio=1 / 9, enlarged=True)
        (record,) = answers(model, processor, [sample(picture)], setting)
        assert record.num_kept == record.num_visual == 16


@pytest.mark.parametrize(
    ("size", "target", "grid"),
    [
        ((144, 144), 48, (7, 7)),
        ((400, 300), 48, (8, 6)),
        ((300, 400), 12, (3, 4)),
        ((900, 100), 4, (4, 1)),
        ((9, 9), 1, (1, 1)),
    ],
)
def test_a_grid_keeps_the_shape_of_the_picture(size, target, grid):
    assert nearest_grid(size, target) == grid


def test_pictures_may_be_named_by_numbers(tmp_path):
    """0 is a name too: it is not the place of a sample, which may be the name of another picture."""
    model, processor = tiny("llava", tmp_path)
    pictures = [noise(96, 72, 0), noise(96, 72, 1)]
    samples = [{**sample(pictures[name]), "image_id": name} for name in (0, 0, 1, 1)]
    features = encode_once(model, processor, samples, None)
    alone = encode_once(model, processor, [sample(pictures[name]) for name in (0, 0, 1, 1)], None)
    for name, one in features.modalities.items():
        torch.testing.assert_close(one.rows, alone.modalities[name].rows)
