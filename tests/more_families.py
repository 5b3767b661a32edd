"""Families that the default adapters serve without a line of their own: one entry and one tiny config each.

Their configs are the library's defaults with every size shrunk by rule, and what an entry changes.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING

from tests.tiny_models import (
    IMAGE,
    MROPE,
    ROPE,
    VIDEO,
    Family,
    Pixels,
    concatenate,
    crops,
    grid,
    masked,
    modality_types,
    per_sample,
    sized,
    square,
)

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "out_hidden_size", "projection_dim", "output_dim", "width"), 32),
    **dict.fromkeys(("d_model", "mm_hidden_size", "text_hidden_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "encoder_ffn_dim", "mlp_dim", "mlp_hidden_dim"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("image_token_id", "image_token_index"), IMAGE),
    **dict.fromkeys(("video_token_id", "video_token_index"), VIDEO),
    **dict.fromkeys(("vision_start_token_id", "boi_token_index", "image_start_token_id", "boi_token_id"), 92),
    **dict.fromkeys(("vision_end_token_id", "eoi_token_index", "image_end_token_id", "eoi_token_id"), 93),
    "video_start_token_id": 94,
    "video_end_token_id": 95,
    "vocab_size": 99,
    "head_dim": 8,
    "image_size": 24,
    "patch_size": 6,
    "num_position_embeddings": 64,
    "max_position_embeddings": 512,
    "sliding_window": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Follow from the sizes, or say where a config came from.
DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "rope_parameters",
    "rope_scaling",
    "transformers_version",
    "architectures",
)
DERIVED += ("dtype", "id2label", "label2id", "per_layer_config", "_name_or_path")


def shrink(config: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in config.items():
        if name in DERIVED:
            continue
        if isinstance(value, dict):
            small[name] = shrink(value)
        elif name in SIZES and value is not None:
            small[name] = [SIZES[name]] * len(value) if isinstance(value, list | tuple) else SIZES[name]
        else:
            small[name] = value
    return small


def shrunk(model_type: str, **changes: Any) -> dict[str, Any]:
    """The library's default config of a type, tiny; `changes` go into it, into its parts where they are dicts."""
    config = shrink(CONFIG_MAPPING[model_type]().to_dict())
    config.pop("model_type")
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) and name in config else value
    # once through the class, which completes what depends on the sizes
    complete = CONFIG_MAPPING[model_type](**config).to_dict()
    complete.pop("model_type")
    return complete


def single_frames(generator: torch.Generator, kind: int) -> Pixels:
    pixels = grid(generator, kind)
    return {**pixels, "pixel_values": pixels["pixel_values"][:, : 3 * 4 * 4]}


def merged_frames(generator: torch.Generator, kind: int) -> Pixels:
    return {**single_frames(generator, kind), "image_merge_sizes": torch.tensor([2])}


def expert_types(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**modality_types(ids), "moe_mm_token_type_ids": (ids == IMAGE).long()}


def whole_patches(generator: torch.Generator, kind: int) -> Pixels:
    pixels = single_frames(generator, kind)
    return {**pixels, "pixel_values": pixels["pixel_values"].reshape(-1, 3, 4, 4)}


def shaped(generator: torch.Generator, kind: int) -> Pixels:
    """Patches of an image of its own shape, padded to those of the largest."""
    height, width = [(4, 4), (4, 6), (6, 4)][kind % 3]
    count = height * width
    return {
        "pixel_values": torch.randn(1, 24, 3 * 6 * 6, generator=generator),
        "pixel_attention_mask": (torch.arange(24) < count)[None].long(),
        "spatial_shapes": torch.tensor([[height, width]]),
    }


SMALL_PATCHES = {"patch_size": 4}
GLM_ROPE = {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}}
DEEPSTACK = {**SMALL_PATCHES, "deepstack_visual_indexes": [0, 1]}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0, "mrope_section": [2, 1, 1]},
}
OTHERS: dict[str, Family] = {
    "aria": Family(lambda: shrunk("aria", projector_patch_to_query_dict={16: 8}), square, concatenate),
    "cohere2_vision": Family(lambda: shrunk("cohere2_vision"), square, concatenate),
    "cohere_compass": Family(
        lambda: shrunk(
            "cohere_compass",
            vision_config=DEEPSTACK,
            text_config={
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {"sliding_attention": MROPE, "full_attention": MROPE},
            },
        ),
        grid,
        concatenate,
        modality_types,
    ),
    "cosmos3_omni": Family(
        lambda: shrunk("cosmos3_omni", vision_config=DEEPSTACK, text_config={"rope_parameters": MROPE}),
        grid,
        concatenate,
        modality_types,
    ),
    "deepseek_vl": Family(lambda: shrunk("deepseek_vl"), square, concatenate),
    "ernie4_5_vl_moe": Family(
        lambda: shrunk(
            "ernie4_5_vl_moe",
            vision_config=SMALL_PATCHES,
            text_config={"rope_parameters": MROPE, "mlp_layer_types": ["dense", "sparse"]},
        ),
        single_frames,
        concatenate,
        expert_types,
    ),
    "exaone4_5": Family(
        lambda: shrunk("exaone4_5", vision_config=SMALL_PATCHES), grid, concatenate, numbered_anew=True
    ),
    "glm46v": Family(
        lambda: shrunk("glm46v", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glm4v": Family(
        lambda: shrunk("glm4v", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glm4v_moe": Family(
        lambda: shrunk("glm4v_moe", vision_config=SMALL_PATCHES, text_config=GLM_ROPE),
        grid,
        concatenate,
        modality_types,
    ),
    "glm_ocr": Family(
        lambda: shrunk("glm_ocr", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "glmga": Family(
        lambda: shrunk("glmga", vision_config=SMALL_PATCHES, text_config=GLM_ROPE), grid, concatenate, modality_types
    ),
    "got_ocr2": Family(lambda: shrunk("got_ocr2"), square, concatenate),
    "hyperclovax_vision_v2": Family(
        lambda: shrunk("hyperclovax_vision_v2", vision_config=SMALL_PATCHES), grid, concatenate, numbered_anew=True
    ),
    "idefics2": Family(lambda: shrunk("idefics2"), masked, per_sample),
    "lfm2_vl": Family(
        lambda: shrunk(
            "lfm2_vl",
            vision_config={"num_patches": 16},
            text_config={"layer_types": ["conv", "full_attention"], "rope_parameters": ROPE},
            downsample_factor=2,
        ),
        shaped,
        concatenate,
    ),
    "lfm3_vl": Family(
        lambda: shrunk(
            "lfm3_vl", vision_config=SMALL_PATCHES, text_config={"layer_types": ["conv", "full_attention"]}
        ),
        grid,
        concatenate,
    ),
    "lighton_ocr": Family(lambda: shrunk("lighton_ocr"), sized, concatenate),
    "llava_next_video": Family(
        lambda: shrunk("llava_next_video", image_grid_pinpoints=[[24, 48], [48, 24]]), crops, concatenate
    ),
    "minimax_m3_vl": Family(lambda: shrunk("minimax_m3_vl", vision_config=SMALL_PATCHES), grid, concatenate),
    "ovis2": Family(lambda: shrunk("ovis2"), square, concatenate),
    "paddleocr_vl": Family(
        lambda: shrunk("paddleocr_vl", vision_config=SMALL_PATCHES, text_config={"rope_parameters": MROPE}),
        whole_patches,
        concatenate,
        modality_types,
    ),
    "pp_chart2table": Family(lambda: shrunk("pp_chart2table"), square, concatenate),
    "qianfan_ocr": Family(lambda: shrunk("qianfan_ocr"), square, concatenate),
    "qwen3_5": Family(
        lambda: shrunk("qwen3_5", vision_config=SMALL_PATCHES, text_config=LINEAR), grid, concatenate, modality_types
    ),
    "qwen3_5_moe": Family(
        lambda: shrunk("qwen3_5_moe", vision_config=SMALL_PATCHES, text_config=LINEAR),
        grid,
        concatenate,
        modality_types,
    ),
    "qwen3_vl_moe": Family(
        lambda: shrunk("qwen3_vl_moe", vision_config=DEEPSTACK, text_config={"rope_parameters": MROPE}),
        grid,
        concatenate,
        modality_types,
    ),
    "step3p7": Family(lambda: shrunk("step3p7", text_config={"sliding_window": 64}), square, concatenate),
    "video_llama_3": Family(lambda: shrunk("video_llama_3", vision_config=SMALL_PATCHES), merged_frames, concatenate),
    "video_llava": Family(lambda: shrunk("video_llava"), square, concatenate),
    "vipllava": Family(lambda: shrunk("vipllava", vision_feature_layers=[-1, -2]), square, concatenate),
}
