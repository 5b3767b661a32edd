"""Tiny random models of each family, built in memory: hidden 32, two layers, small images.

`build(family, seed)` gives the base model; `Sample`s are single prompts with their pixels; `collate` makes a batch of
them, left- or right-padded, in the form that the family's processor gives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 99
PAD, BOS, EOS, IMAGE, VIDEO = 0, 1, 2, 90, 91
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 6,
    "projection_dim": 32,
}


@dataclass
class Family:
    """
    Args:
        build: makes the base model.
        image: makes the pixels of one image from a generator, with the ids that stand for it in a prompt.
        join: puts the pixel inputs of several images of a batch together.
    """

    build: Callable[[], PreTrainedModel]
    image: Callable[[torch.Generator, int], tuple[dict[str, Tensor], list[int]]]
    join: Callable[[list[list[dict[str, Tensor]]]], dict[str, Tensor]]
    extras: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})


def concatenate(samples: list[list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    images = [image for sample in samples for image in sample]
    names = dict.fromkeys(name for image in images for name in image)
    return {name: torch.cat([image[name] for image in images if name in image]) for name in names}


def llava() -> PreTrainedModel:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIP,
        text_config={**TEXT, "model_type": "llama"},
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def square_image(size: int, num_tokens: int) -> Callable:
    def image(generator: torch.Generator, kind: int) -> tuple[dict[str, Tensor], list[int]]:
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}, [IMAGE] * num_tokens

    return image


FAMILIES: dict[str, Family] = {
    "llava": Family(llava, square_image(24, 16), concatenate),
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = FAMILIES[family].build().eval()
    for parameter in model.parameters():  # the default start is too small for tokens to matter
        if parameter.ndim > 1:
            parameter.data.mul_(3.0)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None  # a random model should not stop by chance
    return model


@dataclass
class Sample:
    """One prompt: ids and the pixel inputs of its images."""

    ids: list[int]
    images: list[dict[str, Tensor]]


def sample(family: str, num_images: int = 1, seed: int = 0, text: int = 5) -> Sample:
    """A prompt with `num_images` images between random words; `seed` also varies image sizes where the family can."""
    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> list[int]:
        return torch.randint(5, 60, (count,), generator=generator).tolist()

    ids, images = [BOS, *words(2)], []
    for index in range(num_images):
        pixels, placeholders = FAMILIES[family].image(generator, seed + index)
        images.append(pixels)
        ids += [*placeholders, *words(2)]
    return Sample(ids + words(text), images)


def collate(family: str, samples: list[Sample], side: str = "left") -> dict[str, Any]:
    longest = max(len(s.ids) for s in samples)
    ids = torch.full((len(samples), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, s in enumerate(samples):
        where = slice(longest - len(s.ids), None) if side == "left" else slice(0, len(s.ids))
        ids[row, where] = torch.tensor(s.ids)
        mask[row, where] = 1
    entry = FAMILIES[family]
    pixels = entry.join([s.images for s in samples]) if any(s.images for s in samples) else {}
    return {"input_ids": ids, "attention_mask": mask, **pixels, **entry.extras(ids)}
