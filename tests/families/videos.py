"""A video for each family whose base model takes videos, as its processor would give it.

Four frames; the tokens of a video are asked from the base model's encoder.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.tiny_models import BOS, IMAGE, VIDEO, entry, image_token, num_placeholders

FRAMES, SIDE = 4, 8
START, END, VIDEO_START, VIDEO_END = 92, 93, 94, 95

GLM = ("glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga")
# Whose image tokens stand for videos, too.
SHARE_TOKENS = (*GLM, "molmo2", "nemotron_h_omni")
# Which take no image beside a video.
ALONE = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "molmo2", "nemotron_h_omni")
# With text between the frames, which their positions count on.
TEXT_BETWEEN = (
    *GLM,
    *("cohere_compass", "cosmos3_edge", "cosmos3_omni", "qwen3_vl", "qwen3_vl_moe"),
    *("qwen3_5", "qwen3_5_moe", "qwen4_exp", "minicpmv4_7"),
)
# Patches of all frames side by side.
STRIPS = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
# One grid of patches for each frame.
GRIDS = (
    *(family for family in TEXT_BETWEEN if family not in STRIPS),
    *("dots3_note", "ernie4_5_vl_moe", "exaone4_5", "hy_v4_vl", "hyperclovax_vision_v2", "kimi_k25", "lfm3_vl"),
    *("minimax_m3_vl", "muse_glimmer", "muse_spark", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"),
    *("qwen3_omni_moe_thinker", "video_llama_3"),
)
PLACED = ("gemma4", "gemma4_unified")
FILMS = ("llava_next_video", "llava_onevision", "video_llava")
VIDEOS = (*GRIDS, *STRIPS, *PLACED, *FILMS, "molmo2", "nemotron_h_omni")


def film(family: str, generator: torch.Generator) -> dict[str, Tensor]:
    """The pixels of one video and what is said about them."""
    image = entry(family).image(generator, 0)
    shape = image["pixel_values"].shape
    if family in GRIDS:
        pixels = torch.randn(FRAMES * SIDE * SIDE, *shape[1:], generator=generator)
        made = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([[FRAMES, SIDE, SIDE]])}
        if family == "qwen2_5_vl":
            made["second_per_grid_ts"] = torch.tensor([2.0])
        if family.endswith("thinker"):
            made["video_second_per_grid"] = torch.tensor([0.5])
        if family == "video_llama_3":  # as its processor compresses a video
            made["video_merge_sizes"] = torch.tensor([2])
            made["video_compression_mask"] = torch.rand(FRAMES * SIDE * SIDE // 4, generator=generator) > 0.3
        return made
    if family in STRIPS:
        frames = [entry(family).image(generator, 1) for _ in range(FRAMES)]
        return {
            "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in frames], -1),
            "target_sizes_videos": torch.cat([frame["target_sizes"] for frame in frames]),
        }
    if family in PLACED:
        frames = [entry(family).image(generator, 1) for _ in range(FRAMES)]
        return {
            "pixel_values_videos": torch.cat([frame["pixel_values"] for frame in frames]),
            "video_position_ids": torch.cat([frame["image_position_ids"] for frame in frames]),
            "num_frames_per_video": torch.tensor([FRAMES]),
        }
    if family == "molmo2":
        pooling = image["image_token_pooling"]
        return {
            "pixel_values_videos": torch.randn(FRAMES, *shape[1:], generator=generator),
            "video_token_pooling": torch.cat([pooling + 16 * frame for frame in range(FRAMES)]),
            "video_grids": torch.tensor([[FRAMES, 2, 2]]),
        }
    if family == "nemotron_h_omni":  # pairs of frames
        return {"pixel_values_videos": torch.randn(1, FRAMES // 2, 6, 16, 16, generator=generator)}
    frames = 8 if family == "video_llava" else FRAMES
    return {"pixel_values_videos": torch.randn(1, frames, 3, 24, 24, generator=generator)}


@torch.no_grad()
def num_tokens(base: PreTrainedModel, pixels: dict[str, Tensor]) -> int:
    """How many tokens the prompt has for a video."""
    unknown = ("second_per_grid_ts", "video_second_per_grid", "video_compression_mask")
    given = {name: value for name, value in pixels.items() if name not in unknown}
    output = base.base_model.get_video_features(**given, return_dict=True)
    mask = pixels.get("video_compression_mask")
    return sum(rows[..., 0].numel() for rows in output.pooler_output) if mask is None else int(mask.sum())


def video_ids(family: str, count: int) -> list[int]:
    token = image_token(family) if family in SHARE_TOKENS else VIDEO
    if family not in TEXT_BETWEEN:
        return [START, *[token] * count, END]
    ids = [i for frame in range(FRAMES) for i in (START, *[token] * (count // FRAMES), END, 10 + frame)]
    return [VIDEO_START, *ids, VIDEO_END] if family in GLM else ids


def prompt(family: str, base: PreTrainedModel, with_image: bool) -> dict[str, Any]:
    """A prompt with a video, after an image if wanted."""
    generator = torch.Generator().manual_seed(0)
    pixels, ids = film(family, generator), [BOS, 5]
    count = num_tokens(base, pixels)
    if with_image:
        image = entry(family).image(generator, 0)
        ids += [START, *[image_token(family)] * num_placeholders(family, image), END, 6]
        pixels = {**entry(family).join([[image]]), **pixels}
    tensor = torch.tensor([[*ids, *video_ids(family, count), 7, 8, 9]])
    inputs = {"input_ids": tensor, "attention_mask": torch.ones_like(tensor), **pixels, **entry(family).extras(tensor)}
    if family in GLM and "mm_token_type_ids" in inputs:
        in_video = (tensor == VIDEO_START).cumsum(1) > (tensor == VIDEO_END).cumsum(1)
        inputs["mm_token_type_ids"] = (tensor == IMAGE).long() * (1 + in_video.long())
    return inputs
