"""Tiny random models of each family, built in memory: hidden 32, two layers, images of a few patches.

A family is one entry of `FAMILIES`: a config, and the pixels of one image as its processor would give them.
`build(family)` gives the base model, `sample` a single prompt with its images, `collate` a batch of samples, left- or
right-padded. How many placeholders an image needs is asked from the base model's own encoder.
"""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

PAD, BOS, EOS, IMAGE, VIDEO = 0, 1, 2, 90, 91
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
    "projection_dim": 32,
}
QWEN_TOWER: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "hidden_size": 32,
    "out_hidden_size": 32,
    "intermediate_size": 48,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
Pixels = dict[str, Tensor]


@dataclass
class Family:
    """
    Args:
        config: keyword arguments of the base model's config, or a function that gives them.
        image: pixels of one image, from a generator and a number that varies its size.
        join: pixels of several samples, each a list of images, as one batch.
        extras: further inputs that follow from the ids.
        uncached_differs: the base model's own generation without a cache is not that with one.
        own_positions: the base model respects no gaps in positions.
        batch_differs: the base model's own batch is not its samples one by one.
        around: ids before and behind an image, without which the base model takes it for text where it counts
            positions.
    """

    config: dict[str, Any] | Callable[[], dict[str, Any]]
    image: Callable[[torch.Generator, int], Pixels]
    join: Callable[[list[list[Pixels]]], Pixels]
    extras: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}
    uncached_differs: bool = False
    own_positions: bool = False
    batch_differs: bool = False
    around: tuple[int, ...] = ()


def text(model_type: str, **changes) -> dict[str, Any]:
    return {**TEXT, "model_type": model_type, **changes}


def tower(model_type: str, **changes) -> dict[str, Any]:
    return {**TOWER, "model_type": model_type, **changes}


# ---- pixels ----


def square(generator: torch.Generator, kind: int) -> Pixels:
    return {"pixel_values": torch.randn(1, 3, 24, 24, generator=generator)}


def tiles(generator: torch.Generator, kind: int) -> Pixels:
    return {"pixel_values": torch.randn(1 + kind % 2, 3, 24, 24, generator=generator)}


def grid(generator: torch.Generator, kind: int) -> Pixels:
    height, width = [(8, 8), (8, 12), (12, 8)][kind % 3]
    return {
        "pixel_values": torch.randn(height * width, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def sized(generator: torch.Generator, kind: int) -> Pixels:
    height, width = [(24, 24), (24, 36), (36, 24)][kind % 3]
    return {
        "pixel_values": torch.randn(1, 3, height, width, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def crops(generator: torch.Generator, kind: int) -> Pixels:
    """An overview and two crops; the sizes leave padding to be cut away."""
    height, width = [(40, 20), (24, 44), (48, 24)][kind % 3]
    return {
        "pixel_values": torch.randn(1, 3, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def masked(generator: torch.Generator, kind: int) -> Pixels:
    return {
        "pixel_values": torch.randn(1, 3, 24, 24, generator=generator),
        "pixel_attention_mask": torch.ones(1, 24, 24, dtype=torch.bool),
    }


def concatenate(samples: list[list[Pixels]]) -> Pixels:
    """All images of the batch behind each other, padded to the largest."""
    images = [image for sample in samples for image in sample]
    joined = {}
    for name in images[0]:
        values = [image[name] for image in images]
        if name == "pixel_values" and values[0].ndim == 4 and len({v.shape[2:] for v in values}) > 1:
            height, width = (max(v.shape[d] for v in values) for d in (2, 3))
            values = [torch.nn.functional.pad(v, (0, width - v.shape[3], 0, height - v.shape[2])) for v in values]
        joined[name] = torch.cat(values)
    return joined


def per_sample(samples: list[list[Pixels]]) -> Pixels:
    """One row of images for each sample, empty images behind those that have fewer."""
    most = max(len(images) for images in samples)
    first = next(image for images in samples for image in images)
    joined = {}
    for name, value in first.items():
        rows = [[image[name] for image in images] for images in samples]
        empty = torch.zeros_like(value)
        joined[name] = torch.stack([torch.cat([*row, *[empty] * (most - len(row))]) for row in rows])
    return joined


# ---- inputs that follow from the ids ----


def modality_types(ids: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == VIDEO).long()}


def image_types(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": (ids == IMAGE).long()}


def prefix_types(ids: Tensor) -> dict[str, Tensor]:
    return {"token_type_ids": torch.zeros_like(ids)}


SIGLIP = tower("siglip_vision_model", vision_use_head=False)
MROPE = {**ROPE, "mrope_section": [1, 1, 2]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
LLAVA_NEXT: dict[str, Any] = {
    "vision_config": tower("clip_vision_model"),
    "text_config": text("llama"),
    "image_token_index": IMAGE,
    "vision_feature_layer": -1,
    "image_grid_pinpoints": [[24, 48], [48, 24]],
}
FAMILIES: dict[str, Family] = {
    "llava": Family(
        {
            "vision_config": tower("clip_vision_model"),
            "text_config": text("llama"),
            "image_token_index": IMAGE,
            "vision_feature_layer": -1,
        },
        square,
        concatenate,
    ),
    "llava_next": Family(LLAVA_NEXT, crops, concatenate),
    "llava_onevision": Family(
        {
            **LLAVA_NEXT,
            "vision_config": SIGLIP,
            "text_config": text("qwen2"),
            "video_token_index": VIDEO,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_1",
        },
        crops,
        concatenate,
    ),
    "qwen2_vl": Family(
        {
            **QWEN_IDS,
            "vision_config": {**QWEN_TOWER, "embed_dim": 32, "mlp_ratio": 2},
            "text_config": text("qwen2_vl_text", rope_parameters=MROPE),
        },
        grid,
        concatenate,
        modality_types,
    ),
    "qwen2_5_vl": Family(
        {
            **QWEN_IDS,
            "vision_config": {**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]},
            "text_config": text("qwen2_5_vl_text", rope_parameters=MROPE),
        },
        grid,
        concatenate,
        modality_types,
    ),
    "qwen3_vl": Family(
        {
            **QWEN_IDS,
            "vision_config": {**QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
            "text_config": text("qwen3_vl_text", rope_parameters=MROPE),
        },
        grid,
        concatenate,
        modality_types,
    ),
    "internvl": Family(
        {
            "vision_config": {**TOWER, "image_size": [24, 24], "patch_size": [4, 4]},
            "text_config": text("qwen2"),
            "image_token_id": IMAGE,
        },
        tiles,
        concatenate,
    ),
    "idefics3": Family(
        {
            "vision_config": {**TOWER, "patch_size": 4},
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        masked,
        per_sample,
    ),
    "smolvlm": Family(
        {
            "vision_config": {**TOWER, "patch_size": 4},
            "text_config": text("llama"),
            "image_token_id": IMAGE,
            "scale_factor": 2,
        },
        masked,
        per_sample,
    ),
    "paligemma": Family(
        {
            "vision_config": SIGLIP,
            "text_config": text("gemma"),
            "image_token_index": IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        square,
        concatenate,
        prefix_types,
        uncached_differs=True,
    ),
    "paligemma2": Family(
        {
            "vision_config": SIGLIP,
            "text_config": text("gemma2", sliding_window=64, query_pre_attn_scalar=8),
            "image_token_index": 120,  # outside the vocabulary
            "projection_dim": 32,
            "hidden_size": 32,
        },
        square,
        concatenate,
        prefix_types,
        uncached_differs=True,
    ),
    "gemma3": Family(
        {
            "vision_config": SIGLIP,
            "text_config": text("gemma3_text", sliding_window=64, query_pre_attn_scalar=8),
            "image_token_index": IMAGE,
            "mm_tokens_per_image": 16,
            "boi_token_index": 92,
            "eoi_token_index": 93,
        },
        square,
        concatenate,
        image_types,
    ),
    "mistral3": Family(
        {
            "vision_config": tower("pixtral", image_size=48, head_dim=8),
            "text_config": text("mistral"),
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "tie_word_embeddings": False,
        },
        sized,
        concatenate,
    ),
    "aya_vision": Family(
        {
            "vision_config": {**SIGLIP, "patch_size": 4},
            "text_config": text("cohere2", sliding_window=64),
            "image_token_index": IMAGE,
            "downsample_factor": 2,
        },
        tiles,
        concatenate,
    ),
}
MODEL_TYPES = {"paligemma2": "paligemma"}


def entry(family: str) -> Family:
    """The entry here, or in `more`."""
    if family in FAMILIES:
        return FAMILIES[family]
    from tests.families.more import EVERY

    return EVERY[family]


def config_of(family: str, **changes) -> PreTrainedConfig:
    given = entry(family).config
    fields = {**(given() if callable(given) else given), **changes}
    return AutoConfig.for_model(MODEL_TYPES.get(family, family), **fields)


def build(family: str, seed: int = 0, **changes) -> PreTrainedModel:
    """The family's base model with random weights; `changes` go to its config."""
    config = config_of(family, **changes)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for parameter in model.parameters():  # the default start is too small for tokens to matter
        if parameter.ndim > 1 and parameter.abs().max() < 1e-3:  # some parts start at zero
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1:
            parameter.data.mul_(3.0)
    head = model.get_output_embeddings() or model.language_model.get_output_embeddings()
    head.weight.data[[IMAGE, VIDEO]] = 0.0  # no answer has a placeholder
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # a random model should not stop by chance
    return model


@functools.lru_cache(maxsize=2)
def _encoder(family: str) -> PreTrainedModel:
    return build(family)


@torch.no_grad()
def num_placeholders(family: str, pixels: Pixels) -> int:
    """How many visual tokens the base model makes of one image."""
    base = _encoder(family)
    output = base.base_model.get_image_features(**entry(family).join([[pixels]]), return_dict=True)
    rows = output.get("pooler_output", output.get("last_hidden_state"))
    if rows is None:  # only rows for single layers
        rows = output.deepstack_features[0][1]
    return sum(len(entry.flatten(0, -2)) for entry in rows)


@dataclass
class Sample:
    """One prompt: its ids and the pixels of its images."""

    ids: list[int]
    images: list[Pixels]


def image_token(family: str) -> int:
    return _encoder(family).config.image_token_id


def sample(family: str, num_images: int = 1, seed: int = 0, text: int = 5) -> Sample:
    """A prompt of random words with `num_images` images; `seed` also varies their sizes where the family can."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    ids, images = [BOS, *words(2)], []
    for index in range(num_images):
        pixels = entry(family).image(generator, seed + index)
        images.append(pixels)
        start, end = entry(family).around[:1], entry(family).around[1:]
        ids += [*start, *[image_token(family)] * num_placeholders(family, pixels), *end, *words(2)]
    return Sample(ids + words(text), images)


def before_second_image(family: str) -> tuple[Sample, Sample, list[int]]:
    """A sample with two images, what comes before the second of them, and the ids that follow."""
    both = sample(family, 2, 2)
    where = [i for i, token in enumerate(both.ids) if token == image_token(family)]
    gap = next(a for a, b in itertools.pairwise(where) if b != a + 1)
    return both, Sample(both.ids[: gap + 2], both.images[:1]), both.ids[gap + 2 :]


def collate(family: str, samples: list[Sample], side: str = "left") -> dict[str, Any]:
    """A batch as the family's processor gives it."""
    longest = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(samples):
        where = slice(longest - len(s.ids), None) if side == "left" else slice(0, len(s.ids))
        ids[row, where] = torch.tensor(s.ids)
        mask[row, where] = 1
    pixels = entry(family).join([s.images for s in samples]) if any(s.images for s in samples) else {}
    return {"input_ids": ids, "attention_mask": mask, **pixels, **entry(family).extras(ids)}
